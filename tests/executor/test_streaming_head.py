"""The output projection in blocks of the vocabulary: logits, losses and gradients are those of the same
blocks on the device, bit by bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")

import torch
from conftest import digest, make_plan, strategy
from streaming_models import KINDS, LAYERS, logits, request, write_model

from executor.cli import main
from executor.engines import LoadRequest, resident, stream
from executor.errors import CannotHonour
from executor.losses import chunked_loss
from executor.source import ModelSource
from executor.streaming.head import BlockedLinear
from executor.train import keep_unpacked
from planner.exact import chunked_loss as chunks
from planner.exact import vocabulary
from planner.exact.adapters import add_adapters
from planner.plan import digest_of, read_plan, write_plan
from planner.types import Workload

pytestmark = pytest.mark.executor
WORDS, BLOCK = 320, 96
"""Four blocks, the last a part of one: more than slots."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 96 words, of which the loss takes 5 tokens at a time."""
    for module in (vocabulary, "executor.streaming.head"):
        name = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{name}.head_block_rows", lambda *_: BLOCK)
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 5 * BLOCK)


def outside(asked: LoadRequest, *names: str) -> LoadRequest:
    """The same request with modules that wait in host memory."""
    placed = {"": "cpu", **dict.fromkeys(names, "cpu")}
    return dataclasses.replace(asked, candidate=msgspec.structs.replace(asked.candidate, device_map=placed))


def in_blocks(model: Any) -> Any:
    """The resident model whose output projection is read in the same blocks."""
    head = model.get_output_embeddings()
    head.vocabulary_blocks = vocabulary.blocks_of(head)
    head.__class__ = BlockedLinear
    return model


BOTH = ("model.embed_tokens", "lm_head")
PLACED = {"llama": ("lm_head",), "glm4": BOTH, "gpt2": ("transformer.wte", "lm_head")}


@pytest.mark.parametrize("kept", [0, LAYERS])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "gpt2", "glm4"])
def test_logits(tmp_path: Path, kind: str, kept: int) -> None:
    """Tied (gemma2, granite, gpt2) and not, with layers that stream beside it and with none."""
    source = write_model(tmp_path, kind)
    plain = resident.load(request(source)).model
    close = logits(plain)
    want = logits(in_blocks(plain))
    torch.testing.assert_close(want, close)
    loaded = stream.load(outside(request(source, resident=kept), *PLACED.get(kind, BOTH)))
    assert (loaded.layers_streamed, loaded.slots) == (LAYERS - kept, 2)
    assert torch.equal(logits(loaded.model), want)
    assert torch.equal(logits(loaded.model), want), "and from whatever the slots held before"
    loaded.close()


def train(loaded: Any, asked: LoadRequest, loss: str) -> list[torch.Tensor]:
    """Losses, gradients and adapters of two steps with two micro-batches, and a held-out loss in between."""
    torch.manual_seed(0)
    keep_unpacked(loaded.model)
    model = add_adapters(loaded.model, asked.workload, asked.candidate.strategy).train()
    model.config.use_cache = False
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.05)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    draws = torch.Generator().manual_seed(4)
    seen: list[torch.Tensor] = []
    for _step in range(2):
        for length in (10, 13):
            ids = torch.randint(0, 300, (2, length), generator=draws)
            seen.append(backward(model, ids, loss))
        seen += [p.grad.clone() for p in trained if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            seen.append(forward(model.eval(), ids, loss))
        model.train()
    loaded.close()
    return [*seen, *(p.detach().clone() for p in trained)]


def forward(model: Any, ids: torch.Tensor, loss: str) -> torch.Tensor:
    labels = ids.clone()
    labels[0, :3] = -100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if loss == "full":
            return model(input_ids=ids, labels=labels).loss
        with chunked_loss(model):
            return model(input_ids=ids, labels=labels).loss


def backward(model: Any, ids: torch.Tensor, loss: str) -> torch.Tensor:
    total = forward(model, ids, loss)
    total.backward()
    return total.detach().clone()


@pytest.mark.parametrize(
    ("kind", "quant", "loss"),
    [("llama", "nf4", "fused"), ("gemma2", "none", "fused"), ("llama", "none", "full")],
)
def test_training(tmp_path: Path, kind: str, quant: str, loss: str) -> None:
    source = write_model(tmp_path, kind)
    asked = request(source, quant, None, task="train")
    held = resident.load(asked)
    if loss == "full":
        in_blocks(held.model)
    want = train(held, asked, loss)
    for kept in (0, LAYERS):
        there = outside(request(source, quant, kept, task="train"), *PLACED.get(kind, BOTH))
        got = train(stream.load(there), there, loss)
        assert len(got) == len(want)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), f"{kept} resident layers"


def test_the_head_is_on_the_device_one_block_a_slot(tmp_path: Path) -> None:
    """Its rows pass through the slots of the layers, and each pass copies them once."""
    source = write_model(tmp_path, "llama")
    plain = stream.load(request(source, resident=LAYERS))
    whole = plain.model.lm_head.weight.numel() * 2
    loaded = stream.load(outside(request(source, resident=LAYERS), "lm_head"))
    assert loaded.model.lm_head.weight.untyped_storage().nbytes() == 2
    ids = torch.zeros((1, 4), dtype=torch.long)
    with torch.no_grad():
        loaded.model(ids)
        before = loaded.traffic()["bytes_streamed"]
        loaded.model(ids)
    assert loaded.traffic()["bytes_streamed"] - before == whole
    loaded.close()


def test_products_of_blocks_are_those_of_the_whole(tmp_path: Path) -> None:
    """Where the library's kernels compute each word alike. Not promised: they may sum in another order for
    another number of words."""
    source: ModelSource = write_model(tmp_path, "llama")
    model = resident.load(request(source)).model
    assert "llama" in KINDS and model.lm_head.out_features == WORDS
    states = torch.randn(2, 7, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model.lm_head(states)
        got = in_blocks(model).lm_head(states)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("kind", "names", "said"),
    [
        ("gemma2", ("lm_head",), "shares its weights"),
        ("gemma2", ("model.embed_tokens",), "shares its weights"),
        ("llama", ("model.norm",), "LlamaRMSNorm"),
        ("llama", ("model.head",), "no such module"),
    ],
)
def test_refusals(tmp_path: Path, kind: str, names: tuple[str, ...], said: str) -> None:
    with pytest.raises(CannotHonour, match=said):
        stream.load(outside(request(write_model(tmp_path, kind)), *names))


def test_ligers_loss_is_refused(tmp_path: Path) -> None:
    asked = request(write_model(tmp_path, "llama"), task="train", kernels="liger")
    with pytest.raises(CannotHonour, match="liger"):
        stream.load(outside(asked, "lm_head"))


def test_command_line(tmp_path: Path, tiny: Path) -> None:
    """A plan that keeps everything in RAM trains the adapter of a resident run, to the byte; the tied table
    stands there once."""
    job = Workload(task="train", method="qlora", seq_len=64)
    plan = make_plan(tmp_path / "plan.json", tiny, job, strategy(quant="nf4", loss="fused"))
    adapters = {}
    for engine in ("resident", "stream"):
        if engine == "stream":
            plan = _in_ram(plan, *BOTH)
        folder = tmp_path / engine
        arguments = [plan, "--dataset", tiny / "data.jsonl", "--max-steps", "3", "--output", folder, "--json"]
        assert main(["run", *map(str, [*arguments, "--engine", engine])]) == 0
        adapters[engine] = digest(folder / "adapter" / "adapter_model.safetensors")
    report = json.loads((tmp_path / "stream" / "report.json").read_text())
    assert adapters["stream"] == adapters["resident"]
    said = "kept in RAM: lm_head, model.embed_tokens; the output projection comes in 4 blocks"
    assert said in report["notes"]


def _in_ram(path: Path, *names: str) -> Path:
    """The plan at `path` with the modules `names` in RAM."""
    plan = read_plan(path)
    first = msgspec.structs.replace(plan.candidates[0], device_map={"": "cpu", **dict.fromkeys(names, "cpu")})
    changed = msgspec.structs.replace(plan, candidates=(first,), digest="")
    write_plan(msgspec.structs.replace(changed, digest=digest_of(msgspec.to_builtins(changed))), path)
    return path
