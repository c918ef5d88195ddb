"""The command as a process: exit codes, speed of refusals, kills and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import digest, environment, executor, make_plan, strategy

from planner.types import Workload

pytestmark = pytest.mark.executor
STEPS = 24


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    make_plan(
        folder / "train.json", tiny, Workload(task="train", seq_len=64, batch_size=2), strategy(quant="nf4")
    )
    make_plan(folder / "infer.json", tiny, Workload(task="infer", prompt_tokens=32, new_tokens=8), strategy())
    make_plan(folder / "card.json", tiny, Workload(task="infer"), strategy(placement="full_gpu"))
    text = (folder / "infer.json").read_text()
    (folder / "edited.json").write_text(text.replace('"new_tokens": 8', '"new_tokens": 9'))
    (folder / "cut.json").write_text(text[: len(text) // 2])
    return folder


def training(plans: Path, tiny: Path, output: Path) -> list[str]:
    args = ["run", plans / "train.json", "--dataset", tiny / "data.jsonl", "--max-steps", STEPS, "--seed", 1]
    return [str(a) for a in (*args, "--output", output, "--json")]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "executor", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def wait_for_checkpoint(process: subprocess.Popen[str], output: Path) -> None:
    end = time.monotonic() + 120
    while not list(output.glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


BAD: list[tuple[list[Any], str]] = [
    (["run"], "PLAN"),
    (["run", "missing.json"], "missing.json"),
    (["run", "edited.json", "--prompt", "x"], "changed"),
    (["run", "cut.json", "--prompt", "x"], "JSON"),
    (["run", "infer.json"], "needs a prompt"),
    (["run", "infer.json", "--prompt", "x", "--candidate", "2"], "no candidate 2"),
    (["run", "infer.json", "--prompt", "x", "--engine", "warp"], "--engine"),
    (["run", "infer.json", "--prompt", "x", "--resident-layers", "1"], "--resident-layers"),
    (["run", "infer.json", "--prompt", "x", "--vram-cap", "8GiB"], "--vram-cap"),
    (["run", "infer.json", "--prompt", "x", "--vram-cap", "8"], "8"),
    (["run", "infer.json", "--dataset", "d.jsonl"], "--dataset"),
    (["run", "train.json"], "dataset"),
    (["run", "train.json", "--dataset", "missing.jsonl"], "missing.jsonl"),
    (["run", "train.json", "--dataset", "d.jsonl", "--learning-rate", "nan"], "--learning-rate"),
    (["rehearse", "train.json", "--max-steps", "0"], "--max-steps"),
    (["rehearse", "train.json", "--seed", str(2**32)], "between 0 and 4294967295"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_is_one_line_and_quick(plans: Path, arguments: list[Any], says: str) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "executor", *arguments], capture_output=True, text=True, cwd=plans, check=False
    )
    assert time.monotonic() - began < 2
    assert done.returncode == 2 and done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: ") and says in first
    assert all(line.startswith("hint: ") for line in rest) and len(rest) <= 1
    assert not (plans / "runs").exists()


def test_nothing_heavy_is_imported_for_help_or_refusals(plans: Path) -> None:
    code = (
        "import sys; from executor.cli import main\n"
        "try: main(['run', 'infer.json', '--prompt', 'x', '--output', '/dev/null/x'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=plans, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_card_plan_without_card(plans: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = executor("run", plans / "card.json", "--prompt", "x", "--output", plans / "card-run")
    assert done.returncode == 2 and "no" in done.stderr and "Traceback" not in done.stderr
    assert not (plans / "card-run").exists()


def test_json_is_the_only_thing_on_stdout_and_libraries_are_silent(plans: Path, tmp_path: Path) -> None:
    done = executor(
        "run", plans / "infer.json", "--prompt", "x", "--greedy", "--output", tmp_path / "o", "--json"
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["schema"] == "fitwright.run/1"
    words = {line.split()[0] for line in done.stderr.splitlines()}
    assert words <= {"loading", "generating"}, done.stderr


@pytest.fixture(scope="module")
def whole(plans: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "o"
    done = executor(*training(plans, tiny, output))
    assert done.returncode == 0, done.stderr
    return output


def same_result(a: Path, b: Path) -> None:
    name = "adapter/adapter_model.safetensors"
    assert digest(a / name) == digest(b / name)
    reports = [json.loads((x / "report.json").read_text()) for x in (a, b)]
    assert reports[0]["losses"] == reports[1]["losses"]
    assert 0 < reports[1]["resumed_from_step"] < STEPS == reports[1]["steps"]


def test_kill_loses_nothing_beyond_the_last_checkpoint(
    plans: Path, tiny: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o"
    process = start(training(plans, tiny, output))
    wait_for_checkpoint(process, output)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (output / "report.json").exists()
    # what a kill in the middle of writing a checkpoint leaves must not be taken for one
    (output / ".partial" / "step-23").mkdir(parents=True, exist_ok=True)
    (output / ".partial" / "step-23" / "trainer_state.json").write_text("{")
    done = executor(*training(plans, tiny, output))
    assert done.returncode == 0, done.stderr
    same_result(whole, output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_writes_a_checkpoint_and_exits_130(
    plans: Path, tiny: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "o"
    process = start(training(plans, tiny, output))
    wait_for_checkpoint(process, output)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run ended before the signal arrived")
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    report = json.loads((output / "report.json").read_text())
    assert report["status"] == "interrupted" and (output / f"checkpoint-{report['steps']}").is_dir()
    done = executor(*training(plans, tiny, output))
    assert done.returncode == 0, done.stderr
    same_result(whole, output)
    assert json.loads(done.stdout)["resumed_from_step"] == report["steps"]


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    done = executor("quickstart", "--output", tmp_path / "q", timeout=280)
    assert done.returncode == 0, done.stderr
    assert "predicted" in done.stdout and "Next:" in done.stdout and "Traceback" not in done.stderr
    report = json.loads((tmp_path / "q" / "run" / "report.json").read_text())
    assert report["losses"][-1] < report["losses"][0] and report["workload"]["method"] == "qlora"
    assert (tmp_path / "q" / "run" / "adapter" / "adapter_model.safetensors").exists()
