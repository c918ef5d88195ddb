"""Layers on disk: the bits of a resident model, and errors in one line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")

import torch
from conftest import make_plan, strategy
from streaming_models import logits, request, write_model
from test_streaming_slab_file import asked as packing
from test_streaming_slab_file import flip, found
from test_streaming_training import same, train

from executor.cli import main
from executor.engines import LoadRequest, resident, stream
from executor.errors import BadWeights, CannotHonour
from executor.streaming.direct_io import DirectFile
from executor.streaming.slab_file import SlabFile
from planner.plan import digest_of, read_plan, write_plan
from planner.types import Workload

pytestmark = pytest.mark.executor


PLACES: dict[str, int | str] = {
    f"model.layers.{i}": place for i, place in enumerate(("disk", "cpu", 0, "disk", "disk"))
}


def disk_request(
    source: Any, scratch: Path, quant: str = "none", kept: int | None = None, **job: Any
) -> LoadRequest:
    """With one layer that stays, one in RAM and three on disk; or `kept` layers that stay."""
    asked = request(source, quant, kept, placement="disk_offload", **job)
    candidate = msgspec.structs.replace(asked.candidate, device_map=PLACES)
    return dataclasses.replace(asked, candidate=candidate, scratch=scratch)


@pytest.fixture(autouse=True)
def two_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.streaming.streamer.RING_BUFFERS", 2)


@pytest.mark.parametrize(
    ("kind", "quant", "kept"), [("llama", "none", None), ("gemma2", "nf4", 0), ("deepseek_v3", "nf4", None)]
)
def test_logits_equal_resident(tmp_path: Path, kind: str, quant: str, kept: int | None) -> None:
    source = write_model(tmp_path / "model", kind)
    want = logits(resident.load(request(source, quant)).model)
    loaded = stream.load(disk_request(source, tmp_path / "run" / "offload", quant, kept))
    on_disk = 3 if kept is None else 4
    assert (loaded.layers_on_disk, loaded.layers_streamed) == (on_disk, on_disk + 1)
    for _ in range(2):
        assert torch.equal(logits(loaded.model), want)
    traffic = loaded.traffic()
    assert traffic["disk_bytes_read"] > 8 * traffic["bytes_streamed"] / 20 and traffic["disk_bytes_per_s"] > 0
    loaded.close()
    assert not (tmp_path / "run").exists(), "the file of the layers is gone, and its folder"


@pytest.mark.parametrize(("quant", "mode"), [("none", "none"), ("nf4", "none"), ("nf4", "non-reentrant")])
def test_gradients_equal_resident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str, mode: str
) -> None:
    source = write_model(tmp_path / "model", "llama")
    want = train(resident, source, quant, mode)
    monkeypatch.setattr(
        "test_streaming_training.request",
        lambda s, q, k, task: disk_request(s, tmp_path / "o", q, k, task=task),
    )
    assert same(train(stream, source, quant, mode), want)


def test_a_layer_that_cannot_be_read_is_never_computed_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in this pass, and not in one that is tried after it."""
    source = write_model(tmp_path / "model", "llama")
    loaded = stream.load(disk_request(source, tmp_path / "offload"))
    logits(loaded.model)
    monkeypatch.setattr(DirectFile, "read", lambda *_: 0)
    for _ in range(2):
        with pytest.raises(BadWeights, match="cannot read streamed layers"):
            for _ in range(3):
                logits(loaded.model)
    loaded.close()


def test_too_small_a_disk_is_said_before_it_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "model", "llama")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 200_000}))
    with pytest.raises(CannotHonour, match=r"kept on disk take .* free"):
        stream.load(disk_request(source, tmp_path / "run" / "offload"))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = write_model(tmp_path / "model", "llama")
    monkeypatch.setattr(DirectFile, "write", full)
    with pytest.raises(CannotHonour, match="No space left"):
        stream.load(disk_request(source, tmp_path / "offload"))


def test_ram_is_needed_for_what_stays_in_it_and_for_the_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of different sizes are counted each for itself: the first of this model has no experts."""
    said = []
    monkeypatch.setattr("executor.streaming.room.require_room", said.append)
    source = write_model(tmp_path / "model", "deepseek_v3")
    loaded = stream.load(request(source))
    sizes = [layer.layout.nbytes for layer in streamer_of(loaded).layers]
    loaded.close()
    assert len(set(sizes)) == 2 and len(said) == 2
    assert abs(said[0] - sum(sizes)) < 0.05 * sum(sizes) and said[1] == sum(sizes[1:])
    said.clear()
    stream.load(disk_request(source, tmp_path / "offload")).close()
    assert said[-1] == sizes[1] + 3 * max(sizes), "one layer in RAM, and three buffers for those on disk"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path, layer: flip(path, layer.offset + 70), "bytes of layer 4 are not what was written"),
        (
            lambda path, layer: os.truncate(path, layer.offset),
            "cannot read streamed layers .* it ends at byte",
        ),
    ],
)
def test_a_slab_file_is_read_in_place_and_checked_as_it_is_read(tmp_path: Path, harm: Any, said: str) -> None:
    source = write_model(tmp_path / "model", "llama")
    stream.load(packing(source, "nf4")).close()
    want = logits(resident.load(request(source, "nf4")).model)
    asked = disk_request(source, tmp_path / "offload", "nf4")
    loaded = stream.load(asked)
    assert loaded.layers_on_disk == 3 and not asked.scratch.exists(), "nothing was written a second time"
    for _ in range(2):
        assert torch.equal(logits(loaded.model), want)
    loaded.close()
    path = found(tmp_path / "model")
    loaded = stream.load(asked)
    harm(path, SlabFile.open(path).layers[4])
    with pytest.raises(BadWeights, match=said):
        logits(loaded.model)
    loaded.close()


def test_command_line(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report says how many layers were on disk and how fast they came; a disk that breaks ends the run in
    one line."""
    plan = read_plan(
        make_plan(tmp_path / "plan.json", tiny, Workload(prompt_tokens=8, new_tokens=4), strategy())
    )
    places = {"model.layers.0": "cpu", **{f"model.layers.{i}": "disk" for i in (1, 2, 3)}}
    candidates = (msgspec.structs.replace(plan.candidates[0], device_map=places),)
    plan = msgspec.structs.replace(plan, candidates=candidates, digest="")
    write_plan(
        msgspec.structs.replace(plan, digest=digest_of(msgspec.to_builtins(plan))), tmp_path / "plan.json"
    )
    shared = [tmp_path / "plan.json", "--prompt", "hello", "--greedy", "--engine", "stream", "--output"]
    assert main(["run", *map(str, shared), str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"4 of 4 layers streamed, .* in all at .*/s; 3 of them from disk at .*/s", said)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["layers_streamed"], report["layers_on_disk"]) == (4, 3)
    assert report["disk_bytes_read"] > 0 and report["disk_bytes_per_s"] > 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"report.json", "outputs.jsonl"}
    assert not list((tmp_path / "run").rglob("*.slab"))

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(DirectFile, "read", broken)
    assert main(["run", *map(str, shared), str(tmp_path / "broken")]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert line.startswith("error: cannot read streamed layers from ") and line.endswith("Input/output error")
    assert not (tmp_path / "broken" / "outputs.jsonl").exists() and not list(tmp_path.rglob("*.slab"))


def streamer_of(loaded: Any) -> Any:
    return loaded.traffic.__self__
