"""What the live view costs: the same run with the view drawn on a terminal and without one, in turns.

    python benchmarks/live_view.py [--pairs 5] [--plan PLAN [-- OPTIONS OF executor rehearse]]

Without a plan a tiny model is fine-tuned on the CPU. Two figures: the speed of the job with the view over its
speed without (medians; noise of the machine is in it), and the share of the run's time that the thread of the
view spends on the processor, drawing and reading figures: the most it can take from the job, which waits for
it only while it holds Python's lock. One JSON line is appended to the results. Exit code 1 if the share is
over the tolerance.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import pty
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COLUMNS = 120
RATES = ("train_tokens_per_s", "decode_tokens_per_s")
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "TERM": "xterm-256color",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
RUNNER = """
import json, sys, time
from executor import ui
from executor.cli import main
spent = []
watch = ui.Steps._watch
def timed(steps):
    watch(steps)
    spent.append({"view": steps.text, "seconds": steps.seconds, "on_processor": time.thread_time()})
ui.Steps._watch = timed
code = main(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(spent))
sys.exit(code)
"""


def main() -> int:
    """Run the pairs, print and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--plan", type=Path, help="rehearse this plan in place of the tiny training")
    parser.add_argument("--tolerance", type=float, default=0.01, help="largest share of the run's time")
    parser.add_argument("--results", type=Path, default=HERE / "live_view.jsonl")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        ENVIRONMENT["FITWRIGHT_HOME"] = str(Path(folder) / "home")
        command = ["rehearse", str(args.plan), *options] if args.plan else tiny_training(Path(folder))
        with_view, without = [], []
        for pair in range(args.pairs):
            turns = [(True, with_view), (False, without)]
            for drawn, runs in turns if pair % 2 == 0 else turns[::-1]:
                runs.append(run(command, Path(folder) / f"{drawn}-{pair}", drawn))
    row = result(with_view, without, command, args.plan)
    with open(args.results, "a") as f:
        f.write(json.dumps(row, sort_keys=True) + "\n")
    print(json.dumps({k: v for k, v in row.items() if k != "environment"}, indent=1))
    return int(row["view_share_of_time"] > args.tolerance)


def tiny_training(folder: Path) -> list[str]:
    """A training of some seconds on the CPU."""
    make = (
        "from pathlib import Path; from executor.tiny import write_tiny_model\n"
        f"write_tiny_model(Path({str(folder / 'tiny')!r}))"
    )
    subprocess.run([sys.executable, "-c", make], env=ENVIRONMENT, check=True, capture_output=True)
    rows = [{"prompt": f"{a} plus {b} is ", "completion": f"{a + b}"} for a in range(12) for b in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = ["--task", "train", "--seq-len", "64", "--batch-size", "2", "--placement", "cpu", "--no-ledger"]
    plan = ["plan", str(folder / "tiny"), *job, "-o", str(folder / "plan.json")]
    subprocess.run([sys.executable, "-m", "planner", *plan], env=ENVIRONMENT, check=True, capture_output=True)
    # no checkpoints on the way: their writing would be most of the run
    steps = ["--max-steps", "96", "--save-steps", "96"]
    return ["run", str(folder / "plan.json"), "--dataset", str(folder / "rows.jsonl"), *steps]


def run(command: list[str], output: Path, drawn: bool) -> dict[str, Any]:
    """One run in a process of its own; with `drawn` its stderr is a terminal that somebody reads."""
    spent = output.with_suffix(".spent")
    arguments = [sys.executable, "-c", RUNNER, str(spent), *command, "--output", str(output), "--json"]
    if not drawn:
        done = subprocess.run(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT, check=True
        )
        return {"report": json.loads(done.stdout), "spent": json.loads(spent.read_text())}
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    threading.Thread(target=drain, args=(outer,), daemon=True).start()
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=inner, env=ENVIRONMENT, check=True)
    os.close(inner)
    return {"report": json.loads(done.stdout), "spent": json.loads(spent.read_text())}


def drain(terminal: int) -> None:
    """Read what a terminal would show."""
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:
        pass


def result(
    with_view: list[dict[str, Any]], without: list[dict[str, Any]], command: list[str], plan: Path | None
) -> dict[str, Any]:
    """One row: medians of both, and the share of the view's thread."""
    rate = next(name for name in RATES if without[0]["report"][name])
    speeds = {
        name: [run["report"][rate] for run in runs]
        for name, runs in (("with_view", with_view), ("without", without))
    }
    views = [view for run in with_view for view in run["spent"]]
    work = [view for view in views if view["view"].startswith(("training", "generating"))]
    named = f"executor rehearse {plan.name}" if plan else "executor run, tiny QLoRA on the CPU, 96 steps"
    return {
        "what": " ".join([named, *(command[2:] if plan else [])]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "rate": rate,
        **{name: [round(value, 2) for value in values] for name, values in speeds.items()},
        "speed_with_over_without": round(
            statistics.median(speeds["with_view"]) / statistics.median(speeds["without"]), 4
        ),
        "view_share_of_time": round(
            sum(view["on_processor"] for view in work) / sum(view["seconds"] for view in work), 5
        ),
        "environment": without[0]["report"]["environment"],
    }


if __name__ == "__main__":
    sys.exit(main())
