"""Embeddings that stay in host memory: a pass's rows are those of a table on the device, bit by bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file
from streaming_models import LAYERS, logits, request, write_model
from torch import nn

from executor.engines import LoadRequest, resident, stream
from executor.errors import CannotHonour
from executor.streaming.arena import Arena
from executor.streaming.embeddings import HostRows, read_from_host
from planner.exact.adapters import add_adapters

pytestmark = pytest.mark.executor
NAMES = {"gpt2": ("transformer.wte", "transformer.wpe", "lm_head")}
CPU = torch.device("cpu")


def hosted(asked: LoadRequest, *names: str) -> LoadRequest:
    placed = {"": "cpu", **dict.fromkeys(names, "cpu")}
    return dataclasses.replace(asked, candidate=msgspec.structs.replace(asked.candidate, device_map=placed))


@pytest.mark.parametrize("kind", ["llama", "glm4", "gpt2"])
def test_logits_equal_resident(tmp_path: Path, kind: str) -> None:
    """One word has no row of its own to learn (`padding_idx`); gpt2 has positions as well, and is tied: its
    320 words are one block, and so the plain product."""
    source = write_model(tmp_path, kind)
    want = logits(resident.load(request(source)).model)
    for kept in (1, LAYERS):
        names = NAMES.get(kind, ("model.embed_tokens",))
        loaded = stream.load(hosted(request(source, resident=kept), *names))
        assert loaded.outside_on_host == names
        table = loaded.model.get_input_embeddings().weight
        assert table.untyped_storage().nbytes() == 2 and bool(table[0, 0].isnan())
        assert torch.equal(logits(loaded.model), want)
        loaded.close()


@pytest.mark.parametrize("alike", [True, False])
def test_tied_weights_that_are_stored_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alike: bool
) -> None:
    """One block of host memory, and two only if they differ."""
    source = write_model(tmp_path, "gpt2")
    file = source.folder / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    weights["lm_head.weight"][7] += 0 if alike else 1
    save_file(weights, file, {"format": "pt"})
    want = logits(resident.load(request(source)).model)
    stock, taken = Arena.take, []
    monkeypatch.setattr(Arena, "take", lambda self, size: taken.append(size) or stock(self, size))
    loaded = stream.load(hosted(request(source, resident=LAYERS), "transformer.wte", "lm_head"))
    assert torch.equal(logits(loaded.model), want)
    assert taken == [320 * 64 * 2] * (1 if alike else 2)
    loaded.close()


def test_embeddings_share_what_their_rows_go_through(tmp_path: Path) -> None:
    loaded = stream.load(hosted(request(write_model(tmp_path, "gpt2"), resident=LAYERS), *NAMES["gpt2"]))
    base = loaded.model.transformer
    assert base.wte.host_rows._gather is base.wpe.host_rows._gather
    loaded.close()


def test_scaled_embeddings_are_scaled(tmp_path: Path) -> None:
    """Gemma 3's embeddings multiply what they look up."""
    source = write_model(tmp_path, "gemma3_text")
    want = logits(resident.load(request(source)).model)
    loaded = stream.load(hosted(request(source), "model.embed_tokens", "lm_head"))
    assert type(loaded.model.model.embed_tokens).__name__ == "Gemma3TextScaledWordEmbedding"
    assert torch.equal(logits(loaded.model), want)
    loaded.close()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_equal_resident(tmp_path: Path, reentrant: bool) -> None:
    """Checkpointing asks the embeddings' output for a gradient, which goes nowhere."""
    source = write_model(tmp_path, "llama")
    asked = request(source, "nf4", 2, task="train")
    got = [
        gradients(engine.load(each), each, reentrant)
        for engine, each in ((resident, asked), (stream, hosted(asked, "model.embed_tokens")))
    ]
    assert len(got[0]) == len(got[1]) > LAYERS
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


def gradients(loaded: Any, asked: LoadRequest, reentrant: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = add_adapters(loaded.model, asked.workload, asked.candidate.strategy).train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(4))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad is None
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loaded.close()
    return found


def test_rows_of_any_ids(tmp_path: Path) -> None:
    table = torch.randn(11, 3)
    rows = HostRows(table, CPU, Arena(CPU))
    ids = torch.tensor([[[10, 0], [10, 3]]])
    assert torch.equal(rows.of(ids), table[ids])
    assert rows.of(ids[:, :0]).shape == (1, 0, 2, 3)
    with pytest.raises(IndexError):
        rows.of(torch.tensor([11]))


class Selfish(nn.Embedding):
    """Reads its weights past `nn.Embedding`."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


def test_classes_that_read_their_weights_are_refused() -> None:
    module = Selfish(5, 2)
    with pytest.raises(CannotHonour, match="Selfish, which reads its weights itself"):
        read_from_host("words", module, HostRows(module.weight.detach(), CPU, Arena(CPU)))


def test_too_little_ram_is_said_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.engines.accelerate.available_ram", lambda: 30_000)
    asked = hosted(request(write_model(tmp_path, "llama"), resident=LAYERS), "model.embed_tokens")
    with pytest.raises(CannotHonour, match=r"embed_tokens takes 40 KiB of RAM"):
        stream.load(asked)
