"""`executor pack` as a command: what kills, full disks and edits leave, and what a run makes of it."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from conftest import digest, environment, make_plan, strategy
from safetensors.torch import load_file, save_file

from executor.cli import main
from executor.errors import BadWeights
from executor.streaming import checkpoint_reader
from executor.streaming.slab_file import SlabFile
from executor.streaming.slab_journal import Journal
from executor.streaming.slab_writer import SlabWriter
from planner.types import Workload

pytestmark = pytest.mark.executor
FILE = "fitwright-nf4-bf16.slab"
STRIKES = """
import os, signal, sys
from executor.cli import main
from executor.streaming.slab_journal import Journal
stock, left = Journal.add_block, [int(sys.argv[1])]
def add_block(self, block):
    stock(self, block)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add_block = add_block
sys.exit(main(sys.argv[2:]))
"""
"""Packs, and kills itself after so many blocks."""


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy that may be written to, of the same recipe as all others: copying keeps the time of change."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model packed without trouble."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("whole") / "model"))
    assert main(["pack", str(folder)]) == 0
    return folder / FILE


@pytest.fixture(scope="module")
def killed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose packing was ended by kill -9 after four blocks."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("killed") / "model"))
    command = [sys.executable, "-c", STRIKES, "4", "pack", str(folder)]
    process = subprocess.run(command, capture_output=True, timeout=120, env=environment(), check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    return folder


def goes_on(folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Pack again; the file is to the last byte that of an unbroken packing. Returns the bytes kept."""
    capsys.readouterr()
    assert main(["pack", str(folder), "--json"]) == 0
    assert digest(folder / FILE) == digest(whole)
    assert [path.name for path in folder.glob("*.slab*")] == [FILE]
    return int(json.loads(capsys.readouterr().out)["kept_bytes"])


def error_and_hint(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Of a line each."""
    said = capsys.readouterr().err.splitlines()
    (error,) = (line for line in said if line.startswith("error: "))
    (hint,) = (line for line in said if line.startswith("hint: "))
    return error, hint


def test_a_run_takes_what_was_packed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Workload(task="infer", prompt_tokens=16, new_tokens=8)
    plan = make_plan(tmp_path / "plan.json", model, job, strategy(quant="nf4"))
    texts, notes = [], []
    for packs in (False, True):
        if packs:
            assert main(["pack", str(model), "--json"]) == 0
            report = json.loads(capsys.readouterr().out)
            assert report["bytes"] == (model / FILE).stat().st_size and report["kept_bytes"] == 0
        output = tmp_path / f"run-{packs}"
        arguments = [plan, "--engine", "stream", "--prompt", "What is 2 plus 3?", "--greedy", "--json"]
        assert main(["run", *map(str, arguments), "--output", str(output)]) == 0
        notes.append(json.loads(capsys.readouterr().out)["notes"])
        texts.append((output / "outputs.jsonl").read_text())
    assert texts[0] == texts[1]
    assert [any("loaded from slab file" in note for note in each) for each in notes] == [False, True]


def test_packed_twice_is_packed_once(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = whole.stat()
    assert main(["pack", str(whole.parent)]) == 0
    assert "packed before" in capsys.readouterr().out
    assert (whole.stat().st_ino, whole.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_damaged_file_is_packed_again(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole.parent, tmp_path / "model"))
    shutil.copystat(whole.parent / "model.safetensors", folder / "model.safetensors")
    with open(folder / FILE, "r+b") as file:
        file.seek(SlabFile.open(whole).index.blocks[0].offset + 5)
        file.write(b"\xff\x00\xff")
    assert main(["pack", str(folder)]) == 0
    said = capsys.readouterr()
    assert "is damaged" in said.err and "packing again" in said.err
    SlabFile.open(folder / FILE).check()
    assert digest(folder / FILE) == digest(whole)


def test_kill_and_resume(
    whole: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "model"))
    assert not (folder / FILE).exists() and (folder / f"{FILE}.partial").exists()
    assert 4096 < goes_on(folder, whole, capsys) < whole.stat().st_size


def test_resume_trusts_no_byte(
    whole: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies in the unfinished file is compared with its checksums; from the first difference on it is
    packed again."""
    folder = Path(shutil.copytree(killed, tmp_path / "model"))
    second = sorted(SlabFile.open(whole).index.blocks, key=lambda block: block.offset)[1]
    with open(folder / f"{FILE}.partial", "r+b") as file:
        file.seek(second.offset + 5)
        file.write(b"\xff\x00\xff")
    assert goes_on(folder, whole, capsys) == second.offset


def test_resume_trusts_no_line_of_the_journal(
    whole: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight that goes by another's name, though its bytes are as they were written."""
    folder = Path(shutil.copytree(killed, tmp_path / "model"))
    journal = folder / f"{FILE}.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[-1] = lines[-1].replace(b"gate_proj", b"down_proj", 1)
    assert lines[-1] not in journal.read_bytes()
    journal.write_bytes(b"".join(lines))
    last = sorted(SlabFile.open(whole).index.blocks, key=lambda block: block.offset)[3]
    assert goes_on(folder, whole, capsys) == last.offset


def test_unfinished_file_of_other_weights_is_dropped(
    whole: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "model"))
    os.utime(folder / "model.safetensors")
    assert main(["pack", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_bytes"] == 0


def test_interrupt_keeps_what_is_packed(
    whole: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock, left = Journal.add_block, [3]

    def add_block(self: Journal, block: Any) -> None:
        stock(self, block)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add_block", add_block)
        assert main(["pack", str(model)]) == 130
    error, hint = error_and_hint(capsys)
    assert "interrupted" in error and "goes on" in hint and not (model / FILE).exists()
    assert goes_on(model, whole, capsys) > 4096


def test_disk_full(whole: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The limit on the size of files stands for the end of the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.stat().st_size // 2, before[1]))
    try:
        assert main(["pack", str(model)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error, hint = error_and_hint(capsys)
    assert "cannot write" in error and "packed and kept" in hint and "goes on" in hint
    assert "ulimit -f" in hint, "room on the disk would be no help"
    assert not (model / FILE).exists()
    assert goes_on(model, whole, capsys) > 4096


@pytest.mark.parametrize("size", [1000, 100_000])
def test_disk_full_at_once(model: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    """Nothing is left, and nothing is said to be kept."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        assert main(["pack", str(model)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error, hint = error_and_hint(capsys)
    assert "cannot write" in error and "ulimit -f" in hint and "kept" not in hint
    assert not list(model.glob("*.slab*"))


@pytest.mark.parametrize("by_run", [False, True])
def test_a_folder_in_its_place_costs_no_packing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by_run: bool
) -> None:
    (model / FILE).mkdir()
    plan = make_plan(tmp_path / "plan.json", model, Workload(task="infer"), strategy(quant="nf4"))
    run = ["run", str(plan), "--engine", "stream", "--pack", "--prompt", "x", "--output", str(tmp_path / "o")]
    assert main(run if by_run else ["pack", str(model)]) == 2
    error, hint = error_and_hint(capsys)
    assert f"cannot write {model / FILE}: it is a folder" in error and "move it away" in hint
    assert [path.name for path in model.glob("*.slab*")] == [FILE]


def test_packing_lets_its_threads_work(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would wait for the thread that quantizes; afterwards all is as it was."""
    before, seen = sys.getswitchinterval(), []
    stock = SlabWriter.add

    def add(writer: SlabWriter, *block: Any) -> None:
        seen.append(sys.getswitchinterval())
        stock(writer, *block)

    monkeypatch.setattr(SlabWriter, "add", add)
    assert main(["pack", str(model)]) == 0
    assert seen and max(seen) < before == sys.getswitchinterval()


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.parametrize("engine", [None, "stream", "resident"])
def test_weights_of_another_shape(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str | None, quant: str
) -> None:
    """Named by packing, by streaming without a file, and where nothing streams, quantized or not."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 300}))
    plan = make_plan(tmp_path / "plan.json", model, Workload(task="infer"), strategy(quant=quant))
    run = ["run", str(plan), "--engine", str(engine), "--prompt", "x", "--output", str(tmp_path / "o")]
    assert main(run if engine else ["pack", str(model), "--quant", quant]) == 2
    error, hint = error_and_hint(capsys)
    down, gate = ("256x512", "256x300"), ("512x256", "300x256")  # which comes first is the loader's
    said = [f"has the shape {there} and config.json asks for {asked}" for there, asked in (down, gate)]
    assert any(text in error for text in said) and "another model" in hint
    assert not list(model.glob("*.slab"))


@pytest.mark.parametrize("buffers", [2, 16])
def test_reading_ahead_makes_the_same_file(
    whole: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    buffers: int,
) -> None:
    """As on a card, through buffers smaller than tensors."""
    monkeypatch.setattr(checkpoint_reader, "_maps", lambda _device: False)
    monkeypatch.setattr(checkpoint_reader, "_BUFFERS", buffers)
    monkeypatch.setattr(checkpoint_reader, "STRETCH_BYTES", 8192)
    goes_on(model, whole, capsys)


def test_reading_ahead_in_any_order(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_reader, "_BUFFERS", 3)
    monkeypatch.setattr(checkpoint_reader, "STRETCH_BYTES", 8192)
    want = load_file(model / "model.safetensors")
    names = sorted(want)
    for order in (names[::-1], names[1::2] + names[::2], names[5:]):
        reader = checkpoint_reader.CheckpointReader(model, torch.device("cpu"))
        entries = reader.begin(dict.fromkeys(names), skip={names[3]})
        assert all(torch.equal(entries[name][...], want[name]) for name in order)
        reader.close()


@pytest.mark.parametrize(
    "lacks", [["inv_freq"], [f"layers.0.extra.{i}" for i in range(40)], ["layers.1.a", "layers.2.x"]]
)
def test_reading_ahead_goes_on_past_what_the_model_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: list[str]
) -> None:
    """Few tensors are left for the loader's own thread to read."""
    asked = [f"layers.{layer}.{name}" for layer in range(2, 30) for name in ("w", "y", "z")]
    tensors = {name: torch.full((5000,), number) for number, name in enumerate([*lacks, *asked])}
    save_file(tensors, tmp_path / "model.safetensors")
    stock, by_loader = checkpoint_reader.CheckpointReader._fetch, []

    def fetch(self: Any, part: Any, buffer: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is threading.main_thread():
            by_loader.append(part.name)
        return stock(self, part, buffer)

    monkeypatch.setattr(checkpoint_reader.CheckpointReader, "_fetch", fetch)
    monkeypatch.setattr(checkpoint_reader, "_BUFFERS", 3)
    monkeypatch.setattr(checkpoint_reader, "STRETCH_BYTES", 16384)
    reader = checkpoint_reader.CheckpointReader(tmp_path, torch.device("cpu"))
    entries = reader.begin(dict.fromkeys(tensors), skip=())
    assert all(torch.equal(entries[name][...], tensors[name]) for name in asked)
    reader.close()
    assert len(set(by_loader)) <= 6


def test_checkpoint_cut_while_it_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_reader, "STRETCH_BYTES", 8192)
    names = sorted(load_file(model / "model.safetensors"))
    reader = checkpoint_reader.CheckpointReader(model, torch.device("cpu"))
    os.truncate(model / "model.safetensors", 400_000)
    entries = reader.begin(dict.fromkeys(names), skip=())
    with pytest.raises(BadWeights, match="ends early"):
        for name in names:
            entries[name][...]
    reader.close()


def test_too_little_room_is_said_before(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space = shutil.disk_usage(model)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: space)
    assert main(["pack", str(model)]) == 2
    assert "and" in (said := capsys.readouterr().err) and "1000 B free" in said
    assert not list(model.glob("*.slab*"))


def test_edited_weights_are_packed_again(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(model)]) == 0
    before = digest(model / FILE)
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1  # in place, where no sample is taken
    file.write_bytes(data)
    assert main(["pack", str(model)]) == 0
    assert "is replaced: packed before model.safetensors changed" in capsys.readouterr().err
    assert digest(model / FILE) != before


def test_elsewhere(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs find it, and the model's folder stays as it is."""
    before, target = sorted(model.iterdir()), tmp_path / "other.slab"
    assert main(["pack", str(model), "-o", str(target)]) == 0
    assert sorted(model.iterdir()) == before
    plan = make_plan(tmp_path / "plan.json", model, Workload(task="infer"), strategy(quant="nf4"))
    arguments = [plan, "--engine", "stream", "--prompt", "x", "--max-new-tokens", 1, "--json"]
    capsys.readouterr()
    assert main(["run", *map(str, arguments), "--output", str(tmp_path / "run")]) == 0
    assert any("loaded from slab file" in note for note in json.loads(capsys.readouterr().out)["notes"])


def test_elsewhere_and_nowhere_to_tell_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FITWRIGHT_HOME", str(model / "config.json"))
    assert main(["pack", str(model), "-o", str(tmp_path / "other.slab")]) == 0
    said = capsys.readouterr()
    assert "runs will not find" in said.err and "the next time" not in said.out


def test_no_link_is_written_through(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / f"{FILE}.partial").symlink_to("model.safetensors")
    before = digest(model / "model.safetensors")
    assert main(["pack", str(model)]) == 2
    assert f"cannot write {model / FILE}.partial: " in error_and_hint(capsys)[0]
    assert digest(model / "model.safetensors") == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{model}", "-o", "{model}/config.json"], "is no slab file"),
        (["{model}", "-o", "{model}"], "is no slab file"),
        (["{model}", "-o", "{model}/nowhere/x.slab"], "there is no folder"),
        (["{model}", "-o", "{model}/" + 300 * "x"], "hint: give another -o"),
        (["{model}", "--quant", "int8", "--quant-experts", "nf4"], "goes with --quant nf4"),
        (["./nothing"], "no such file or folder"),
        (["{model}", "--quant", "int3"], "--quant"),
    ],
)
def test_refusals(model: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", *(text.format(model=model) for text in arguments)]) == 2
    assert says in capsys.readouterr().err
    assert not list(model.glob("*.slab*"))


def test_one_packer_at_a_time(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(model / f"{FILE}.partial", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["pack", str(model)]) == 2
    assert "another process is writing" in capsys.readouterr().err


def test_pack_is_for_engine_stream(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(tmp_path / "plan.json", model, Workload(task="infer"), strategy())
    assert main(["run", str(plan), "--prompt", "x", "--pack"]) == 2
    assert "--pack is for engine stream" in capsys.readouterr().err
