"""Slab files: a load from one equals a load without it, and a file that is not right is never used."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from streaming_models import LAYERS, logits, random_source, request, write_model

from executor.engines import LoadRequest, stream
from executor.errors import BadWeights
from executor.source import ModelSource
from executor.streaming.pack import predicted_bytes
from executor.streaming.slab_file import HEADER_BYTES, BlockEntry, SlabFile, pack_header
from executor.streaming.slab_reader import SlabReader

pytestmark = pytest.mark.executor
CASES = [
    ("llama", "none", {}),
    ("qwen2", "nf4", {}),  # tied embeddings
    ("gpt2", "int8", {}),
    ("deepseek_v3", "nf4", {}),  # a persistent buffer, layers of two kinds
    ("mixtral", "nf4", {"quant_experts": "nf4"}),
]


def asked(source: ModelSource, quant: str = "none", kept: int = 2, **changes: Any) -> LoadRequest:
    """A request whose source knows its config, which the size of the file is predicted from."""
    facts = json.loads((source.folder / "config.json").read_text()) if source.folder else source.config
    made = request(dataclasses.replace(source, config=facts), quant, kept, **changes)
    return dataclasses.replace(made, pack=True)


def found(folder: Path) -> Path:
    (path,) = folder.glob("*.slab")
    return path


@pytest.fixture
def packed(tmp_path: Path) -> ModelSource:
    """A model with its slab file."""
    source = write_model(tmp_path / "model", "llama")
    stream.load(asked(source, "nf4")).close()
    return source


@pytest.mark.parametrize(("kind", "quant", "changes"), CASES)
def test_equals_a_load_without(tmp_path: Path, kind: str, quant: str, changes: dict[str, Any]) -> None:
    source = write_model(tmp_path, kind)
    want = logits(stream.load(request(source, quant, 2, **changes)).model)
    job = asked(source, quant, **changes)
    for again in (job, dataclasses.replace(job, pack=False)):
        loaded = stream.load(again)
        assert any("loaded from slab file" in note for note in loaded.notes)
        assert torch.equal(logits(loaded.model), want)
        assert (loaded.layers_resident, loaded.layers_streamed) == (2, LAYERS - 2)
        loaded.close()
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.journal"))
    size, slab = predicted_bytes(job.source, job.candidate.strategy), SlabFile.open(found(tmp_path))
    beside = 8192 * len(slab.others) + 2**16  # each rounded to pages; header and index
    assert size - 4096 <= slab.nbytes <= size + beside, "what is said before is what comes"


def test_the_disk_waits_for_no_large_block_at_first(packed: ModelSource) -> None:
    """Memory of a vocabulary's size takes long to page-lock; it is, while smaller blocks are read."""
    assert packed.folder is not None
    slab, placed = SlabFile.open(found(packed.folder)), []

    def place(block: BlockEntry) -> torch.Tensor:
        placed.append(block.nbytes)
        return torch.empty(block.nbytes, dtype=torch.uint8)

    blocks = SlabReader(slab, slab.index.blocks, place, torch.device("cpu")).wait()
    assert placed == sorted(placed) and len(blocks) == len(slab.index.blocks)


@pytest.mark.parametrize("fails", [False, True])
def test_threads_switch_fast_until_all_is_read(
    packed: ModelSource, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Readers would wait for the thread that builds the model; afterwards all is as it was."""
    before, seen = sys.getswitchinterval(), []
    stock = SlabReader.wait

    def wait(reader: SlabReader) -> Any:
        seen.append(sys.getswitchinterval())
        if fails:
            raise MemoryError
        return stock(reader)

    monkeypatch.setattr(SlabReader, "wait", wait)
    with pytest.raises(MemoryError) if fails else nullcontext():
        stream.load(request(packed, "nf4", 1)).close()
    assert seen[0] < before and sys.getswitchinterval() == before


def test_nothing_of_the_checkpoint_is_read(packed: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor of the checkpoint was read")

    monkeypatch.setattr("transformers.core_model_loading._materialize_copy", read)
    stream.load(request(packed, "nf4", 1)).close()


def test_random_weights_of_one_seed(tmp_path: Path) -> None:
    """As a rehearsal has them; those of another seed are another model's."""
    job = asked(random_source("qwen3"), "nf4", 1)
    want = logits(stream.load(dataclasses.replace(job, pack=False)).model)
    assert torch.equal(logits(stream.load(job).model), want)
    again = stream.load(dataclasses.replace(job, pack=False))
    assert "loaded from slab file" in again.notes[-1] and torch.equal(logits(again.model), want)
    other = stream.load(dataclasses.replace(job, pack=False, seed=4))
    assert "is not used: packed from" in other.notes[-1] and not torch.equal(logits(other.model), want)


def test_outside_weights_go_where_the_plan_has_them(
    packed: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    import msgspec

    from executor.streaming.arena import Arena

    taken, take = [], Arena.take

    def noted(arena: Arena, nbytes: int) -> torch.Tensor:
        taken.append(nbytes)
        return take(arena, nbytes)

    monkeypatch.setattr(Arena, "take", noted)
    job = request(packed, "nf4", 1)
    want = logits(stream.load(job).model)
    layers = list(taken)
    places = {**job.candidate.device_map, "": 0, "model.embed_tokens": "cpu", "lm_head": "cpu"}
    candidate = msgspec.structs.replace(job.candidate, device_map=places)
    loaded = stream.load(dataclasses.replace(job, candidate=candidate))
    assert "loaded from slab file" in loaded.notes[-1]
    assert loaded.outside_on_host == ("model.embed_tokens", "lm_head")
    assert torch.equal(logits(loaded.model), want)
    tables = [weight.numel() * 2 for weight in (loaded.model.get_output_embeddings().weight,) * 2]
    assert sum(taken) - 2 * sum(layers) <= 1.03 * sum(tables), "each table is in memory once"
    loaded.close()


def test_alignment(packed: ModelSource) -> None:
    assert packed.folder is not None
    slab = SlabFile.open(found(packed.folder))
    assert len(slab.layers) == LAYERS and slab.nbytes == slab.path.stat().st_size
    numbers = [n for layer in slab.layers for n in (layer.offset, layer.nbytes)]
    assert all(number % 4096 == 0 for number in (*numbers, slab.nbytes))
    data = slab.path.read_bytes()
    for layer in slab.layers:
        assert layer.layout.nbytes == layer.nbytes
        layer.check(data[layer.offset : layer.offset + layer.nbytes])


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def damage(path: Path, how: str) -> None:
    slab = SlabFile.open(path)
    if how == "truncated":
        os.truncate(path, slab.nbytes - 4096)
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "unfinished":
        with open(path, "r+b") as file:
            file.write(bytes(HEADER_BYTES))
    elif how == "version":
        flip(path, 8)
    elif how == "header":
        flip(path, 17)
    elif how == "index":
        flip(path, slab.nbytes - 4000)
    elif how == "layer":
        flip(path, slab.layers[3].offset + 70)
    else:
        flip(path, slab.others[0].offset + 1)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "is truncated"),
        ("empty", "is no slab file"),
        ("unfinished", "is no slab file, or an unfinished one"),
        ("version", "has version"),
        ("header", "its header is not"),
        ("index", "its index is not"),
        ("layer", "the bytes of layer 3 are not"),
        ("weight", "the bytes of .* are not"),
    ],
)
def test_damage_is_an_error_that_names_the_file(packed: ModelSource, how: str, says: str) -> None:
    assert packed.folder is not None
    path = found(packed.folder)
    damage(path, how)
    with pytest.raises(BadWeights, match=says) as error:
        stream.load(request(packed, "nf4"))
    assert str(path) in str(error.value) and "\n" not in str(error.value) and error.value.hint


def test_damage_seen_before_loading_is_mended_by_packing(packed: ModelSource) -> None:
    assert packed.folder is not None
    damage(found(packed.folder), "truncated")
    loaded = stream.load(asked(packed, "nf4"))
    assert "packed in" in loaded.notes[-2]
    loaded.close()
    stream.load(request(packed, "nf4")).close()


def test_of_another_model(packed: ModelSource, tmp_path: Path) -> None:
    """Same shapes, same names, same sizes: other weights."""
    from safetensors.torch import load_file, save_file

    assert packed.folder is not None
    file = packed.folder / "model.safetensors"
    times = file.stat().st_mtime_ns
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(times, times))
    want = logits(stream.load(request(packed, "nf4")).model)
    loaded = stream.load(request(packed, "nf4"))
    assert "before model.safetensors changed" in loaded.notes[-1]
    found(packed.folder).unlink()
    assert torch.equal(logits(loaded.model), logits(stream.load(request(packed, "nf4")).model))
    assert torch.equal(logits(loaded.model), want)


@pytest.mark.parametrize("text", [b"{}", b'{"recipe": {}, "blocks": [{"layer": "two"}]}', b"\xff{"])
def test_index_of_another_program(tmp_path: Path, text: bytes) -> None:
    """Whole, by its checksums, and yet no index."""
    index = text.ljust(HEADER_BYTES)
    path = tmp_path / "x.slab"
    path.write_bytes(pack_header(index, HEADER_BYTES, 2 * HEADER_BYTES) + index)
    with pytest.raises(BadWeights, match="was written by another program") as caught:
        SlabFile.open(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["time", "dtype", "versions"])
def test_outdated(packed: ModelSource, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed.folder is not None
    if change == "time":  # an edit in place that no sample shows
        os.utime(packed.folder / "model.safetensors")
    elif change == "dtype":
        path = found(packed.folder)
        path.rename(path.with_name(path.name.replace("bf16", "fp16")))
    else:
        monkeypatch.setattr("executor.streaming.recipe.version", lambda name: "9.9.9")
    job = request(packed, "nf4", dtype="fp16" if change == "dtype" else "bf16")
    assert stream.load(job).notes[-1].startswith(f"{found(packed.folder)} is not used: packed ")
