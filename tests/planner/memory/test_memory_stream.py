"""What engine stream keeps on the card and in RAM."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from planner.estimate import estimate
from planner.memory.stream import GATHER_BYTES, SLOTS, slab_bytes, slabs, streamed_layers
from planner.memory.streamed import parts_of, pinned_lines, streamed_memory
from planner.memory.weights import weight_bytes
from planner.placement import Tiers, stream_map
from planner.types import Gpu, Host, Machine, Strategy, Workload
from planner.units import GIB
from profiles.architecture import architecture
from profiles.catalogue import load_model
from profiles.hardware import load_gpu

JOB = Workload(task="infer", prompt_tokens=512, new_tokens=64)
QLORA = Workload(task="train", method="qlora", seq_len=512)
PAGE = 4096


def machine(vram: float, card: str = "rtx-3090") -> Machine:
    found = load_gpu(card)
    gpu = Gpu(index=0, profile=found, total_bytes=int(vram * GIB))
    return Machine(gpus=(gpu,), host=Host(ram_total_bytes=256 * GIB))


def streamed(name: str, vram: float, job: Workload = JOB, quant: str = "none"):
    how = Strategy(placement="mixed_offload", engine="stream", quant=quant, loss="fused")
    return estimate(load_model(name), machine(vram), job, how)


def line(lines, name: str) -> int:
    return sum(item.bytes for item in lines if item.name == name)


def test_a_slab_of_qwen_in_bf16() -> None:
    """Bytes of each tensor, rounded up to 256, and their sum to a page."""
    arch = architecture(load_model("qwen2.5-7b").config)
    weights = 2 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    small = 2 * (3584 + 512 + 512 + 2 * 3584)
    assert weights % 256 == small % 256 == 0
    assert slab_bytes(arch.kinds[0], "none", 2) == -(-(weights + small) // PAGE) * PAGE


def test_a_slab_of_llama_in_nf4() -> None:
    """421 MiB for Llama-3-70B: packed weights, uint8 absmax for 64 of them, fp32 for 256 of those, offset."""
    arch = architecture(load_model("llama-3-70b").config)
    h, kv, f = 8192, 1024, 28672
    tensors = [2 * h, 2 * h]
    for n in (h * h, h * kv, h * kv, h * h, h * f, h * f, h * f):
        tensors += [n // 2, n // 64, n // 64 // 256 * 4, 4]
    used = sum(-(-n // 256) * 256 for n in tensors)
    assert slab_bytes(arch.kinds[0], "nf4", 2) == -(-used // PAGE) * PAGE
    assert round(used / 2**20) == 421


@pytest.mark.parametrize(
    ("quant", "experts"), [("none", "none"), ("int8", "none"), ("nf4", "none"), ("nf4", "nf4")]
)
def test_slabs_waste_little(quant: str, experts: str) -> None:
    """Pinned memory is at most 3 % above the weights' own bytes."""
    for name in ("qwen2.5-0.5b", "llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v2-lite"):
        arch = architecture(load_model(name).config)
        weights = weight_bytes(arch, quant, experts, "bf16")
        for slab, kind in zip(slabs(arch, quant, "bf16", experts), arch.order, strict=True):
            assert weights.layers[kind] * 0.97 <= slab <= weights.layers[kind] * 1.03


@pytest.mark.parametrize("vram", [6, 9, 12, 14])
def test_as_many_layers_stay_as_fit(vram: float) -> None:
    found = streamed("qwen2.5-7b", vram)
    (card,) = found.gpus
    arch = architecture(load_model("qwen2.5-7b").config)
    slab = slab_bytes(arch.kinds[0], "none", 2)
    stay = found.placement.layers_on_gpu
    assert card.high_bytes <= card.budget_bytes < card.high_bytes + 1.1 * slab
    assert line(card.components, "slots") == SLOTS * slab
    assert sum(item.bytes for item in card.components) == card.allocated_peak_bytes
    table = 152064 * 3584 * 2
    assert found.host.pinned_bytes == (28 - stay) * slab + table + GATHER_BYTES
    where = found.placement.device_map
    assert where["model.embed_tokens"] == "cpu" and where["lm_head"] == 0
    away = {int(n.rsplit(".", 1)[1]) for n, place in where.items() if place == "cpu" and n[-1].isdigit()}
    assert away == set(streamed_layers(arch, stay))


def test_a_card_too_small_for_what_never_streams() -> None:
    found = streamed("qwen2.5-7b", 1)
    assert found.verdict == "does_not_fit" and found.placement.layers_on_gpu == 0


def test_a_card_that_holds_everything_streams_nothing() -> None:
    found = streamed("qwen2.5-0.5b", 24)
    assert found.placement.layers_in_ram == 0 and found.host.pinned_bytes == 0


def test_more_residents_never_need_less() -> None:
    arch = architecture(load_model("deepseek-v2-lite").config)  # a dense layer, then routed ones
    how = Strategy(placement="mixed_offload", engine="stream")
    from planner.memory.infer import inference_memory

    memory, parts = inference_memory(arch, JOB, Strategy(), 0), parts_of(arch, how)
    peaks = [streamed_memory(memory, parts, Tiers(n)).peak.bytes for n in range(arch.layers + 1)]
    rounding = 4 * PAGE  # slots end at a page, loaded weights do not
    assert all(more >= fewer - rounding for fewer, more in itertools.pairwise(peaks))
    assert peaks[-1] == memory.peak.bytes and pinned_lines(parts, Tiers(arch.layers)) == ()


def test_training_a_70b_fits_a_small_card() -> None:
    found = streamed("llama-3-70b", 16, QLORA, "nf4")
    assert found.verdict == "fits" and found.speed.train_tokens_per_s is not None
    resident = estimate(load_model("llama-3-70b"), machine(16), QLORA, Strategy(quant="nf4"))
    assert resident.verdict == "does_not_fit"


def test_decode_is_bound_by_the_link_and_training_is_not() -> None:
    """The link's time runs beside the card's: with enough tokens a pass copies cost nothing, and what they
    ask of the host next to nothing."""
    card = machine(24, "h200")
    how = Strategy(placement="mixed_offload", engine="stream", quant="nf4", loss="fused")
    model = load_model("llama-3-70b")
    decode = estimate(model, card, JOB, how)
    assert decode.speed.bound == "link"
    job = Workload(task="train", method="qlora", seq_len=1024, batch_size=4)
    resident = estimate(model, machine(141, "h200"), job, Strategy(quant="nf4", loss="fused"))
    train = estimate(model, card, job, how)
    assert train.speed.bound == "compute"
    speeds = [each.speed.train_tokens_per_s for each in (train, resident)]
    for streamed, whole in zip(*(msgspec.structs.astuple(speed) for speed in speeds), strict=True):
        assert whole * 0.999 <= streamed <= whole


def test_what_was_measured_on_an_h200() -> None:
    """Qwen2.5-14B in bf16, 13 of 48 layers resident: 2.46 tokens/s; Llama-3-70B in NF4, 36 of 80: 2.6."""
    from planner.speed import predict_speed

    for name, quant, resident, measured in (
        ("qwen2.5-14b", "none", 13, 2.46),
        ("llama-3-70b", "nf4", 36, 2.6),
    ):
        arch = architecture(load_model(name).config)
        how = Strategy(placement="mixed_offload", engine="stream", quant=quant)
        speed = predict_speed(arch, machine(141, "h200"), JOB, how, stream_map(arch, Tiers(resident)))
        assert speed.decode_tokens_per_s.typical == pytest.approx(measured, rel=0.15)
