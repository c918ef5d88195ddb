"""The live view: figures on a terminal, lines elsewhere, nothing left behind."""

from __future__ import annotations

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, executor, make_plan, strategy

from executor import ui
from executor.live import wrapped
from planner.types import Workload

pytestmark = pytest.mark.executor
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Gauges:
    """A card by hand."""

    tokens_per_s = 6300.0

    def pieces(self) -> list[str]:
        return ["6.1 GiB allocated", "6.4 GiB reserved of 8 GiB cap", "predicted peak 6.3 GiB", "RAM 3 GiB"]


def on_terminal(command: list[str], columns: int, **env: str) -> tuple[int, str, str]:
    """Exit code, stdout, and what a command writes to its stderr, a terminal of so many columns."""
    outer, inner = pty.openpty()
    ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    settings = environment(TERM="xterm-256color", **env)
    settings.pop("COLUMNS", None)
    with subprocess.Popen(command, stderr=inner, stdout=subprocess.PIPE, text=True, env=settings) as process:
        os.close(inner)
        seen = b""
        while True:
            try:
                part = os.read(outer, 65536)
            except OSError:  # the last writer is gone
                break
            if not part:
                break
            seen += part
        out, _ = process.communicate()
    os.close(outer)
    return process.returncode, out, seen.decode()


def after_the_views(seen: str) -> list[str]:
    """The lines a terminal shows at the end: those of a view are wiped by the codes that follow it."""
    lines = [""]
    row = 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r\n|\r|\n)", seen):
        if part in ("\r\n", "\n"):
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[1A":
            row = max(0, row - 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b") and part != "\r":
            lines[row] += part
    return [line for line in lines if line.strip()]


DEMO = """
import sys, time
from executor import ui
sys.path.insert(0, sys.argv[1])
from test_executor_live import Gauges
with ui.watching(Gauges()), ui.Steps("training", 40) as steps:
    for i in range(1, 21):
        steps.update(i, f"loss {1 / i:.4f}  6,210 tokens/s")
        time.sleep(0.05)
        if i == 10:
            ui.say("a line above the view")
    if sys.argv[2] == "fail":
        raise SystemExit(5)
"""


def demo(columns: int, how: str = "end", **env: str) -> tuple[int, str, str]:
    return on_terminal([sys.executable, "-c", DEMO, str(Path(__file__).parent), how], columns, **env)


@pytest.mark.parametrize("columns", [200, 80, 40])
def test_figures_appear_and_the_view_is_wiped(columns: int) -> None:
    code, out, seen = demo(columns)
    assert code == 0 and out == ""
    plain = CODES.sub("", seen)
    for figure in ("loss 0.", "6,210 tokens/s of 6,300 predicted", "6.1 GiB allocated", "RAM 3 GiB",
                   "6.4 GiB reserved of 8 GiB cap", "predicted peak 6.3 GiB", " left", "/40"):  # fmt: skip
        assert figure in plain, figure
    assert max(len(line) for view in seen.split("\r") for line in CODES.sub("", view).split("\n")) <= 200
    assert seen.count(HIDE) == seen.count(SHOW) == 1 and seen.index(HIDE) < seen.index(SHOW)
    above, last = after_the_views(seen)
    assert above == "a line above the view"
    assert last.startswith("training 20/40  loss 0.0500  6,210 tokens/s of 6,300 predicted  in 0:0")


def test_no_line_of_a_view_is_wider_than_the_terminal() -> None:
    _, _, seen = demo(40)
    views = seen[seen.index(HIDE) : seen.index(SHOW)]
    assert max(len(CODES.sub("", line)) for line in re.split(r"[\r\n]+", views)) <= 40


def test_colours_are_left_out_when_asked() -> None:
    coloured, plain = (demo(80, **env)[2] for env in ({"NO_COLOR": ""}, {"NO_COLOR": "1"}))
    assert re.search(r"\x1b\[(3|9)\d", coloured) and not re.search(r"\x1b\[(3|9)\d", plain)


def test_an_error_leaves_the_terminal_as_it_was() -> None:
    code, _, seen = demo(80, "fail")
    assert code == 5 and seen.count(HIDE) == seen.count(SHOW) == 1
    assert after_the_views(seen) == ["a line above the view"]


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = environment(TERM="dumb")
    outer, inner = pty.openpty()
    code = "from executor import ui; print(ui.is_terminal())"
    done = subprocess.run([sys.executable, "-c", code], stderr=inner, stdout=-1, text=True, env=settings)
    os.close(outer)
    os.close(inner)
    assert done.stdout == "False\n"


def test_lines_elsewhere_come_with_each_tenth_and_every_ten_seconds(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(ui.time, "monotonic", lambda: now[0])
    with ui.Steps("training", 1000) as steps:
        for i in range(1, 1001):
            now[0] += 0.5 if i <= 400 else 0.002
            steps.update(i, "loss 1")
    said = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    # 10 s are 20 steps at first; then a tenth passes in 0.2 s, too soon to speak of
    assert said[:3] == ["20/1000", "40/1000", "60/1000"] and said[-1] == "1000/1000"
    assert 20 <= len(said) <= 24


def test_parts_of_a_step_are_asked_for_and_the_end_is_not_foretold(capsys: Any) -> None:
    with ui.Steps("generating", 4, now=lambda: (9.0, "70.0 tokens/s")) as steps:
        assert steps.state() == (pytest.approx(3.99), "70.0 tokens/s")
        steps.update(4, "60.0 tokens/s")
    with ui.Steps("generating", 4, now=lambda: (1 / 0, "")) as steps:
        assert steps.state() == (0.0, "")


def test_pieces_are_never_broken() -> None:
    assert wrapped(["aaaa", "", "bb", "cccc"], 8) == ["aaaa  bb", "cccc"]
    assert wrapped(["a" * 50], 40) == ["a" * 40]


def test_a_closed_stderr_does_not_end_the_run() -> None:
    code = (
        "import os, sys; from executor import ui\nos.close(2)\n"
        "with ui.Steps('training', 1) as s: s.update(1)\nprint('done')"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=buffered
    )
    assert done.returncode == 0 and done.stdout == "done\n"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    folder = tmp_path_factory.mktemp("live")
    return make_plan(
        folder / "plan.json",
        tiny,
        Workload(task="train", seq_len=64, batch_size=2, method="lora"),
        strategy(),
    )


def test_a_training_on_a_terminal(plan: Path, tiny: Path, tmp_path: Path) -> None:
    arguments = ["run", plan, "--dataset", tiny / "data.jsonl", "--max-steps", 24, "--output", tmp_path / "o"]
    command = [sys.executable, "-m", "executor", *map(str, arguments), "--json"]
    code, out, seen = on_terminal(command, 100)
    assert code == 0 and out.startswith("{")
    plain = CODES.sub("", seen)
    assert "/51 tensors" in plain and "/24" in plain and " left" in plain
    assert re.search(r"loss \d\.\d{4}  [\d,]+ tokens/s", plain)
    assert re.search(r"RAM \d+ MiB of \d+ MiB predicted", plain)
    assert seen.count(HIDE) == seen.count(SHOW) and seen.rindex(HIDE) < seen.rindex(SHOW)
    shown = after_the_views(seen)
    assert [line.split()[0] for line in shown] == ["loading", "training"], shown
    assert "24/24" in shown[-1]


def test_a_training_elsewhere(plan: Path, tiny: Path, tmp_path: Path) -> None:
    done = executor(
        "run", plan, "--dataset", tiny / "data.jsonl", "--max-steps", 24, "--output", tmp_path / "o", "--json"
    )
    assert done.returncode == 0 and done.stdout.startswith("{") and "\x1b" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("loading tiny") and lines[-1].startswith("training 24/24  loss ")
    assert "RAM " in lines[-1]
