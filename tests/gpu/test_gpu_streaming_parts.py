"""What is no layer, on a real card: the head in blocks, embeddings in RAM, checkpoints in RAM, the loss."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.executor]
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "streaming"))
NAME, LAYERS = "qwen2.5-0.5b", 24
MIB = 2**20


@pytest.fixture(scope="module")
def equality() -> Any:
    """The benchmark's program, whose comparisons these are."""
    import equality

    return equality


def equal(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(bool((a == b).all()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("kept", [0, LAYERS])
def test_logits_of_a_streamed_head_are_those_of_its_blocks(equality: Any, kept: int) -> None:
    from executor.engines import resident, stream

    want = equality.logits(equality.in_blocks(equality.load(resident, NAME, "nf4", None)))
    assert equal(equality.logits(equality.load(stream, NAME, "nf4", kept, equality.OUTSIDE)), want)


@pytest.mark.parametrize("kept", [0, LAYERS])
def test_gradients_of_a_streamed_head_are_those_of_a_resident_one(equality: Any, kept: int) -> None:
    from executor.engines import resident, stream

    how = ("nf4", None, "non-reentrant")
    want = equality.gradients(resident, NAME, *how, fused=True)
    got = equality.gradients(stream, NAME, "nf4", kept, how[2], equality.OUTSIDE, fused=True)
    assert equal(got, want)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("kept", [None, 0], ids=["resident", "stream"])
def test_gradients_with_checkpoints_in_ram(equality: Any, kept: int | None, mode: str) -> None:
    from executor.engines import resident, stream

    engine = resident if kept is None else stream
    want = equality.gradients(engine, NAME, "nf4", kept, mode)
    assert equal(equality.gradients(engine, NAME, "nf4", kept, mode, away=True), want)


def test_the_card_holds_slots_and_norms_only(equality: Any) -> None:
    """The vocabulary, 260 MiB, is once in page-locked RAM and not on the card."""
    import torch

    from executor.engines import stream

    before = torch.cuda.memory_allocated()
    loaded = equality.load(stream, NAME, "nf4", 0, equality.OUTSIDE)
    words = 151_936 * 896 * 2
    held = torch.cuda.memory_allocated() - before
    assert held < 2 * 64 * MIB + 4 * MIB, "two slots of a block's size"
    assert words < loaded.pinned_bytes < words + 24 * 12 * MIB + 17 * MIB
    loaded.close()


def test_loading_has_one_table_on_the_card_at_a_time(equality: Any) -> None:
    """Untied, so that there are two of 260 MiB."""
    import dataclasses

    import torch

    from executor.engines import stream
    from planner.types import Workload

    asked = equality.request(NAME, "nf4", 0, Workload(task="infer"), equality.OUTSIDE)
    source = dataclasses.replace(asked.source, config={**asked.source.config, "tie_word_embeddings": False})
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = stream.load(dataclasses.replace(asked, source=source))
    words = 151_936 * 896 * 2
    assert loaded.pinned_bytes > 2 * words
    assert torch.cuda.max_memory_allocated() - before < 1.2 * words
    loaded.close()


def test_rows_come_in_pieces_and_are_those_of_the_table() -> None:
    import torch

    from executor.streaming.arena import Arena
    from executor.streaming.embeddings import HostRows
    from planner.memory.stream import GATHER_BYTES

    device = torch.device("cuda", 0)
    arena = Arena(device)
    table = arena.take(5000 * 4096 * 2).view(torch.bfloat16).view(5000, 4096).normal_()
    ids = torch.randint(0, 5000, (3, 1500), device=device)
    assert ids.numel() * 4096 * 2 > 2 * GATHER_BYTES
    rows = HostRows(table, device, arena)
    for _ in range(3):
        assert torch.equal(rows.of(ids).cpu(), table[ids.cpu()])
    arena.close()


def step(model: Any, ids: Any) -> int:
    """One forward and backward; the bytes allocated in between."""
    import torch

    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    between = torch.cuda.memory_allocated()
    loss.backward()
    return between


def test_checkpoints_leave_the_card_and_the_host_waits_for_nothing(equality: Any) -> None:
    """All but two hidden states are gone after forward; copying adds no point where the host waits."""
    import torch

    from executor.activation_offload import offloading
    from executor.engines import resident
    from executor.losses import chunked_loss
    from planner.exact.adapters import add_adapters
    from planner.types import Workload

    job = Workload(task="train", method="qlora", lora_dropout=0.0)
    asked = equality.request(NAME, "nf4", None, job)
    model = add_adapters(resident.load(asked).model, job, asked.candidate.strategy).train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 1000, (1, 4096), device="cuda")
    with chunked_loss(model):
        step(model, ids)
        there, waits = watched(model, ids)
        with offloading(model.get_base_model(), ids.numel(), equality.DEVICE) as pool:
            step(model, ids)
            away, waits_away = watched(model, ids)
            one = 4096 * 896 * 2
            assert pool.pinned_bytes == (LAYERS - 2) * one
    assert there - away == pytest.approx((LAYERS - 2) * one, abs=one)
    assert waits_away <= waits


def watched(model: Any, ids: Any) -> tuple[int, int]:
    """Bytes between forward and backward of a step, and how often the host waited."""
    import torch

    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            between = step(model, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return between, sum("synchroniz" in str(each.message) for each in seen)


@pytest.mark.parametrize("tokens", [2048, 8192])
def test_the_loss_takes_what_the_estimate_says(tokens: int) -> None:
    """Llama's head, 128,256 x 4096; the estimate's own moments, without the norm before it."""
    import torch

    from planner.exact import chunked_loss as chunks
    from planner.memory.head import Ending, head_cost
    from planner.memory.shapes import Pass

    words, hidden = 128_256, 4096
    head = torch.nn.Linear(hidden, words, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(
        False
    )
    targets = torch.randint(0, words, (tokens,), device="cuda")
    peaks = []
    for _ in range(2):  # the first allocates the library's workspace
        states = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        base = torch.cuda.memory_allocated() - states.nbytes
        torch.cuda.reset_peak_memory_stats()
        loss = chunks._sum_of_losses(head, head.forward, states, targets, None, {})
        forward = torch.cuda.max_memory_allocated() - base
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        peaks = [forward, torch.cuda.max_memory_allocated() - base]
        del states, loss
    end = Ending(hidden=hidden, vocab=words, norm=None, softcap=False, scale=False)
    cost = head_cost(end, Pass(batch=1, seq=tokens, train=True), True)
    assert peaks == pytest.approx([cost.forward_peak, cost.backward_peak], rel=0.02)
