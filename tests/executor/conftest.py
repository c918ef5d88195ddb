"""Tiny models, plans by hand, and the command as users run it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from planner.plan import digest_of, write_plan
from planner.types import (
    Candidate,
    DiskEstimate,
    Estimate,
    HostEstimate,
    Machine,
    ModelRef,
    Plan,
    PlanModel,
    Speed,
    Stack,
    Strategy,
    Workload,
)

if importlib.util.find_spec("torch") is None:
    collect_ignore = [
        f"test_executor_{part}.py"
        for part in (
            "examples",
            "faults",
            "faults_disk",
            "faults_process",
            "infer",
            "infer_graph",
            "ladder",
            "live",
            "losses",
            "merge",
            "parts",
            "process",
            "run",
            "templates",
            "training",
        )
    ]

STACK = Stack("2.11", "5.17", "0.50", "0.21")


def make_plan(
    path: Path, model: Path, workload: Workload, /, *strategies: Strategy, **model_facts: Any
) -> Path:
    """Write a plan with one candidate per strategy; the first has rank 1."""
    config = json.loads((model / "config.json").read_text())
    candidates = tuple(candidate(rank, s) for rank, s in enumerate(strategies, 1))
    facts = {"id": model.name, "parameters": 1, "path": str(model), "config": config, **model_facts}
    plan = Plan(
        model=PlanModel(**facts), stack=STACK, machine=Machine(), workload=workload, candidates=candidates
    )
    write_plan(msgspec.structs.replace(plan, digest=digest_of(msgspec.to_builtins(plan))), path)
    return path


def candidate(rank: int, strategy: Strategy) -> Candidate:
    """A candidate on the CPU, with an estimate that predicts next to nothing."""
    estimate = Estimate(
        model=ModelRef("tiny", 1),
        stack=STACK,
        gpus=(),
        host=HostEstimate(ram_bytes=10**9),
        disk=DiskEstimate(),
        speed=Speed(),
        verdict="fits",
    )
    return Candidate(
        rank=rank,
        strategy=strategy,
        engine=strategy.engine,
        device_map={"": "cpu"},
        estimate=estimate,
        speed=Speed(),
    )


CPU = {"placement": "cpu", "gradient_checkpointing": True}


def strategy(**changes: Any) -> Strategy:
    """A strategy on the CPU."""
    return Strategy(**{**CPU, **changes})


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command: the same number of threads everywhere, since the order of a sum's terms,
    and so the last bits of every result, depends on it. One: two threads wait for each other by spinning, and
    on busy cores a run of seconds takes minutes."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", **changes}


def executor(*args: Any, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "executor", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**env),
        check=False,
    )


def fails(capsys: Any, *arguments: Any) -> str:
    """`executor run` must end with exit code 2, one error line, at most one hint, nothing on stdout."""
    from executor.cli import main

    capsys.readouterr()
    assert main(["run", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert out == "" and "Traceback" not in err
    assert lines[0].startswith("error: ") and len(lines) <= 2 and err.splitlines()[-len(lines) :] == lines
    return "\n".join(lines)


def digest(path: Path) -> str:
    """SHA-256 of a file. Two files are compared through it: pytest explains the difference of two large byte
    strings line by line, for minutes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen2 of four small layers with a byte-level tokenizer and a dataset."""
    from executor.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder, layers=4)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} plus {b}?"},
                {"role": "assistant", "content": f"{a} plus {b} is {a + b}."},
            ]
        }
        for a in range(12)
        for b in range(8)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
