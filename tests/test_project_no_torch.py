"""The planner works without the executor's packages and starts with nothing it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = "torch transformers peft accelerate bitsandbytes datasets trl numpy pandas executor"
CHECK = "check qwen2.5-7b --gpu rtx-3090"
ESTIMATE = "estimate qwen2.5-7b --gpu rtx-3090 --json"


def loaded(argv: str) -> set[str]:
    """Top-level modules in `sys.modules` after a command has run in a fresh interpreter."""
    code = (
        "import io, sys; from contextlib import redirect_stdout\n"
        "from planner.cli import main\n"
        "with redirect_stdout(io.StringIO()): main(sys.argv[1:])\n"
        "print(*{name for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv.split()], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("argv", [CHECK, ESTIMATE, "models --gpu rtx-3090 qwen", "gpus", "inspect"])
def test_no_command_loads_heavy_packages(argv: str) -> None:
    assert not loaded(argv) & set(HEAVY.split())


@pytest.mark.parametrize("argv", [ESTIMATE, "gpus --json", "models --json qwen2.5-7b"])
def test_json_needs_neither_rich_nor_network_nor_package_metadata(argv: str) -> None:
    unwanted = {"rich", "huggingface_hub", "psutil", "pynvml", "importlib.metadata", "socket"}
    assert not loaded(argv) & unwanted


def test_the_probe_sees_what_is_loaded() -> None:
    assert {"rich", "planner.commands.check"} <= loaded(CHECK)
