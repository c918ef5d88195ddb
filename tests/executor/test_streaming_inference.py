"""Engine stream on the CPU: logits of prefill and decode are those of engine resident, bit by bit."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("torch")

import torch
from conftest import make_plan, strategy
from streaming_models import KINDS, LAYERS, logits, random_source, request, write_model

from executor.cli import main
from executor.engines import resident, stream
from executor.errors import BadWeights, CannotHonour
from executor.source import ModelSource
from planner.placement import Tiers, spread_evenly, stream_map
from planner.types import Workload
from profiles.architecture import architecture
from profiles.config import read_config

pytestmark = pytest.mark.executor
QUANTIZED = [("qwen2", "nf4"), ("mixtral", "nf4"), ("gemma2", "int8"), ("gpt_oss", "int8"), ("gpt2", "nf4")]


def compare(source: ModelSource, quant: str, kept: int) -> None:
    want = logits(resident.load(request(source, quant)).model)
    loaded = stream.load(request(source, quant, kept))
    assert (loaded.layers_resident, loaded.layers_streamed) == (kept, LAYERS - kept)
    assert loaded.slots == 2
    assert torch.equal(logits(loaded.model), want)
    assert torch.equal(logits(loaded.model), want), "and from whatever the slots held before"
    loaded.close()


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_equals_resident(tmp_path: Path, kind: str) -> None:
    compare(write_model(tmp_path, kind), "none", 0)


@pytest.mark.parametrize(("kind", "quant"), QUANTIZED)
def test_quantized_equals_resident(tmp_path: Path, kind: str, quant: str) -> None:
    compare(write_model(tmp_path, kind), quant, 2)


def test_rehearsal_makes_the_weights_of_a_resident_one() -> None:
    compare(random_source("qwen3"), "nf4", 1)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_prequantized_checkpoint(tmp_path: Path, quant: str) -> None:
    """Its weights are those that were saved, in either engine, and are quantized by neither."""
    source = write_model(tmp_path / "plain", "llama")
    saved = resident.load(request(source, quant)).model
    saved.save_pretrained(tmp_path / "packed")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "packed" / file).write_bytes((tmp_path / "plain" / file).read_bytes())
    packed = ModelSource(tmp_path / "packed", source.config)
    assert torch.equal(logits(saved), logits(resident.load(request(packed, quant)).model))
    compare(packed, quant, 1)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert architecture(read_config(config)).pretrained_quantization == f"bitsandbytes-{quant}"
    for engine in (resident, stream):
        with pytest.raises(CannotHonour, match=f"stored in {quant}"):
            engine.load(request(packed, "none"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CannotHonour, match="stored in gptq, which nothing here runs"):
        resident.load(request(packed, "nf4"))


def test_copies_are_those_of_the_schedule(tmp_path: Path) -> None:
    """With 3 of 5 layers streamed: the two slots at the start, then one copy a layer and pass, and the copies
    that the next pass begins with."""
    loaded = stream.load(request(write_model(tmp_path, "llama"), "none", 2))
    block = loaded.traffic()["bytes_streamed"] // 2
    with torch.no_grad():
        for number in range(1, 4):
            loaded.model(torch.zeros((1, 4), dtype=torch.long))
            assert loaded.traffic()["bytes_streamed"] == block * (2 + 3 * number)
    assert loaded.traffic()["link_bytes_per_s"] > 0
    loaded.close()


def test_weights_stand_once(tmp_path: Path) -> None:
    """Streamed layers share the slots' memory; residents and what is no layer have their own."""
    loaded = stream.load(request(write_model(tmp_path, "llama"), "none", 1))
    layers = loaded.model.model.layers
    kept = spread_evenly(1, LAYERS)
    slots = {p.untyped_storage().data_ptr() for i in range(LAYERS) if i not in kept
             for p in layers[i].parameters()}  # fmt: skip
    own = {p.untyped_storage().data_ptr() for i in kept for p in layers[i].parameters()}
    assert len(slots) == 2 and len(own) == 9 and not slots & own
    loaded.close()


def test_residents_are_those_of_the_plan(tmp_path: Path) -> None:
    """Without a number on the command line; the map says which, too."""
    arch = architecture(json.loads((write_model(tmp_path, "llama").folder / "config.json").read_text()))
    placed = stream_map(arch, Tiers(2)).device_map
    asked = request(ModelSource(tmp_path, {}), "none", None, placement="mixed_offload")
    candidate = msgspec.structs.replace(asked.candidate, device_map=placed)
    loaded = stream.load(dataclasses.replace(asked, candidate=candidate))
    assert (loaded.layers_resident, loaded.layers_streamed) == (2, 3)
    mlps = [layer.mlp for layer in loaded.model.model.layers]
    memory = [{p.untyped_storage().data_ptr() for p in mlp.parameters()} for mlp in mlps]
    shared = {i for i, places in enumerate(memory) if len(places) == 1}
    assert {f"model.layers.{i}" for i in shared} == {n for n, place in placed.items() if place == "cpu"}
    loaded.close()


def test_all_resident_streams_nothing(tmp_path: Path) -> None:
    loaded = stream.load(request(write_model(tmp_path, "llama"), "none", LAYERS))
    assert (loaded.layers_streamed, loaded.slots, loaded.traffic()) == (0, 0, {})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resident": LAYERS + 1}, "has 5 layers"),
        ({"task": "train", "upcast_frozen": True}, "as they are"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(CannotHonour, match=said):
        stream.load(request(write_model(tmp_path, "llama"), **changes))  # type: ignore[arg-type]


def test_incomplete_checkpoint_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = write_model(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadWeights, match=r"layers\.3\.mlp\.up_proj\.weight"):
        stream.load(request(source))


def test_too_little_ram_is_said_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.engines.accelerate.available_ram", lambda: 100_000)
    with pytest.raises(CannotHonour, match="of RAM and"):
        stream.load(request(write_model(tmp_path, "llama")))


def test_command_line(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same text, and a report that says how it came about."""
    job = Workload(task="infer", prompt_tokens=16, new_tokens=8)
    plan = make_plan(tmp_path / "plan.json", tiny, job, strategy())
    texts = {}
    for engine in ("resident", "stream"):
        folder = tmp_path / engine
        flags = ["--engine", engine, *(["--resident-layers", "1"] if engine == "stream" else [])]
        arguments = [plan, "--prompt", "What is 2 plus 3?", "--greedy", "--output", folder, "--json", *flags]
        assert main(["run", *map(str, arguments)]) == 0
        texts[engine] = (folder / "outputs.jsonl").read_text()
        report = json.loads(capsys.readouterr().out)
    assert texts["stream"] == texts["resident"]
    assert (report["engine"], report["layers_resident"], report["layers_streamed"]) == ("stream", 1, 3)
    assert report["slots"] == 2 and report["bytes_streamed"] > 0 and report["link_bytes_per_s"] > 0
    assert report["error"] == {}, "what was predicted for another engine is no prediction for this one"


def test_a_model_that_is_not_quantized_needs_no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    stream.load(request(random_source("qwen3"), "none", 1)).close()
