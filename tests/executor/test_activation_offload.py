"""Checkpoints in host memory: gradients are those of a run without, in both ways of checkpointing."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from conftest import digest, make_plan, strategy
from streaming_models import LAYERS, request, write_model
from torch.multiprocessing.reductions import StorageWeakRef

from executor import activation_offload
from executor.activation_offload import CheckpointPool, offloading
from executor.cli import main
from executor.engines import resident, stream
from executor.errors import CannotHonour
from executor.streaming.link import PlainLink
from executor.train import keep_unpacked
from planner.exact.adapters import add_adapters
from planner.types import Workload

pytestmark = pytest.mark.executor
CPU = torch.device("cpu")
MOVED = LAYERS - activation_offload.IN_FLIGHT


def train(engine: Any, asked: Any, reentrant: bool, away: bool) -> tuple[list[torch.Tensor], int]:
    """Losses and accumulated gradients of three micro-batches, the second longer and the third longer than
    planned for, and an evaluation in between; bytes that left."""
    loaded = engine.load(asked)
    torch.manual_seed(0)
    keep_unpacked(loaded.model)
    model = add_adapters(loaded.model, asked.workload, asked.candidate.strategy).train()
    model.config.use_cache = False
    draws = torch.Generator().manual_seed(4)
    seen = []
    there: Any = offloading(model.get_base_model(), 2 * 12, CPU) if away else nullcontext()
    with there as pool:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        for length in (8, 12, 15):
            ids = torch.randint(0, 300, (2, length), generator=draws)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            seen.append(loss.detach().clone())
            with torch.no_grad():
                seen.append(model.eval()(input_ids=ids).logits)
            model.train()
        moved = pool.bytes_moved if away else 0
    funcs = [layer._gradient_checkpointing_func for layer in model.get_base_model().model.layers]
    assert not any(isinstance(func, activation_offload._Offloaded) for func in funcs)
    loaded.close()
    return [*seen, *(p.grad.clone() for p in model.parameters() if p.grad is not None)], moved


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("engine", "kept"), [(resident, None), (stream, 2)], ids=["resident", "stream"])
def test_equal_to_checkpoints_on_the_device(
    tmp_path: Path, engine: Any, kept: int | None, reentrant: bool
) -> None:
    asked = request(write_model(tmp_path, "llama"), "nf4", kept, task="train")
    want, _ = train(engine, asked, reentrant, away=False)
    got, moved = train(engine, asked, reentrant, away=True)
    assert len(got) == len(want) > 6
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    # one hidden state a layer, but for those that backward begins with
    assert moved == MOVED * 2 * (8 + 12 + 15) * 64 * 2


class LateLink(PlainLink):
    """Makes a copy when its end is waited for, and not before: as late as a card may."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self._late: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def send(self, slab: torch.Tensor, buffer: torch.Tensor, slot: int) -> None:
        self._late[slot] = (slab, buffer)

    def wait_for(self, slot: int) -> None:
        if slot in self._late:
            super().send(*self._late.pop(slot), slot)


@pytest.mark.parametrize("reentrant", [False, True])
def test_everything_read_was_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    """Of the way there before the way back begins, and of the way back before the layer runs."""
    asked = request(write_model(tmp_path, "llama"), task="train")
    want, _ = train(resident, asked, reentrant, away=False)
    monkeypatch.setattr(activation_offload, "open_link", LateLink)
    got, moved = train(resident, asked, reentrant, away=True)
    assert moved == MOVED * 2 * (8 + 12 + 15) * 64 * 2
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_more_than_two_are_on_the_device_at_once() -> None:
    """References are what keeps memory; each goes when its copy is ordered before what follows."""
    pool = CheckpointPool(6, 4, CPU)
    inputs = [torch.full((1, 4, 3), float(n)) for n in range(6)]
    pool.begin()
    kept = []
    for number, tensor in enumerate(inputs):
        kept.append(pool.put(number, tensor))
        assert list(pool._leaving) == [n for n in (number - 1, number) if 0 <= n < 4]
    assert [checkpoint.tensor is None for checkpoint in kept] == [True] * 4 + [False] * 2
    for number in reversed(range(6)):
        assert torch.equal(pool.take(kept[number]), inputs[number])
        assert list(pool._arriving) == ([number - 1] if 0 < number < 5 else [])
    pool.close()


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_was_copied_leaves_the_device(tmp_path: Path, reentrant: bool) -> None:
    """After forward only the last inputs are alive, whichever hooks wait for backward."""
    model = resident.load(request(write_model(tmp_path, "llama"), "none", None)).model.train()
    model.config.use_cache = False
    alive = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, inputs: alive.append(StorageWeakRef(inputs[0].untyped_storage()))
        )
    ids = torch.zeros(1, 16, dtype=torch.long)
    with offloading(model, 16, CPU):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        loss = model(input_ids=ids, labels=ids).loss
        there = [not storage.expired() for storage in alive]
        loss.backward()
    assert there == [False] * MOVED + [True] * activation_offload.IN_FLIGHT


def test_the_pool_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    pool = CheckpointPool(5, 64, CPU)
    take = pool._arena.take
    monkeypatch.setattr(pool._arena, "take", lambda size: (taken.append(size), take(size))[1])
    for length in (3, 64, 5):
        pool.begin()
        for number in range(5):
            pool.put(number, torch.zeros(1, length, 8, dtype=torch.bfloat16))
    assert taken == [3 * 64 * 8 * 2]


def test_backward_after_another_forward_is_an_error_and_not_a_wrong_gradient() -> None:
    pool = CheckpointPool(4, 4, CPU)
    pool.begin()
    old = pool.put(0, torch.zeros(1, 4, 3))
    pool.begin()
    with pytest.raises(RuntimeError, match="overwritten"):
        pool.take(old)


def test_too_little_ram_is_said_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.engines.accelerate.available_ram", lambda: 1000)
    pool = CheckpointPool(4, 400, CPU)
    with pytest.raises(CannotHonour, match="the checkpoints take"):
        pool.put(0, torch.zeros(1, 400, 3))


def test_command_line(tmp_path: Path, tiny: Path) -> None:
    """The plan's setting changes where bytes wait and nothing that is learned."""
    job = Workload(task="train", method="lora", seq_len=64, batch_size=2)
    left = {}
    for away in (False, True):
        plan = make_plan(tmp_path / f"{away}.json", tiny, job, strategy(activation_offload=away))
        folder = tmp_path / f"run-{away}"
        arguments = [plan, "--dataset", tiny / "data.jsonl", "--max-steps", "2", "--output", folder, "--json"]
        assert main(["run", *map(str, arguments)]) == 0
        report = json.loads((folder / "report.json").read_text())
        left[away] = (report["losses"], digest(folder / "adapter" / "adapter_model.safetensors"))
        assert not [note for note in report["notes"] if "checkpoint" in note]
    assert left[True] == left[False]
