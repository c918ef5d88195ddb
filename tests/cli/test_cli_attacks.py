"""Input made to break the commands: what is no file, closed streams, configs and machines that cannot be."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.files import write_atomically
from profiles.catalogue import load_model

RTX = ["--gpu", "rtx-3090"]
POSIX = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are of POSIX")


def planner(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "planner", *argv],
        capture_output=True,
        text=True,
        timeout=20,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
    )


def refused(*argv: str) -> str:
    """The error line of a command that must end in exit code 2 and nothing else."""
    done = planner(*argv)
    assert done.returncode == 2 and done.stdout == "", done
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ") and len(lines) <= 2 and "defect" not in lines[0], lines
    return lines[0]


def config_file(folder: Path, model: str, **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**load_model(model).config, **changes}))
    return str(path)


# --------------------------------------------------------------------------- files


@POSIX
def test_a_plan_never_takes_the_place_of_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "not a regular file" in refused("plan", "qwen2.5-0.5b", *RTX, "-o", str(pipe))
    assert "directory" in refused("plan", "qwen2.5-0.5b", *RTX, "-o", str(tmp_path))
    assert stat.S_ISFIFO(pipe.stat().st_mode) and list(tmp_path.iterdir()) == [pipe]


@POSIX
def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    for before in (None, b"old"):
        if before is not None:
            target.write_bytes(before)
        elif not link.is_symlink():
            link.symlink_to(target)
        write_atomically(link, b"new")
        assert link.is_symlink() and target.read_bytes() == b"new"
    assert sorted(tmp_path.iterdir()) == [link, target]


def test_a_long_name_of_wide_letters_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("\U0001f600" * 60)
    write_atomically(path, b"plan")
    assert path.read_bytes() == b"plan"


@POSIX
def test_a_machine_that_is_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused("check", "qwen2.5-0.5b", "--machine", str(tmp_path / "pipe"))


@pytest.mark.parametrize("stated", ["x", "8", "12.x", "-1.0", "8.6.1", "\u0663.\u0663", ""])
def test_a_compute_capability_that_cannot_be(tmp_path: Path, stated: str) -> None:
    profile = {
        "id": "card", "name": "card", "vendor": "nvidia", "memory_bytes": 2**34,
        "memory_basis": "nominal", "compute_capability": stated,
    }  # fmt: skip
    gpu = {"index": 0, "profile": profile, "total_bytes": 2**34}
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({"schema": "fitwright.machine/1", "gpus": [gpu]}))
    assert "gpus[0].profile.compute_capability" in refused("check", "qwen2.5-0.5b", "--machine", str(file))
    profile["compute_capability"] = "8.6"
    file.write_text(json.dumps({"schema": "fitwright.machine/1", "gpus": [gpu]}))
    assert planner("check", "qwen2.5-0.5b", "--machine", str(file)).returncode == 0


# --------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("model", "changes", "told"),
    [
        ("gemma-3-12b-it", {"vision_config": {"model_type": "llama"}}, "llama"),
        ("baichuan2-13b-chat", {"hidden_size": 1}, "do not fit together"),
        ("qwen2.5-0.5b", {"hidden_act": "\ud800"}, "hidden_act"),
        ("qwen2.5-0.5b", {"architectures": ["\ud800"]}, "architectures"),
        ("qwen2.5-0.5b", {"text_config": [], "model_type": "gemma3"}, "text_config"),
    ],
)
def test_a_config_that_cannot_be(tmp_path: Path, model: str, changes: dict[str, Any], told: str) -> None:
    assert told in refused("plan", config_file(tmp_path, model, **changes), *RTX)


@pytest.mark.parametrize("task", ["infer", "train"])
def test_a_feed_forward_of_width_one(tmp_path: Path, task: str) -> None:
    config = config_file(tmp_path, "granite-3.3-2b-instruct", intermediate_size=1)
    done = planner("estimate", config, *RTX, "--task", task, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["verdict"] == "fits", done.stderr


# --------------------------------------------------------------------------- extremes


@pytest.mark.parametrize(
    "job", [["--seq-len", "1"], ["--lora-rank", "65536", "--lora-targets", "attention"]], ids=str
)
@pytest.mark.parametrize("layers", [1, 28])
def test_no_component_is_negative(tmp_path: Path, job: list[str], layers: int) -> None:
    config = config_file(tmp_path, "qwen2.5-7b", num_hidden_layers=layers)
    done = planner(
        "estimate", config, "--gpu", "h200", "--task", "train", "--no-gradient-checkpointing", *job, "--json"
    )
    (gpu,) = json.loads(done.stdout)["gpus"]
    assert all(line["bytes"] > 0 for line in gpu["components"]), gpu["components"]
    assert sum(line["bytes"] for line in gpu["components"]) == gpu["allocated_peak_bytes"]


# --------------------------------------------------------------------------- streams


def shell(command: str) -> subprocess.CompletedProcess[str]:
    command = command.replace("planner", f"{sys.executable} -m planner")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=buffered)


@POSIX
@pytest.mark.parametrize("argv", ["check qwen2.5-0.5b", "estimate qwen2.5-0.5b --json", "plan qwen2.5-0.5b"])
def test_a_closed_stdout_is_no_defect(argv: str) -> None:
    done = shell(f"planner {argv} --gpu rtx-3090 >&-")
    assert done.returncode == 0 and "error" not in done.stderr


@POSIX
@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "2>/dev/full"])
def test_an_error_nobody_hears_keeps_its_exit_code(closed: str) -> None:
    if "/dev/full" in closed and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    assert shell(f"planner check no-such-model {closed}").returncode == 2


@POSIX
@pytest.mark.parametrize("argv", ["models", "gpus", "gpus --json"])
def test_a_reader_that_leaves_is_no_verdict(argv: str) -> None:
    done = shell(f"planner {argv} | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout == "141\n" and done.stderr == ""


def test_a_terminal_of_any_width() -> None:
    for columns in ("1", "0", "-5", "abc", "100000000"):
        done = planner("plan", "qwen2.5-0.5b", *RTX, COLUMNS=columns)
        assert done.returncode == 0 and len(done.stdout) < 10**5


@pytest.mark.parametrize(
    ("model", "job"),
    [
        # the peak moves from the prefill, whose wide blocks leave holes, to decode, which leaves none
        ("ernie-4.5-21b-a3b-pt", ["--batch-size", "100", "--quant", "nf4", "--new-tokens", "100 256"]),
        (
            "phi-4-mini-instruct",
            [
                "--task",
                "train",
                "--method",
                "full",
                "--loss",
                "fused",
                "--optimizer",
                "sgd",
                "--batch-size",
                "3 8",
            ],
        ),
    ],
)
def test_more_work_never_seems_to_need_less(model: str, job: list[str]) -> None:
    *fixed, values = job
    found = []
    for value in values.split():
        done = planner("estimate", model, "--gpu", "h200", *fixed, value, "--json")
        (gpu,) = json.loads(done.stdout)["gpus"]
        found.append([gpu[f"{name}_bytes"] for name in ("allocated_peak", "low", "process", "high")])
    assert all(less <= more for less, more in zip(*found, strict=True)), found


@POSIX
@pytest.mark.parametrize("command", ["planner gpus", "planner --help", "executor report", "executor --help"])
def test_a_full_stdout_is_one_line(command: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    done = shell(command.replace("executor", f"{sys.executable} -m executor") + " >/dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "No space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1
