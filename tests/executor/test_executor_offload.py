"""Offloading through accelerate: the same text as without it, what it leaves behind, and its refusals.

Without a card device 0 is the CPU, and accelerate's hooks do there what they do on a card.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")

import torch
from conftest import STACK, make_plan, strategy

from executor.cli import main
from executor.engines import LoadRequest, accelerate, resident
from executor.engines.offload_hooks import offloading
from executor.errors import CannotHonour
from executor.source import ModelSource
from executor.tiny import write_tiny_model
from planner.placement import Split, offload_map, one_device
from planner.plan import digest_of, read_plan, write_plan
from planner.types import Candidate, DiskEstimate, Estimate, HostEstimate, ModelRef, Speed, Strategy, Workload
from profiles.architecture import architecture

pytestmark = pytest.mark.executor
CPU = torch.device("cpu")
KINDS = ("qwen2", "gemma2", "gpt2", "mixtral")
JOB = Workload(task="infer", prompt_tokens=16, new_tokens=6)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kinds") / str(request.param)
    write_tiny_model(path, layers=4, hidden=64, kind=request.param)
    return path


def request(
    source: ModelSource, scratch: Path, where: str, split: Split | None, **changes: Any
) -> LoadRequest:
    arch = architecture(source.config)
    placed = one_device("cpu", arch) if split is None else offload_map(arch, split, where)
    kind = "cpu" if split is None else {"cpu": "mixed_offload", "disk": "disk_offload"}[where]
    candidate = Candidate(
        rank=1,
        strategy=Strategy(**{"placement": kind, "engine": "accelerate", "dtype": "fp32", **changes}),
        engine="accelerate",
        device_map=placed.device_map,
        estimate=ESTIMATE,
        speed=Speed(),
    )
    return LoadRequest(source=source, candidate=candidate, workload=JOB, device=CPU, scratch=scratch, seed=3)


ESTIMATE = Estimate(
    model=ModelRef("tiny", 1), stack=STACK, gpus=(), host=HostEstimate(ram_bytes=10**9), disk=DiskEstimate(),
    speed=Speed(), verdict="fits",
)  # fmt: skip


def source(folder: Path, random: bool) -> ModelSource:
    return ModelSource(None if random else folder, json.loads((folder / "config.json").read_text()))


def continued(model: Any) -> list[int]:
    ids = torch.arange(5, 21)[None]
    with torch.inference_mode():
        done = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    return list(done[0, 16:].tolist())


@pytest.mark.parametrize(
    ("random", "where", "split"),
    [
        (False, "cpu", Split(1, 0)),
        (True, "cpu", Split(0, 0, True)),
        (False, "disk", Split(0, 0, True)),
        (True, "disk", Split(1, 0)),
    ],
    ids=["file-ram", "random-ram-all", "file-disk-all", "random-disk"],
)
def test_same_tokens_as_resident(
    tmp_path: Path, folder: Path, random: bool, where: str, split: Split
) -> None:
    origin, scratch = source(folder, random), tmp_path / "partial" / "offload"
    want = continued(resident.load(request(origin, scratch, where, None)).model)
    loaded = accelerate.load(request(origin, scratch, where, split))
    written = {path.name for path in scratch.iterdir()}
    assert continued(loaded.model) == want
    assert (loaded.layers_resident, loaded.layers_streamed) == (split.resident, 4 - split.resident)
    away = [module for module, _ in offloading(loaded.model)]
    assert away and all(p.device.type == "meta" for module in away for p in module.parameters(recurse=False))
    assert bool(written) == (where == "disk" and (random or folder.name == "mixtral"))
    loaded.close()
    assert not scratch.parent.exists()


def test_partly_in_ram_and_partly_on_disk(tmp_path: Path, tiny: Path) -> None:
    origin, scratch = source(tiny, True), tmp_path / "offload"
    want = continued(resident.load(request(origin, scratch, "cpu", None)).model)
    asked = request(origin, scratch, "cpu", Split(1, 0))
    asked.candidate.device_map["model.layers.3"] = "disk"
    loaded = accelerate.load(asked)
    assert {path.name.rsplit(".", 2)[0] for path in scratch.iterdir()} > {"model.layers.3.mlp.down_proj"}
    assert continued(loaded.model) == want and loaded.layers_resident == 1
    loaded.close()


def test_traffic_counts_every_pass(tmp_path: Path, tiny: Path) -> None:
    loaded = accelerate.load(request(source(tiny, False), tmp_path / "o", "cpu", Split(3, 0)))
    layer = sum(p.numel() * 4 for p in loaded.model.model.layers[3].parameters())
    assert loaded.traffic()["bytes_streamed"] == 0
    continued(loaded.model)
    assert loaded.traffic()["bytes_streamed"] == 6 * layer and loaded.traffic()["link_bytes_per_s"] > 0
    loaded.close()


def test_layers_in_ram_are_the_process_s_own(tmp_path: Path, tiny: Path) -> None:
    loaded = accelerate.load(request(source(tiny, False), tmp_path / "o", "cpu", Split(1, 0), dtype="bf16"))
    store = next(hook for _, hook in offloading(loaded.model)).weights_map.dataset
    held = {tensor.data_ptr() for tensor in store.state_dict.values()}
    mapped = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "safetensors" in line
    ]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    assert held and not [at for at in held for low, high in ranges if low <= at < high]
    loaded.close()


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "job", "says"),
    [
        ({"placement": "full_gpu"}, JOB, "offloads layers"),
        ({"quant": "nf4"}, JOB, "unquantized"),
        ({}, Workload(task="train"), "training does not run"),
    ],
)
def test_refusals(tmp_path: Path, tiny: Path, changes: dict[str, str], job: Workload, says: str) -> None:
    from dataclasses import replace

    asked = replace(request(source(tiny, False), tmp_path / "o", "cpu", Split(1, 0), **changes), workload=job)
    with pytest.raises(CannotHonour, match=says):
        accelerate.load(asked)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.layers.9": "cpu"}, "model.layers.9, which this model does not have"),
        ({"model.layers.2": None}, "no place for model.layers.2"),
    ],
)
def test_maps_of_other_models(tmp_path: Path, tiny: Path, change: dict[str, Any], says: str) -> None:
    asked = request(source(tiny, False), tmp_path / "o", "cpu", Split(1, 0))
    asked.candidate.device_map.update(change)
    for name in [name for name, place in change.items() if place is None]:
        del asked.candidate.device_map[name]
    with pytest.raises(CannotHonour, match=says):
        accelerate.load(asked)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_too_little_room(tmp_path: Path, tiny: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(source(tiny, True), tmp_path / "a" / "o", where, Split(1, 0))
    if where == "disk":
        usage = type("Usage", (), {"free": 1000})()
        monkeypatch.setattr(accelerate.shutil, "disk_usage", lambda _: usage)
    else:
        monkeypatch.setattr(accelerate, "available_ram", lambda: 1000)
    with pytest.raises(CannotHonour, match=r"kept (on disk|in RAM) take .* 1000 B (free|are available)"):
        accelerate.load(asked)
    assert not (tmp_path / "a").exists()


# --------------------------------------------------------------------------- whole runs


def offload_plan(folder: Path, model: Path, where: str, **facts: Any) -> Path:
    placement = {"cpu": "mixed_offload", "disk": "disk_offload"}[where]
    how = strategy(placement=placement, engine="accelerate", dtype="fp32")
    path = make_plan(folder / "plan.json", model, JOB, how, **facts)
    plan = read_plan(path)
    arch = architecture(plan.model.config)
    device_map = offload_map(arch, Split(1, 0), where).device_map
    candidate = msgspec.structs.replace(plan.candidates[0], device_map=device_map)
    plan = msgspec.structs.replace(plan, candidates=(candidate,), digest="")
    write_plan(msgspec.structs.replace(plan, digest=digest_of(msgspec.to_builtins(plan))), path)
    return path


@pytest.fixture
def no_card_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("attempt", "run"):
        monkeypatch.setattr(f"executor.{where}.choose_device", lambda _: CPU)


@pytest.mark.usefixtures("no_card_needed")
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_run_reports_and_cleans_up(tmp_path: Path, tiny: Path, where: str, capsys: Any) -> None:
    plan, same = offload_plan(tmp_path, tiny, where), tmp_path / "same"
    same.mkdir()
    reference = make_plan(same / "plan.json", tiny, JOB, strategy(dtype="fp32"))
    prompt = ("--prompt", "one two three", "--greedy")
    assert main(["run", str(reference), *prompt, "--output", str(tmp_path / "r")]) == 0
    capsys.readouterr()
    assert main(["run", str(plan), *prompt, "--output", str(tmp_path / "o"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["engine"], report["layers_resident"], report["layers_streamed"]) == ("accelerate", 1, 3)
    assert report["host_peak_bytes"] > 0 and report["bytes_streamed"] > 0
    assert (tmp_path / "o/outputs.jsonl").read_text() == (tmp_path / "r/outputs.jsonl").read_text()
    assert not (tmp_path / "o" / ".partial").exists()


@pytest.mark.usefixtures("no_card_needed")
def test_folder_is_gone_after_an_error(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        assert any((tmp_path / "o/.partial/offload").iterdir())
        raise CannotHonour("no")

    monkeypatch.setattr("executor.attempt.generate", fail)
    plan = offload_plan(tmp_path, tiny, "disk")
    assert main(["rehearse", str(plan), "--output", str(tmp_path / "o")]) == 2
    assert not (tmp_path / "o").exists()


RUN = """
import resource, sys
import torch
import executor.attempt, executor.run
executor.attempt.choose_device = executor.run.choose_device = lambda _: torch.device("cpu")
from executor.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_line(tmp_path: Path, tiny: Path) -> None:
    """A limit on the size of files stands for a disk that fills up while the folder is written."""
    assert resource.RLIM_INFINITY in resource.getrlimit(resource.RLIMIT_FSIZE)
    plan = offload_plan(tmp_path, tiny, "disk")
    args = [sys.executable, "-c", RUN, "rehearse", str(plan), "--output", str(tmp_path / "o")]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:", "Traceback"))]
    assert lines[0].startswith("error: cannot write the offload folder") and "too large" in lines[0]
    assert len(lines) == 2 and lines[1].startswith("hint:")
    assert not (tmp_path / "o").exists()


@pytest.mark.usefixtures("no_card_needed")
def test_an_unwritable_folder_is_one_line(tmp_path: Path, tiny: Path, capsys: Any, monkeypatch: Any) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        if self.name == "offload":
            raise PermissionError(13, "Permission denied")
        original(self, *_, **__)

    original = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", refuse)
    plan = offload_plan(tmp_path, tiny, "disk")
    assert main(["rehearse", str(plan), "--output", str(tmp_path / "o")]) == 2
    assert "cannot make the offload folder" in (said := capsys.readouterr().err) and "Permission" in said
    assert "Traceback" not in said


def test_weights_read_past_their_module_are_one_line(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    def forward(self: Any, x: Any) -> Any:
        return x * self.down_proj.weight[:, 0]

    monkeypatch.setattr(Qwen2MLP, "forward", forward)
    with pytest.raises(CannotHonour, match="reads weights past their modules"):
        accelerate.load(request(source(tiny, True), tmp_path / "a" / "o", "disk", Split(1, 0)))
    assert not (tmp_path / "a").exists()
