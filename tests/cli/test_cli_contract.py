"""The commands as a shell sees them: exit codes, JSON fields, one-line errors, pipes and signals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

RTX = ["--gpu", "rtx-3090"]
TRAIN = ["--task", "train", "--method", "qlora"]


def planner(*argv: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "planner", *argv],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "80", **env},
    )


def shown_json(*argv: str) -> Any:
    done = planner(*argv, "--json")
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


# --------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["estimate", "qwen2.5-7b", *RTX], 0),
        (["estimate", "qwen2.5-72b", *RTX], 1),
        (["estimate", "qwen2.5-7b", "--vram", "24GiB"], 0),
        (["estimate", "qwen2.5-7b", "--vram", "2GiB"], 1),
        (["check", "qwen2.5-7b", *RTX], 0),
        (["check", "llama-3-70b", "--gpu", "gtx-1060-6gb", "--task", "train"], 0),
        (["check", "llama-3-70b", "--vram", "2GiB", "--task", "train"], 1),
        (["plan", "qwen2.5-7b", *RTX], 0),
        (["plan", "llama-3-70b", "--vram", "2GiB", *TRAIN], 1),
        (["models"], 0),
        (["models", "qwen", *RTX], 0),
        (["models", "no such model"], 0),
        (["gpus", "3090"], 0),
        (["inspect"], 0),
        (["--version"], 0),
        (["--help"], 0),
        (["check", "--help"], 0),
        ([], 2),
        (["sing"], 2),
        (["check"], 2),
        (["check", "qwen9-7b"], 2),
        (["check", "--", "-1"], 2),
        (["check", "\u202e"], 2),
        (["check", "x" * 5000], 2),
        (["check", "qwen2.5-7b", "--gpu", "rtx-9999"], 2),
        (["check", "qwen2.5-7b", "--gpu", "rtx-3090x0"], 2),
        (["check", "qwen2.5-7b", *RTX, "--machine", "m.json"], 2),
        (["check", "qwen2.5-7b", "--machine", "no-such-file.json"], 2),
        (["check", "someone/some-model"], 2),
        (["estimate", "qwen2.5-7b", *RTX, "--seq-len", "4096"], 2),
        (["estimate", "qwen2.5-7b", *RTX, *TRAIN, "--quant", "none"], 2),
        (["plan", "qwen2.5-7b", *RTX, "-o", "/no/such/folder/plan.json"], 2),
    ],
)
def test_exit_codes(argv: list[str], code: int) -> None:
    done = planner(*argv)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if code == 2:
        assert done.stdout == ""
        lines = done.stderr.splitlines()
        assert lines[0].startswith("error: ") and len(lines) <= 2
        assert all(line.startswith("hint: ") for line in lines[1:])
        assert all(line.isprintable() and len(line) < 500 for line in lines)


def test_check_without_a_card_in_sight_exits_0(tmp_path: Path) -> None:
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps({"schema": "fitwright.machine/1"}))
    done = planner("check", "llama-3-70b", "--machine", str(machine))
    assert done.returncode == 0
    assert "no GPU in sight" in done.stdout


# --------------------------------------------------------------------------- JSON


def test_estimate_json_has_the_fields_of_the_contract() -> None:
    got = shown_json("estimate", "qwen2.5-7b", *RTX, *TRAIN)
    assert got["schema"] == "fitwright.estimate/1"
    assert got["model"] == {"id": "qwen2.5-7b", "parameters": 7615616512}
    assert set(got["stack"]) == {"torch", "transformers", "bitsandbytes", "peft"}
    (gpu,) = got["gpus"]
    names = (
        "index budget_bytes budget_basis load_bytes allocated_peak_bytes required_bytes context_bytes "
        "process_bytes low_bytes high_bytes managed_bytes peak_moment components"
    )
    assert set(names.split()) <= set(gpu)
    assert gpu["process_bytes"] == gpu["required_bytes"] + gpu["context_bytes"]
    assert gpu["low_bytes"] <= gpu["process_bytes"] <= gpu["high_bytes"] <= gpu["budget_bytes"]
    assert sum(line["bytes"] for line in gpu["components"]) == gpu["allocated_peak_bytes"]
    assert all(set(line) == {"name", "bytes", "formula", "basis"} for line in gpu["components"])
    assert {line["basis"] for line in gpu["components"]} <= {"counted", "modelled", "measured"}
    assert {"ram_bytes", "pinned_bytes"} <= set(got["host"])
    assert isinstance(got["disk_bytes"], int)
    assert got["disk_bytes"] == sum(line["bytes"] for line in got["disk_components"])
    assert set(got["speed"]["train_tokens_per_s"]) == {"low", "typical", "high"}
    assert got["speed"]["decode_tokens_per_s"] is None
    assert got["verdict"] == "fits" and got["reasons"]


def test_memory_only_has_no_speed() -> None:
    got = shown_json("estimate", "qwen2.5-7b", "--vram", "24GiB")
    assert got["gpus"][0]["budget_bytes"] == 24 * 2**30
    assert got["speed"]["decode_tokens_per_s"] is None and got["speed"]["prefill_tokens_per_s"] is None


def test_cpu_has_no_cards_and_judges_ram() -> None:
    got = shown_json("estimate", "qwen2.5-0.5b", "--placement", "cpu", *RTX, "--ram", "64GiB")
    assert got["gpus"] == [] and got["verdict"] == "fits"
    assert (
        shown_json("estimate", "qwen2.5-7b", "--placement", "cpu", "--ram", "4GiB")["verdict"]
        == "does_not_fit"
    )


def test_reserve_comes_off_the_budget() -> None:
    plain = shown_json("estimate", "qwen2.5-7b", *RTX)["gpus"][0]["budget_bytes"]
    held = shown_json("estimate", "qwen2.5-7b", *RTX, "--reserve", "2GiB")["gpus"][0]["budget_bytes"]
    assert plain - held == 2 * 2**30 - 512 * 2**20


def test_two_cards_have_an_entry_each() -> None:
    assert [gpu["index"] for gpu in shown_json("estimate", "qwen2.5-7b", "--gpu", "rtx-3090x2")["gpus"]] == [
        0,
        1,
    ]


def test_check_json_answers_every_job_on_every_card() -> None:
    got = shown_json("check", "qwen2.5-7b", *RTX, "--gpu", "rtx-4060-8gb")
    assert got["schema"] == "fitwright.check/1"
    assert [target["name"] for target in got["targets"]] == ["rtx-3090", "rtx-4060-8gb"]
    for target in got["targets"]:
        assert [job["job"] for job in target["jobs"]] == ["bf16", "int8", "nf4", "qlora", "lora", "full"]
        assert target["gpus"][0]["power_watts"] > 0
    first = got["targets"][0]["jobs"][0]
    assert (
        first["verdict"] == "fits"
        and first["longest_context_tokens"] > 1280
        and first["largest_batch_size"] > 1
    )
    assert set(got["smallest_cards"]) == {"bf16", "int8", "nf4", "qlora", "lora", "full"}


def test_check_can_be_narrowed() -> None:
    got = shown_json("check", "qwen2.5-7b", *RTX, *TRAIN)
    assert [job["job"] for job in got["targets"][0]["jobs"]] == ["qlora"]
    got = shown_json("check", "qwen2.5-7b", *RTX, "--task", "infer", "--quant", "nf4")
    assert [job["job"] for job in got["targets"][0]["jobs"]] == ["nf4"]


def test_plan_json_is_the_file_and_the_same_every_time(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = planner("plan", "qwen2.5-7b", *RTX, *TRAIN, "-o", str(file), "--json")
    assert done.returncode == 0 and file.read_text() == done.stdout
    plan = json.loads(done.stdout)
    assert plan["schema"] == "fitwright.plan/1" and plan["model"]["repo_id"] == "Qwen/Qwen2.5-7B"
    assert plan["candidates"][0]["rank"] == 1 and plan["rejected"]
    assert done.stdout == planner("plan", "qwen2.5-7b", *RTX, *TRAIN, "--json").stdout
    assert list(tmp_path.iterdir()) == [file]


def test_a_plan_that_does_not_fit_is_written_with_what_would(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert planner("plan", "llama-3-70b", "--vram", "2GiB", *TRAIN, "-o", str(file)).returncode == 1
    plan = json.loads(file.read_text())
    assert plan["candidates"] == [] and any(each["needs"] for each in plan["rejected"])


def test_models_and_gpus_print_arrays_of_facts() -> None:
    models, gpus = shown_json("models"), shown_json("gpus")
    assert {"id", "name", "parameters", "config", "context_tokens"} <= set(models[0])
    assert {"id", "name", "memory_bytes", "bandwidth_bytes_per_s", "power_watts"} <= set(gpus[0])
    assert len({gpu["id"] for gpu in gpus}) == len(gpus)
    assert len({model["id"] for model in models}) == len(models)


def test_models_for_a_card_come_best_first() -> None:
    got = shown_json("models", "--gpu", "rtx-3060-12gb", "--task", "train")
    verdicts = [each["verdict"] for each in got]
    assert verdicts == sorted(verdicts, key=["fits", "tight"].index)
    assert got[0]["parameters"] > got[-1]["parameters"]


def test_inspect_json_is_what_machine_reads(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text(planner("inspect", "--json").stdout)
    assert json.loads(file.read_text())["schema"] == "fitwright.machine/1"
    assert planner("check", "qwen2.5-0.5b", "--machine", str(file)).returncode in (0, 1)


# --------------------------------------------------------------------------- terminal, pipes, signals


def test_results_go_to_stdout_and_notes_to_stderr() -> None:
    done = planner("models", "no such model", "--json")
    assert json.loads(done.stdout) == [] and done.stderr.startswith("note: ")


@pytest.mark.parametrize("columns", [80, 140])
def test_screens_keep_to_the_width_and_are_plain_without_a_terminal(columns: int) -> None:
    for argv in (
        ["check", "qwen2.5-7b", *RTX],
        ["estimate", "qwen2.5-7b", *RTX],
        ["plan", "qwen2.5-7b", *RTX],
    ):
        done = planner(*argv, COLUMNS=str(columns), NO_COLOR="")
        assert "\x1b" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= columns


def test_a_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        f"{sys.executable} -m planner gpus --json | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[\n" and done.stderr == ""


def test_debug_shows_a_traceback() -> None:
    assert "Traceback" in planner("check", "qwen9-7b", "--debug").stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_exits_130() -> None:
    code = (
        "import signal\n"
        "from planner import cli\n"
        "def slow(args): signal.raise_signal(signal.SIGINT)\n"
        "from planner.commands import gpus; gpus.run = slow\n"
        "import sys; sys.exit(cli.main(['gpus']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "interrupted\n"


def test_a_hub_name_without_network_is_refused_within_two_seconds() -> None:
    start = time.monotonic()
    done = planner("check", "someone/some-model", HF_HUB_OFFLINE="0", HF_ENDPOINT="https://fitwright.invalid")
    assert done.returncode == 2 and time.monotonic() - start < 3
