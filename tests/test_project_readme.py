"""README and CI stay true: screens are what the commands print, blocks are what CI runs.

FITWRIGHT_UPDATE=1 rewrites the screens instead of comparing them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from planner.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SCREEN = re.compile(r"```console\n\$ (planner [^\n]*)\n(.*?)```", re.S)
UPDATE = bool(os.environ.get("FITWRIGHT_UPDATE"))


def quick_start_blocks() -> list[str]:
    section = re.search(r"^## Quick start\s*$(.*?)^## ", README.read_text(), re.M | re.S)
    assert section is not None
    return re.findall(r"```(?:bash|sh|console)\n(.*?)```", section[1], re.S)


def commands() -> list[str]:
    return [command for command, _ in SCREEN.findall(README.read_text())]


def screen(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command prints on 80 columns without colour."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    with contextlib.suppress(SystemExit):
        main(shlex.split(command)[1:])
    printed = capsys.readouterr()
    assert printed.err == ""
    return "\n".join(line.rstrip() for line in printed.out.splitlines()) + "\n"


def test_readme_opens_with_a_screen_of_check() -> None:
    assert commands()[0].startswith("planner check ")


@pytest.mark.parametrize("command", commands())
def test_screens_are_real(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = README.read_text()
    shown = next(body for name, body in SCREEN.findall(text) if name == command)
    real = screen(command, capsys, monkeypatch)
    if UPDATE and shown != real:
        README.write_text(text.replace(f"$ {command}\n{shown}```", f"$ {command}\n{real}```"))
        return
    assert shown == real, (
        "run FITWRIGHT_UPDATE=1 pytest tests/test_project_readme.py to bring README up to date"
    )


def test_quick_start_has_two_blocks() -> None:
    setup, work = quick_start_blocks()
    assert "executor quickstart" in setup
    assert "pytest" in work and "ruff" in work and "mypy" in work
    for block in (setup, work):
        assert "-c constraints.txt" in block


def test_ci_runs_the_second_block_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[:2] == ["set -euo pipefail", 'cd "$(dirname "$0")/.."']
    assert lines[2:] == quick_start_blocks()[1].splitlines()


def names(requirements: list[str]) -> set[str]:
    found = {re.split(r"[\s\[;<>=!~]", requirement, maxsplit=1)[0].lower() for requirement in requirements}
    return found - {"fitwright"}


def test_constraints_pin_everything_that_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = names(project["dependencies"]).union(*map(names, project["optional-dependencies"].values()))
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "torch==2.13.0"
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][a-z0-9.]*", line) for line in lines)
    assert wanted <= {line.split("==")[0] for line in lines}
