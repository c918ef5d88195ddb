"""Gradients of streamed layers are those of a resident model, bit by bit, in every way of checkpointing."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import msgspec
import torch
from streaming_models import request, write_model

from benchmarks.streaming.shuffled import Shuffled
from executor.engines import resident, stream
from executor.errors import CannotHonour
from executor.source import ModelSource
from executor.streaming import linears
from executor.streaming.training import lean
from executor.train import keep_unpacked
from planner.exact.adapters import add_adapters

pytestmark = pytest.mark.executor
MODES = ("none", "reentrant", "non-reentrant")
CASES = [
    ("llama", "none"),
    ("llama", "nf4"),
    ("gemma2", "nf4"),
    ("qwen2", "int8"),
    ("olmoe", "nf4"),
    ("mixtral", "nf4+experts"),
]


def train(
    engine: Any,
    source: ModelSource,
    quant: str,
    mode: str,
    kept: int | None = None,
    variant: str = "lora",
    leanly: bool = False,
) -> list[Any]:
    """Losses, gradients and adapters of two steps with two micro-batches of different lengths, and an
    evaluation between the steps. `leanly`: as the executor trains what streams."""
    asked = request(source, quant, kept, task="train")
    job = msgspec.structs.replace(asked.workload, lora_variant=variant)
    asked = dataclasses.replace(asked, workload=job)
    loaded = engine.load(asked)
    torch.manual_seed(0)
    model = add_adapters(loaded.model, asked.workload, asked.candidate.strategy).train()
    model.config.use_cache = False
    keep_unpacked(model)
    _set_up(model, mode)
    with lean(model) if leanly else nullcontext():
        seen = _two_steps(model)
    loaded.close()
    return seen


def _two_steps(model: Any) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    draws = torch.Generator().manual_seed(4)
    seen: list[torch.Tensor] = []
    for _step in range(2):
        for length in (10, 13):
            ids = torch.randint(0, 300, (2, length), generator=draws)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            seen.append(loss.detach().clone())
        seen += [p.grad.clone() for p in trained if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            seen.append(model.eval()(input_ids=ids).logits)
        model.train()
    return [*seen, *(p.detach().clone() for p in trained)]


def _set_up(model: Any, mode: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)  # with zeros, A has no gradient in the first step
    if mode != "none":
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    if mode == "reentrant":
        model.enable_input_require_grads()


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "quant"), CASES)
def test_equal_to_resident(tmp_path: Path, kind: str, quant: str, mode: str) -> None:
    source = write_model(tmp_path, kind)
    want = train(resident, source, quant, mode)
    for kept in (0, 2):
        for leanly in (True, False):
            got = train(stream, source, quant, mode, kept, leanly=leanly)
            assert same(got, want), f"{kept} resident layers, {'lean' if leanly else 'as peft and torch do'}"


@pytest.mark.parametrize(("quant", "mode"), [("none", "none"), ("nf4", "none"), ("nf4", "non-reentrant")])
@pytest.mark.usefixtures("shuffled")
def test_dora_equals_resident(tmp_path: Path, quant: str, mode: str) -> None:
    """Its magnitudes begin with the norms of all weights, and every pass needs those of the adapted ones.
    (Resident, peft's DoRA over 8 bits does not run on the CPU.)"""
    source = write_model(tmp_path, "llama")
    got, want = (train(e, source, quant, mode, k, "dora") for e, k in ((stream, 1), (resident, None)))
    assert same(got, want)


def test_evaluation_leaves_a_quantized_model_trainable(tmp_path: Path) -> None:
    """The same step has the same gradients after an evaluation, resident too."""
    asked = request(write_model(tmp_path, "llama"), "nf4", None, task="train")
    model = add_adapters(resident.load(asked).model, asked.workload, asked.candidate.strategy)
    keep_unpacked(model)
    _set_up(model, "none")
    ids = torch.arange(20)[None]
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        with torch.no_grad():
            model.eval()(input_ids=ids)
    assert same(*seen)


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.streaming.streamer.Schedule", Shuffled)
    monkeypatch.setattr(stream, "SLOTS", 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "quant"),
    [("llama", "none"), ("llama", "nf4"), ("qwen2", "int8"), ("gpt_oss", "nf4+experts")],
)
@pytest.mark.usefixtures("shuffled")
def test_right_under_any_schedule(tmp_path: Path, kind: str, quant: str, mode: str) -> None:
    """Handles do not rely on a layer coming back to its slot, or being there by chance."""
    source = write_model(tmp_path, kind)
    assert same(train(stream, source, quant, mode, 0, leanly=True), train(resident, source, quant, mode))


@pytest.mark.parametrize(("quant", "mode"), [("nf4", "none"), ("nf4", "non-reentrant"), ("int8", "none")])
@pytest.mark.usefixtures("shuffled")
def test_stock_products_on_reused_slots_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str, mode: str
) -> None:
    """bitsandbytes' own product keeps the slot's memory: the first loss is right, the gradients are not. So
    the tests above see what they are for."""
    monkeypatch.setattr(linears, "adopt", lambda _streamer: None)
    source = write_model(tmp_path, "llama")
    want, got = train(resident, source, quant, mode), train(stream, source, quant, mode, 0)
    assert torch.equal(want[0], got[0]) and not same(want, got)


@pytest.mark.usefixtures("shuffled")
def test_experts_that_acquire_no_layer_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "partial", lambda *_: lambda: None)
    source = write_model(tmp_path, "mixtral")
    want, got = (
        train(engine, source, "nf4+experts", "none", kept) for engine, kept in ((resident, None), (stream, 0))
    )
    assert torch.equal(want[0], got[0]) and not same(want, got)


def test_saved_weights_without_handles_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for what autograd saves: slices of fused experts are views of a slot."""
    monkeypatch.setattr("executor.streaming.saved.SavedWeights._enter", lambda *_: None)
    monkeypatch.setattr("executor.streaming.streamer.Schedule", Shuffled)
    source = write_model(tmp_path, "olmoe")
    want, got = train(resident, source, "none", "none"), train(stream, source, "none", "none", 0)
    assert torch.equal(want[0], got[0]) and not same(want, got)


@pytest.mark.parametrize(("changes", "said"), [({"method": "full"}, "changes them")])
def test_refused_jobs(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    asked = request(write_model(tmp_path, "llama"), task="train")
    job = msgspec.structs.replace(asked.workload, **changes)
    with pytest.raises(CannotHonour, match=said):
        stream.load(dataclasses.replace(asked, workload=job))
