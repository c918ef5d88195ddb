"""Engine stream's own training on the tape: adapters in one node, layers computed again before backward."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from planner.memory.layer import layer_cost
from planner.memory.lora import is_joined, joined_lora, lora
from planner.memory.shapes import Pass
from planner.memory.tape import Tape, Tensor
from planner.memory.train import IN_FLIGHT, LATE, training_memory, training_pass
from planner.types import Strategy, Workload
from profiles.architecture import architecture
from profiles.catalogue import load_model
from profiles.schema import Linear

MIB = 2**20
WORK = Workload(task="train", method="qlora", seq_len=2048)
T, K, N = 2048, 4096, 1024
SPEC = Linear(name="k_proj", inputs=K, outputs=N)


def one_pass(p: Pass, joined: bool) -> tuple[int, int, int]:
    """Bytes kept for backward beside the input and the output, and the peaks of forward and backward above
    the input."""
    tape = Tape()
    x, base = Tensor(T * K * p.width, needs_grad=True), tape.new(T * N * p.width, True)
    assert is_joined(p, x, base)
    out = (joined_lora if joined else lora)(tape, p, x, base, SPEC, T)
    tape.leave_autocast()
    kept, forward = tape.live - out.bytes, tape.peak
    out.grad = tape.new(out.bytes)
    tape.free(out)
    tape.mark()
    tape.backward(out)
    return kept, forward, tape.peak


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_joined_adapter_keeps_no_copy_of_its_input(quant: str, dropout: float) -> None:
    """With dropout, a mask of a byte an element; the 16-bit copies of A and B and the product of rank r are
    what both keep."""
    p = Pass(
        batch=1, seq=T, train=True, autocast=True, quant=quant, adapters=True, dropout=dropout, joined=True
    )
    ours, pefts = one_pass(p, True), one_pass(p, False)
    small = (K + N + T) * p.rank * p.width
    assert ours[0] == small + (T * K if dropout else 0)
    assert pefts[0] - ours[0] == (T * K * p.width if dropout or quant == "none" else 0)
    assert all(mine <= stock + small for mine, stock in zip(ours, pefts, strict=True))


def streamed(name: str, **changed: object) -> tuple[object, object]:
    """Memory of a training as engine stream runs it and as engine resident does, before any layer leaves."""
    how = replace(Strategy(dtype="bf16", quant="nf4", gradient_checkpointing=True, loss="fused"), **changed)
    arch = architecture(load_model(name).config)
    return tuple(  # type: ignore[return-value]
        training_memory(arch, WORK, replace(how, engine=engine), 32 * MIB)
        for engine in ("stream", "resident")
    )


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "qwen2.5-7b", "gemma-2-9b", "mixtral-8x7b-v0.1", "olmo-2-1124-7b-instruct"]
)
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_streamed_layer_never_takes_more(name: str, quant: str) -> None:
    arch = architecture(load_model(name).config)
    how = Strategy(dtype="bf16", quant=quant, gradient_checkpointing=True)
    p = training_pass(arch, WORK, replace(how, engine="stream"))
    stock = replace(p, joined=False, at_once=False)
    for layer in arch.kinds:
        ours, pefts = (layer_cost(layer, each, arch.hidden_size) for each in (p, stock))
        assert ours.recompute_peak < pefts.recompute_peak and ours.gradients == pefts.gradients


def lines(memory: object, moment: str) -> dict[str, int]:
    shots = [shot for shot in memory.snapshots if shot.moment == moment]  # type: ignore[attr-defined]
    return {item.name: item.bytes for shot in shots[:1] for item in shot.lines}


def test_nothing_is_held_by_int8_products_through_checkpointing() -> None:
    """Forward makes no node whose ctx could hold it."""
    ours, stock = (lines(memory, "forward") for memory in streamed("llama-3.1-8b", quant="int8"))
    assert ours.get("kept by int8 matmuls", 0) == 0 < stock["kept by int8 matmuls"]


def test_checkpoints_leave_when_their_layer_has_run() -> None:
    (ours, stock) = (lines(memory, "forward") for memory in streamed("llama-3.1-8b", activation_offload=True))
    stream = 2048 * 4096 * 2
    assert stock["checkpoints"] == IN_FLIGHT * stream
    assert ours["checkpoints"] == (IN_FLIGHT + LATE) * stream
    assert "autocast copies" not in ours or ours["autocast copies"] == 0 < stock["autocast copies"]


def test_layers_that_share_keys_keep_torchs_checkpointing() -> None:
    arch = architecture(load_model("gemma-3n-e4b-it").config)
    p = training_pass(arch, WORK, Strategy(dtype="bf16", engine="stream", gradient_checkpointing=True))
    assert p.joined and not p.at_once


@pytest.mark.parametrize(
    ("name", "method", "batch", "less"), [("llama-3-70b", "qlora", 4, 0.12), ("qwen2.5-14b", "lora", 4, 0.19)]
)
def test_layers_take_less_by_what_the_changelog_says(name: str, method: str, batch: int, less: float) -> None:
    arch = architecture(load_model(name).config)
    work = Workload(task="train", method=method, seq_len=1024, batch_size=batch)
    how = Strategy(dtype="bf16", quant="nf4" if method == "qlora" else "none", engine="stream")
    p = training_pass(arch, work, how)
    ours, pefts = (
        layer_cost(arch.kinds[0], each, arch.hidden_size).recompute_peak
        for each in (p, replace(p, joined=False, at_once=False))
    )
    assert 1 - ours / pefts == pytest.approx(less, abs=0.005)
