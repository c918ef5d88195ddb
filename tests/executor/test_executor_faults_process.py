"""Faults that need a process: signals, a second run, a disk that fills up, one that is read-only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, make_plan, strategy

from executor import stopping
from executor.cli import main
from planner.types import Workload

pytestmark = pytest.mark.executor
STEPS = 12


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    work = Workload(task="train", seq_len=64, batch_size=2, method="lora")
    return make_plan(tmp_path_factory.mktemp("plans") / "plan.json", tiny, work, strategy())


def arguments(plan: Path, tiny: Path, output: Any) -> list[str]:
    options = ["--dataset", tiny / "data.jsonl", "--max-steps", STEPS, "--save-steps", 2, "--output", output]
    return [str(a) for a in ("run", plan, *options)]


@pytest.fixture(scope="module")
def whole(plan: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run in a process like those of the tests, with as many threads."""
    output = tmp_path_factory.mktemp("whole") / "o"
    command = [sys.executable, "-m", "executor", *arguments(plan, tiny, output)]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    return output


def adapter(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


# --------------------------------------------------------------------------- signals and second runs


def test_a_second_run_is_refused_and_sigterm_while_loading_leaves_nothing(
    plan: Path, tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    mine = arguments(plan, tiny, tmp_path / "o")
    command = [sys.executable, "-m", "executor", *mine]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stderr is not None and process.stderr.readline().startswith("loading")
        assert main(mine) == 2
        assert "another run is working in" in capsys.readouterr().err
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 130 and said.startswith("error: interrupted\n") and "Traceback" not in said
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_the_second_ends(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(stopping.os, "_exit", ended.append)
    before = signal.getsignal(number)
    with stopping.StopRequest() as stop:
        stop.graceful = True
        signal.raise_signal(number)
        assert stop.requested and not ended and "a checkpoint will be written" in capsys.readouterr().err
        signal.raise_signal(number)
        assert ended == [130]
    with stopping.StopRequest(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_what_a_shell_has_a_job_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_twice_ends_at_once_and_the_run_goes_on_later(
    plan: Path, tiny: Path, whole: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "o"
    command = [sys.executable, "-m", "executor", *arguments(plan, tiny, output)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        while not list(output.glob("checkpoint-*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    assert adapter(output) == adapter(whole)


# --------------------------------------------------------------------------- disks


def in_a_namespace(script: str, *values: Any) -> str:
    """Run a shell script that may mount; skipped where the system does not let it."""
    unshare = shutil.which("unshare")
    allowed = unshare and subprocess.run(
        [unshare, "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"], capture_output=True, check=False
    )
    if not allowed or allowed.returncode:
        pytest.skip("no file systems can be mounted here")
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", script, "sh", *map(str, values)],
        capture_output=True,
        text=True,
        env=environment(PYTHON=sys.executable),
        check=False,
    )
    return done.stdout + done.stderr


DISK = """
exec 2>&1
disk=$1; keep=$2; size=$3; shift 3
mkdir "$disk"; mount -t tmpfs -o size=$size tmpfs "$disk"
executor() { "$PYTHON" -m executor "$@"; echo "exit $?"; }
executor "$@" --output "$disk/o"
echo "left: $(ls -A "$disk/o" | tr '\\n' ' ')"
mount -o remount,size=64m tmpfs "$disk"
executor "$@" --output "$disk/o"
cp -r "$disk/o" "$keep"
mount -o remount,ro tmpfs "$disk"
executor "$@" --output "$disk/new"
"""


@pytest.mark.parametrize("checkpoints", [1.5, 2.5])
def test_a_disk_that_fills_up_and_one_that_is_read_only(
    plan: Path, tiny: Path, whole: Path, tmp_path: Path, checkpoints: float
) -> None:
    one = sum(f.stat().st_size for f in (whole / "checkpoint-12").iterdir())
    options = arguments(plan, tiny, "")[:-2]
    size = int(one * checkpoints)
    said = in_a_namespace(DISK, tmp_path / "disk", tmp_path / "kept", size, *options)
    first, _, rest = said.partition("left: ")
    if checkpoints < 2:
        # a second has no room beside the first, which is kept
        assert "error: cannot write" in first and "No space left on device" in first, said
        assert "hint: free some space; the same command goes on from the last checkpoint" in first
        assert "exit 2" in first and rest.startswith(".lock checkpoint-2 run.json"), said
        assert "resuming from step 2 of 12" in rest
    else:
        # a third has none beside two: the oldest goes before it is written
        assert "exit 0" in first, said
    assert "Traceback" not in said and rest.count("exit 0") == 1
    assert adapter(tmp_path / "kept") == adapter(whole)
    report = json.loads((tmp_path / "kept" / "report.json").read_text())
    assert report["steps"] == STEPS and report["status"] == "finished"
    last = rest.splitlines()[-3:]
    assert last[0].startswith("error: cannot write to") and "Read-only file system" in last[0], said
    assert last[2] == "exit 2"


def test_files_are_on_the_disk_before_their_names_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps what was flushed: files, their folder, then the name, then the folder of the name."""
    from executor import files

    done: list[str] = []
    flush, rename = files.flush, os.rename
    monkeypatch.setattr(files, "flush", lambda p: (done.append(f"flush {p.name}"), flush(p)))
    monkeypatch.setattr(files.os, "rename", lambda a, b: (done.append(f"rename {b.name}"), rename(a, b)))
    staging = tmp_path / "run" / ".partial" / "step-1"
    (staging / "inner").mkdir(parents=True)
    (staging / "a").write_text("a")
    (staging / "inner" / "b").write_text("b")
    files.publish_folder(staging, tmp_path / "run" / "checkpoint-1")
    at = done.index("rename checkpoint-1")
    assert set(done[:at]) == {"flush a", "flush inner", "flush b", "flush step-1"}
    assert done[at + 1 :] == ["flush run", "flush .partial"]
