"""Speed: hand-computed passes, measured points, and how it must move."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from plan_fakes import LLAMA_8B, LLAMA_70B, QWEN_7B, QWEN_14B, card, no_card

from planner.memory.streamed import Traffic
from planner.passes import Job, decode_seconds, prefill_seconds, train_seconds
from planner.rates import LEVELS, Rates, card_rates, efficiency, link_bytes_per_s, load_efficiencies
from planner.seconds import Seconds
from planner.speed import predict_speed
from planner.types import Disk, Host, Machine, PlacementMap, ProbeResult, Strategy, Workload
from planner.work import (
    Work,
    attention_flops,
    cache_bytes,
    count_work,
    experts_read,
    layer_bytes,
    read_bytes,
)
from profiles.architecture import architecture
from profiles.arithmetic import parameter_count
from profiles.catalogue import all_models
from profiles.hardware import all_gpus

QWEN, LLAMA = architecture(QWEN_7B), architecture(LLAMA_8B)
HERE = PlacementMap()
H200 = card("h200", cores=16)
QLORA = Workload(task="train")
SLOW_LINK = replace(card_rates(H200, "bf16", "typical"), link=1e9)


def speed_of(arch, machine, workload, strategy, placement=HERE):
    speed = predict_speed(arch, machine, workload, strategy, placement)
    return speed.train_tokens_per_s or speed.decode_tokens_per_s


# --------------------------------------------------------------------------- work


def test_counts_of_a_dense_model():
    work = count_work(QWEN)
    # 28 layers of q, k, v, o and three of the feed-forward.
    layer = 3584 * (3584 + 2 * 512 + 3584) + 3 * 3584 * 18944
    assert work.linear_weights == 28 * layer
    assert work.head_weights == work.embedding_weights == 3584 * 152064
    assert work.weights == parameter_count(QWEN)
    assert work.linears == 28 * 7 + 1


@pytest.mark.parametrize("profile", all_models(), ids=lambda profile: profile.id)
def test_work_counts_every_parameter(profile):
    arch = architecture(profile.config)
    assert count_work(arch).weights == parameter_count(arch)


def test_cache_and_attention_grow_with_the_context_up_to_a_window():
    work = count_work(LLAMA)
    assert cache_bytes(work, 1000, 2) == 32 * 2 * 8 * 128 * 1000 * 2
    assert attention_flops(work, 1000) == 32 * 4 * 32 * 128 * 1000
    windowed = replace(work, mixing=tuple(replace(m, window=256) for m in work.mixing))
    assert cache_bytes(windowed, 1000, 2) == cache_bytes(work, 256, 2)


def test_bytes_follow_the_precision():
    work = count_work(QWEN)
    plain, packed = layer_bytes(work, Strategy()), layer_bytes(work, Strategy(quant="nf4"))
    assert plain == 2 * (work.weights - work.head_weights - work.embedding_weights)
    saved = work.linear_weights * (2 - (4 + 8 / 64 + 32 / 16384) / 8)
    assert math.isclose(plain - packed, saved)
    assert read_bytes(work, Strategy(), 1) == plain + 2 * work.head_weights


def test_experts_are_read_as_tokens_touch_them():
    work = Work(
        layers=1, hidden_size=8, vocab_size=8, linear_weights=100, other_weights=0, expert_weights=800,
        experts_fused=True, expert_share=0.25, head_weights=0, embedding_weights=0, tower_weights=0,
        active_linear_weights=300, linears=1, kernels=1, mixing=(),
    )  # fmt: skip
    assert experts_read(work, 1) == 0.25
    assert math.isclose(experts_read(work, 2), 1 - 0.75**2)
    assert read_bytes(work, Strategy(), 1) == 2 * (100 + 200)
    # Fused stacks stay as they are under bitsandbytes.
    assert math.isclose(layer_bytes(work, Strategy(quant="int8")), 100 + 2 * 800)


# --------------------------------------------------------------------------- passes


def test_a_pass_waits_for_the_slowest_and_then_for_transfers():
    seconds = Seconds(memory=3, compute=2, launch=1, link=4, disk=5, other=0.5)
    assert seconds.total == 3.5 + 4 + 5
    assert seconds.bound == "disk"
    assert Seconds(memory=1, compute=2, launch=9).total == 9
    assert Seconds(memory=1, compute=2, launch=9).bound == "launch"
    # a card that is busy for longer than the link is what a pass waits for
    assert Seconds(memory=1, compute=2, other=2, streamed=3).bound == "compute"


def test_decode_by_hand():
    rates = Rates(bandwidth=1e12, compute=1e14, vector=1e13, link=None, pageable=None, disk=1e9, direct=1e9)
    workload = Workload(prompt_tokens=100, new_tokens=50)
    job = Job(count_work(QWEN), workload, Strategy(cache="static"), HERE, on_cpu=False, cores=0)
    seconds = decode_seconds(job, rates, "typical")
    read = 2 * (parameter_count(QWEN) - 3584 * 152064) / (1e12 * efficiency("decode_bandwidth", "typical"))
    kept = 28 * 2 * 4 * 128 * 125 * 2 / 1e12
    kept += 2 * 28 * 2 * 28 * 128 * 150 * 2 / 1e12  # once for each query head, written and read
    assert math.isclose(seconds.memory, read + kept, rel_tol=1e-9)
    active = 28 * (3584 * 8192 + 3 * 3584 * 18944) + 3584 * 152064
    assert math.isclose(seconds.compute, (2 * active + 28 * 4 * 28 * 128 * 125) / 1e14, rel_tol=1e-9)


def test_offload_adds_the_link_and_the_disk():
    rates = Rates(bandwidth=1e12, compute=1e14, vector=1e13, link=2e10, pageable=1e10, disk=2e9, direct=2e9)
    away = PlacementMap(layers_on_gpu=14, layers_in_ram=7, layers_on_disk=7)
    job = Job(count_work(QWEN), Workload(), Strategy(), away, on_cpu=False, cores=0)
    seconds = decode_seconds(job, rates, "typical")
    layers = 2 * (count_work(QWEN).linear_weights + count_work(QWEN).other_weights)
    assert math.isclose(seconds.link, layers / 2 / 1e10, rel_tol=1e-9)
    assert math.isclose(seconds.disk, layers / 4 / 2e9, rel_tol=1e-9)
    assert decode_seconds(job, replace(rates, pageable=None), "typical") is None


def test_training_operations_by_hand():
    """Frozen base with checkpointing: 6 operations for each weight and token; all trained: 8."""
    rates = Rates(bandwidth=1e15, compute=1e12, vector=1e15, link=None, pageable=None, disk=1e9, direct=1e9)
    work = replace(count_work(QWEN), mixing=(), head_weights=0)
    compute = 1e12 * efficiency("train_compute", "typical")
    for method, checkpointing, factor in (
        ("lora", True, 6), ("lora", False, 4), ("full", True, 8), ("full", False, 6),
    ):  # fmt: skip
        workload = Workload(task="train", method=method, seq_len=512, adapter_dtype="fp32")
        strategy = Strategy(gradient_checkpointing=checkpointing)
        seconds = train_seconds(Job(work, workload, strategy, HERE, False, 0), rates, "typical")
        assert math.isclose(seconds.compute, factor * 512 * work.linear_weights / compute, rel_tol=1e-3)


# --------------------------------------------------------------------------- measured points


@pytest.mark.parametrize(
    ("config", "workload", "strategy", "placement", "measured"),
    [
        (QWEN_7B, Workload(prompt_tokens=512, new_tokens=128), Strategy(), HERE, 74),
        (QWEN_7B, Workload(prompt_tokens=512, new_tokens=128), Strategy(cache="static"), HERE, 127),
        (
            QWEN_7B,
            Workload(prompt_tokens=512, new_tokens=128),
            Strategy(cache="static", quant="nf4"),
            HERE,
            135,
        ),
        (
            QWEN_14B,
            Workload(prompt_tokens=512, new_tokens=128),
            Strategy(placement="mixed_offload", engine="accelerate"),
            PlacementMap(layers_on_gpu=13, layers_in_ram=35),
            0.41,
        ),
        (
            LLAMA_70B,
            Workload(task="train", seq_len=1024, batch_size=4),
            Strategy(quant="nf4", loss="fused"),
            HERE,
            1131,
        ),
        (LLAMA_8B, Workload(task="train", seq_len=2048), Strategy(quant="nf4", loss="fused"), HERE, 6206),
    ],
)
def test_within_15_per_cent_of_what_was_measured_on_an_h200(config, workload, strategy, placement, measured):
    speed = speed_of(architecture(config), H200, workload, strategy, placement)
    assert abs(speed.typical / measured - 1) <= 0.15
    assert speed.low <= measured <= speed.high


# --------------------------------------------------------------------------- rates


def test_efficiencies_say_where_they_come_from():
    for entry in load_efficiencies().values():
        assert entry.source and entry.of
        # The middle lies inside, whichever way the figure runs.
        assert min(entry.low, entry.high) <= entry.typical <= max(entry.low, entry.high)


def test_a_probe_replaces_the_catalogue():
    probe = ProbeResult(
        date="2026-01-01", device_bandwidth_bytes_per_s=10**12, bf16_flops_per_s=10**14,
        host_to_device_bytes_per_s=5 * 10**9, pageable_bytes_per_s=9 * 10**9, disk_read_bytes_per_s=10**9,
    )  # fmt: skip
    probed = replace(H200, probe=probe)
    for level in LEVELS:
        rates = card_rates(probed, "bf16", level)
        assert (rates.bandwidth, rates.compute, rates.link, rates.disk) == (1e12, 1e14, 5e9, 1e9)
        assert rates.pageable == 5e9
    recorded = Strategy(cache="static")
    slower, faster = (speed_of(QWEN, machine, Workload(), recorded) for machine in (probed, H200))
    assert slower.typical < faster.typical
    assert "probe" in (predict_speed(QWEN, probed, Workload(), Strategy(), HERE).basis or "")


def test_link_rate_from_generation_and_lanes():
    gpu = card("h200").gpus[0]
    assert link_bytes_per_s(replace(gpu, pcie_generation_max=5, pcie_lanes=16)) == 16 * 3.938e9
    # An idle card slows its link; the best it can do counts.
    assert (
        link_bytes_per_s(replace(gpu, pcie_generation=1, pcie_generation_max=4, pcie_lanes=16))
        == 16 * 1.969e9
    )


def test_unknown_rates_give_no_speed():
    gpu = card("h200").gpus[0]
    blank = replace(gpu, profile=replace(gpu.profile, bandwidth_bytes_per_s=None))
    speed = predict_speed(QWEN, Machine(gpus=(blank,)), Workload(), Strategy(), HERE)
    assert speed.decode_tokens_per_s is None and speed.prefill_tokens_per_s is None and speed.bound is None
    assert speed_of(QWEN, Machine(host=Host()), Workload(), Strategy(placement="cpu")) is None


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.id)
def test_every_card_gives_an_ordered_range_or_none(gpu):
    machine = card(gpu.id)
    for workload, strategy in (
        (Workload(), Strategy(dtype="fp16")),
        (QLORA, Strategy(dtype="fp16", quant="nf4")),
    ):
        speed = speed_of(QWEN, machine, workload, strategy)
        known = gpu.bandwidth_bytes_per_s and (gpu.fp16_flops_per_s or gpu.fp32_flops_per_s)
        assert (speed is not None) == bool(known)
        if speed is not None:
            assert 0 < speed.low <= speed.typical <= speed.high


def test_disk_kinds_are_ordered():
    def rate(kind):
        disk = Disk(path="/", total_bytes=10**12, free_bytes=10**12, kind=kind)
        return card_rates(replace(H200, disks=(disk,)), "bf16", "typical").disk

    assert rate("hdd") < rate("ssd") < rate("nvme")


# --------------------------------------------------------------------------- properties


@given(
    tokens=st.integers(1, 30000),
    more=st.integers(1, 30000),
    quant=st.sampled_from(["none", "nf4", "int8"]),
    cache=st.sampled_from(["dynamic", "static", "offloaded"]),
)
def test_a_longer_context_is_never_faster(tokens, more, quant, cache):
    strategy = Strategy(quant=quant, cache=cache)
    short = speed_of(QWEN, H200, Workload(prompt_tokens=tokens), strategy)
    long = speed_of(QWEN, H200, Workload(prompt_tokens=tokens + more), strategy)
    assert long.typical <= short.typical and long.low <= short.low and long.high <= short.high


@given(batch=st.integers(1, 64), more=st.integers(1, 64))
def test_a_larger_batch_never_gives_fewer_tokens_a_second(batch, more):
    small = speed_of(QWEN, H200, Workload(batch_size=batch), Strategy())
    large = speed_of(QWEN, H200, Workload(batch_size=batch + more), Strategy())
    assert large.typical >= small.typical * 0.999


@given(layers=st.integers(0, 27))
def test_more_layers_off_the_card_are_never_faster(layers):
    strategy = Strategy(placement="mixed_offload", engine="accelerate")

    def speed(away):
        return speed_of(
            QWEN, H200, Workload(), strategy, PlacementMap(layers_on_gpu=28 - away, layers_in_ram=away)
        )

    assert speed(layers + 1).typical <= speed(layers).typical


def test_checkpointing_costs_speed():
    with_it = speed_of(LLAMA, H200, Workload(task="train", batch_size=8), Strategy(quant="nf4"))
    without = speed_of(
        LLAMA, H200, Workload(task="train", batch_size=8), Strategy(quant="nf4", gradient_checkpointing=False)
    )
    assert without.typical > 1.2 * with_it.typical


def test_more_cores_are_faster():
    few, many = (
        speed_of(QWEN, no_card(cores=cores), QLORA, Strategy(placement="cpu", quant="nf4"))
        for cores in (2, 32)
    )
    assert many.typical > 5 * few.typical


@pytest.mark.parametrize("how", [Strategy(), Strategy(quant="nf4")], ids=["bf16", "nf4"])
def test_a_prompt_in_parts_brings_the_weights_with_each(how):
    work = Workload(prompt_tokens=8192)
    streamed = replace(how, placement="mixed_offload", engine="stream")
    job = Job(count_work(LLAMA), work, streamed, HERE, False, 16, traffic=Traffic(link=10**10, disk=10**9))
    rates = card_rates(H200, "bf16", "typical")
    whole = prefill_seconds(job, rates, "typical")
    for part, passes in ((8192, 1), (2048, 4), (3000, 3)):
        each = replace(job, strategy=replace(streamed, prefill_chunk_tokens=part))
        seconds = prefill_seconds(each, rates, "typical")
        assert seconds.streamed == pytest.approx(passes * whole.streamed)
        assert seconds.read == pytest.approx(passes * whole.read)
        assert seconds.compute == whole.compute
        assert seconds.memory == pytest.approx(passes * whole.memory, rel=0.01)


def test_last_checkpoints_stay_on_the_card():
    how = Strategy(quant="nf4", activation_offload=True, engine="resident")
    work = replace(QLORA, seq_len=4096)
    seconds = train_seconds(Job(count_work(LLAMA), work, how, HERE, False, 16), SLOW_LINK, "typical")
    assert seconds.link == pytest.approx(2 * 30 * 4096 * 4096 * 2 / 10**9)
