"""What must hold of every estimate, whatever is asked.

`allocated` is exact arithmetic, so its order is exact. What is required besides is what a run leaves in
holes, played out on the allocator; where blocks settle otherwise, it may shrink a little: `SLACK` says how
much.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner.estimate import architecture_of, estimate
from planner.machine import machine_from_gpus
from planner.memory.optimizer import OPTIMIZERS
from planner.memory.replay_generation import MOST
from planner.types import Estimate, GpuEstimate, Machine, Strategy, Workload
from profiles.catalogue import load_model
from profiles.hardware import load_gpu

MODELS = (
    "qwen2.5-7b", "qwen2.5-0.5b", "llama-3.2-1b", "gemma-2-2b", "gemma-3-12b-it", "phi-3.5-mini-instruct",
    "mixtral-8x22b-v0.1", "deepseek-v2-lite", "qwen3-next-80b-a3b-instruct", "gemma-3n-e4b-it",
    "c4ai-command-r-v01", "falcon-40b", "gpt-oss-120b", "qwen2-vl-2b-instruct", "nemotron-h-56b-base-8k",
)  # fmt: skip
"""Dense, tied, routed, latent, sliding, recurrent, with shared caches, towers, parallel layers."""

SLACK = 0.93
VERDICTS = ("does_not_fit", "unknown", "tight", "fits")

quick = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
models = st.sampled_from(MODELS)
cards = st.sampled_from(("h200", "rtx-3090", "rtx-4060-8gb"))
lengths = st.integers(1, 6000)
growth = st.integers(1, 3000)


@lru_cache(maxsize=16)
def machine(card: str = "h200") -> Machine:
    return machine_from_gpus([(load_gpu(card), 1)])


def on_card(model: str, work: Workload, how: Strategy, card: str = "h200") -> GpuEstimate:
    return estimate(load_model(model), machine(card), work, how).gpus[0]


@st.composite
def training(draw: st.DrawFn) -> tuple[Workload, Strategy]:
    method = draw(st.sampled_from(("full", "lora", "qlora")))
    quant = draw(st.sampled_from(("nf4", "int8"))) if method == "qlora" else "none"
    work = Workload(
        task="train",
        method=method,
        seq_len=draw(lengths),
        batch_size=draw(st.integers(1, 4)),
        gradient_accumulation_steps=draw(st.sampled_from((1, 4))),
        lora_rank=draw(st.sampled_from((4, 8, 64))),
        lora_targets=draw(st.sampled_from(("all-linear", "attention"))),
        lora_variant=draw(st.sampled_from(("lora", "dora"))),
        adapter_dtype=draw(st.sampled_from(("fp32", "bf16"))),
    )
    how = Strategy(
        quant=quant,
        dtype=draw(st.sampled_from(("bf16", "fp32"))) if quant == "none" else "bf16",
        gradient_checkpointing=draw(st.booleans()),
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        attention=draw(st.sampled_from(("sdpa", "eager", "flash_attention_2"))),
        loss=draw(st.sampled_from(("full", "fused"))),
        kernels=draw(st.sampled_from(("torch", "liger"))),
        upcast_frozen=draw(st.booleans()),
    )
    return work, how


@st.composite
def generation(draw: st.DrawFn) -> tuple[Workload, Strategy]:
    work = Workload(
        task="infer",
        prompt_tokens=draw(lengths),
        new_tokens=draw(st.integers(1, 1000)),
        batch_size=draw(st.integers(1, 4)),
        concurrency=draw(st.integers(1, 3)),
    )
    how = Strategy(
        quant=draw(st.sampled_from(("none", "nf4", "int8"))),
        attention=draw(st.sampled_from(("sdpa", "eager"))),
        cache=draw(st.sampled_from(("dynamic", "static", "offloaded", "quantized"))),
    )
    return work, how


jobs = st.one_of(training(), generation())


def no_less(more: GpuEstimate, less: GpuEstimate, chance: float = 0.1) -> None:
    """`chance`: share of what `less` takes beside its weights that holes may take or not: a large block finds
    a place in one job and none in the next."""
    holes = chance * (less.allocated_peak_bytes - less.load_bytes)
    assert more.load_bytes >= less.load_bytes
    assert more.allocated_peak_bytes >= less.allocated_peak_bytes
    assert more.low_bytes >= SLACK * less.low_bytes - holes
    assert more.process_bytes >= SLACK * less.process_bytes - holes
    assert more.high_bytes >= SLACK * less.high_bytes - 1.5 * holes


@quick
@given(models, jobs, cards)
def test_figures_of_a_card_are_consistent(model: str, job: tuple[Workload, Strategy], card: str) -> None:
    gpu = on_card(model, *job, card)
    assert sum(line.bytes for line in gpu.components) == gpu.allocated_peak_bytes
    assert all(line.bytes > 0 and line.formula for line in gpu.components)
    assert all(n > 0 for n in gpu.moments.values())
    assert len({line.name for line in gpu.components}) == len(gpu.components)
    assert gpu.low_bytes <= gpu.process_bytes <= gpu.high_bytes
    assert gpu.process_bytes == gpu.required_bytes + gpu.context_bytes
    assert gpu.required_bytes >= max(gpu.allocated_peak_bytes, gpu.load_bytes)
    assert gpu.moments[gpu.peak_moment] == gpu.allocated_peak_bytes
    assert gpu.allocated_peak_bytes == max(n for name, n in gpu.moments.items() if name != "load")
    assert gpu.moments["load"] >= gpu.load_bytes > 0 and gpu.managed_bytes >= 0


@quick
@given(models, jobs)
def test_estimates_are_pure(model: str, job: tuple[Workload, Strategy]) -> None:
    first = estimate(load_model(model), machine(), *job)
    on_card("qwen2.5-0.5b", Workload(task="infer"), Strategy())
    assert estimate(load_model(model), machine_from_gpus([(load_gpu("h200"), 1)]), *job) == first


@quick
@given(models, training(), growth)
def test_longer_sequences_never_need_less(model: str, job: tuple[Workload, Strategy], more: int) -> None:
    work, how = job
    no_less(on_card(model, replace(work, seq_len=work.seq_len + more), how), on_card(model, work, how))


@quick
@given(models, training(), st.integers(1, 4))
def test_larger_batches_never_need_less(model: str, job: tuple[Workload, Strategy], more: int) -> None:
    work, how = job
    no_less(on_card(model, replace(work, batch_size=work.batch_size + more), how), on_card(model, work, how))


@quick
@given(
    models,
    generation(),
    growth,
    st.sampled_from(("prompt_tokens", "new_tokens", "batch_size", "concurrency")),
)
def test_generating_more_never_needs_less(
    model: str, job: tuple[Workload, Strategy], more: int, what: str
) -> None:
    work, how = job
    step = more if what.endswith("tokens") else 1 + more % 3
    larger = replace(work, **{what: getattr(work, what) + step})
    no_less(on_card(model, larger, how), on_card(model, work, how), chance=MOST)


@quick
@given(models, training(), st.integers(1, 64), st.sampled_from(("adamw_torch", "sgd", "lion_32bit")))
def test_higher_ranks_never_need_less(
    model: str, job: tuple[Workload, Strategy], more: int, optimizer: str
) -> None:
    # 8-bit and paged optimizers treat larger tensors otherwise: some states shrink or leave the card
    work, how = replace(job[0], method="lora"), replace(job[1], optimizer=optimizer, quant="none")
    no_less(on_card(model, replace(work, lora_rank=work.lora_rank + more), how), on_card(model, work, how))


@quick
@given(models, training())
def test_accumulating_gradients_never_needs_less(model: str, job: tuple[Workload, Strategy]) -> None:
    work, how = job
    once, often = (replace(work, gradient_accumulation_steps=n) for n in (1, 8))
    no_less(on_card(model, often, how), on_card(model, once, how))


@quick
@given(models, generation())
def test_more_bits_never_need_less_to_generate(model: str, job: tuple[Workload, Strategy]) -> None:
    work, how = job
    found = [on_card(model, work, replace(how, quant=quant)) for quant in ("nf4", "int8", "none")]
    for less, more in pairwise(found):
        assert more.load_bytes >= less.load_bytes
    assert found[2].allocated_peak_bytes >= found[0].allocated_peak_bytes


@quick
@given(models, training())
def test_more_bits_never_load_less_to_train(model: str, job: tuple[Workload, Strategy]) -> None:
    work, how = replace(job[0], method="lora"), replace(job[1], dtype="bf16", upcast_frozen=False)
    found = [on_card(model, work, replace(how, quant=quant)) for quant in ("nf4", "int8", "none")]
    assert found[0].load_bytes <= found[1].load_bytes <= found[2].load_bytes
    wide = on_card(model, work, replace(how, quant="none", dtype="fp32"))
    assert wide.load_bytes > 1.9 * found[2].load_bytes or architecture_of(load_model(model)).towers


@quick
@given(models, training())
def test_checkpointing_never_needs_more_than_two_hidden_states_more(
    model: str, job: tuple[Workload, Strategy]
) -> None:
    # The layer's input and the gradient of its output stand beside what recomputation brings back. In passes
    # of a few tokens the first layer peaks, which keeps less where nothing asks the embeddings for a
    # gradient, as checkpointing does: not compared here, nor layers without a single adapter.
    work, how = replace(job[0], seq_len=max(64, job[0].seq_len), lora_targets="all-linear"), job[1]
    on, off = (on_card(model, work, replace(how, gradient_checkpointing=state)) for state in (True, False))
    width = 4 if how.dtype == "fp32" or (how.upcast_frozen and how.quant != "none") else 2
    hidden = work.seq_len * work.batch_size * architecture_of(load_model(model)).hidden_size * width
    assert on.allocated_peak_bytes <= off.allocated_peak_bytes + 2 * (hidden + 512)


@quick
@given(models, training())
def test_fused_loss_never_needs_more_where_the_head_is_frozen(
    model: str, job: tuple[Workload, Strategy]
) -> None:
    # one chunk alone saves nothing, and logits are capped in float32 there
    work = replace(job[0], method="lora", seq_len=max(1024, job[0].seq_len))
    fused, full = (on_card(model, work, replace(job[1], loss=loss)) for loss in ("fused", "full"))
    # the hidden states are cut out of a copy, which a single chunk cannot make up for
    copies = 3 * 4 * work.seq_len * work.batch_size * architecture_of(load_model(model)).hidden_size
    assert fused.allocated_peak_bytes <= full.allocated_peak_bytes + copies


@quick
@given(models, training())
def test_eager_attention_never_needs_less_than_sdpa(model: str, job: tuple[Workload, Strategy]) -> None:
    # a short sequence has fewer scores than sdpa keeps copies of queries and keys
    work, how = replace(job[0], seq_len=max(512, job[0].seq_len)), job[1]
    eager, sdpa = (on_card(model, work, replace(how, attention=name)) for name in ("eager", "sdpa"))
    assert eager.allocated_peak_bytes >= sdpa.allocated_peak_bytes


@quick
@given(models, jobs, st.integers(1, 200), st.integers(1, 200))
def test_more_memory_never_makes_a_verdict_worse(
    model: str, job: tuple[Workload, Strategy], gib: int, more: int
) -> None:
    def verdict(n: int) -> int:
        cards = machine_from_gpus([(load_gpu("rtx-3090"), 1)], vram_bytes=n * 2**30)
        found: Estimate = estimate(load_model(model), cards, *job)
        return VERDICTS.index(found.verdict)

    assert verdict(gib + more) >= verdict(gib)


@quick
@given(models, jobs, st.integers(4, 80), st.sampled_from(("mixed_offload", "disk_offload")))
def test_offloading_never_needs_more_than_keeping_everything(
    model: str, job: tuple[Workload, Strategy], gib: int, placement: str
) -> None:
    cards = machine_from_gpus([(load_gpu("rtx-3090"), 1)], vram_bytes=gib * 2**30)
    whole = estimate(load_model(model), cards, *job)
    work, how = job[0], replace(job[1], placement=placement)
    away = estimate(load_model(model), cards, work, how)
    assert VERDICTS.index(away.verdict) >= VERDICTS.index(whole.verdict)
    layers = away.placement
    total = architecture_of(load_model(model)).layers
    assert layers.layers_on_gpu + layers.layers_in_ram + layers.layers_on_disk == total
    if whole.verdict == "fits":
        assert layers.layers_on_gpu == total
