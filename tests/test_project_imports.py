"""The import arrows: profiles <- planner <- executor; torch and the outside only where allowed."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "trl", "vllm", "numpy"}
OUTSIDE = {
    "pynvml",
    "psutil",
    "huggingface_hub",
    "socket",
    "urllib",
    "http",
    "httpx",
    "requests",
    "subprocess",
    "ctypes",
}
MAY_TOUCH_OUTSIDE = ("planner.inspect", "planner.hub", "planner.exact")
MAY_IMPORT_HEAVY = "planner.exact"
"""The tracer runs real modelling code; it is imported under `estimate --exact` alone."""
FORBIDDEN = {
    "profiles": {"planner", "executor", *HEAVY, *OUTSIDE},
    "planner": {"executor", *HEAVY},
    "executor": set(),
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every module a file names in an import, wherever in the file, with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or "", node.lineno


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("package", ["profiles", "planner"])
def test_arrows(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(package)
        for name, line in imported(path)
        if name.split(".")[0] in FORBIDDEN[package] - (HEAVY if _is_exact(path) else set())
    ]
    assert not wrong


def _is_exact(path: Path) -> bool:
    return dotted(path) == MAY_IMPORT_HEAVY or dotted(path).startswith(MAY_IMPORT_HEAVY + ".")


def test_the_tracer_is_imported_nowhere_but_where_it_is_asked_for() -> None:
    """`planner.exact` imports torch: outside itself it is named in one function of one command."""
    users = [
        (dotted(path), line)
        for path in modules("planner")
        if not _is_exact(path)
        for name, line in imported(path)
        if name == MAY_IMPORT_HEAVY or name.startswith(MAY_IMPORT_HEAVY + ".")
    ]
    assert {name for name, _ in users} == {"planner.commands.estimate"}
    source = (ROOT / "planner/commands/estimate.py").read_text().splitlines()
    assert all(source[line - 1].startswith(" ") for _, line in users)


def test_only_named_modules_of_planner_touch_the_outside() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules("planner")
        if not any(dotted(path) == m or dotted(path).startswith(m + ".") for m in MAY_TOUCH_OUTSIDE)
        for name, line in imported(path)
        if name.split(".")[0] in OUTSIDE
    ]
    assert not wrong


def test_rich_is_imported_by_screens_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules("planner")
        if not dotted(path).startswith("planner.render.")
        for name, line in imported(path)
        if name.split(".")[0] == "rich"
    ]
    assert not wrong


@pytest.mark.parametrize("package", ["profiles", "planner", "executor"])
def test_modules_stay_small(package: str) -> None:
    lines = {dotted(path): len(path.read_text().splitlines()) for path in modules(package)}
    assert {name: n for name, n in lines.items() if n > 400} == {}
    assert statistics.median(lines.values()) < 200


def test_the_finder_sees_what_it_must() -> None:
    """Both directions: an arrow that exists is found, so an empty list of wrong ones means something."""
    found = {name.split(".")[0] for path in modules("planner") for name, _ in imported(path)}
    assert {"profiles", "rich", "huggingface_hub"} <= found
