"""Kill real trainings at random moments, resume them, and compare what they leave with an unbroken run.

    python benchmarks/faults/kill.py [--kills 50] [--seed 0] [--results FILE]

A tiny model is fine-tuned through `executor run` on the CPU: 24 steps, a checkpoint every second one. Each
trial breaks one run off once or twice and lets it finish: with SIGKILL to the whole process group at a moment
drawn from its length, or while a checkpoint is written (something lies in `.partial`), or with SIGTERM or
SIGINT. The adapter must have the same bytes and every step the same loss as in the unbroken run,
and no run may begin before the last checkpoint that was there. One JSON line per trial; the first line is the
environment. Exit code 1 if a trial failed.

All runs have one thread: the order of a sum's terms, and so its last bits, depends on their number.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = 24
LONGEST_SECONDS = 300
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}


def main() -> int:
    """Run the trials; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="at least so many runs are broken off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE / "kill.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        rows = [bench.describe(args)]
        print(f"an unbroken run takes {bench.seconds:.1f} s", flush=True)
        done = failed = 0
        while done < args.kills:
            row = bench.trial(len(rows), random.Random(args.seed * 1_000_003 + len(rows)))
            rows.append(row)
            done += sum(not each["after_its_end"] for each in row["breaks"])
            failed += not row["passed"]
            print(f"{done}/{args.kills} {summary(row)}", flush=True)
    breaks = [each for row in rows[1:] for each in row["breaks"] if not each["after_its_end"]]
    rows.append(
        {
            "breaks": done,
            "killed_while_training": sum(b["last_checkpoint"] > 0 for b in breaks if b["signal"] == "KILL"),
            "killed_while_writing": sum(b["left_half_written"] > 0 for b in breaks),
            "trials": len(rows) - 1,
            "failed": failed,
        }
    )
    args.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return int(failed > 0)


class Bench:
    """A model, its data, a plan, and what an unbroken run makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ENVIRONMENT["FITWRIGHT_HOME"] = str(folder / "home")  # these runs say nothing about the machine
        write_inputs(folder)
        began = time.monotonic()
        self.whole = finish(self.start(folder / "whole"), folder / "whole")
        self.seconds = time.monotonic() - began
        assert self.whole["exit_code"] == 0, self.whole

    def start(self, output: Path) -> subprocess.Popen[str]:
        """`executor run` in a process group of its own."""
        options = ["--dataset", self.folder / "rows.jsonl", "--max-steps", STEPS, "--seed", 1, "--json"]
        command = ["run", self.folder / "plan.json", *options, "--output", output]
        return subprocess.Popen(
            [sys.executable, "-m", "executor", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
            # a shell has its background jobs ignore ctrl-C, and so would the runs they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def trial(self, number: int, draw: random.Random) -> dict[str, Any]:
        """Break one run off once or twice, let it finish, compare."""
        output = self.folder / f"trial-{number}"
        breaks = [self.break_off(output, draw) for _ in range(draw.choice((1, 1, 2)))]
        end = finish(self.start(output), output)
        problems = [problem for each in breaks for problem in each.pop("problems")]
        if end["exit_code"] != 0:
            problems.append(f"exit {end['exit_code']}: {end['stderr'][-300:]}")
        problems += [f"other {name}" for name in ("adapter", "losses") if end[name] != self.whole[name]]
        if not breaks[-1]["after_its_end"] and end["resumed_from_step"] != breaks[-1]["last_checkpoint"]:
            problems.append(f"began at {end['resumed_from_step']}, not at {breaks[-1]['last_checkpoint']}")
        return {
            "trial": number,
            "breaks": breaks,
            "resumed_from_step": end["resumed_from_step"],
            "same_adapter": end["adapter"] == self.whole["adapter"],
            "same_losses": end["losses"] == self.whole["losses"],
            "passed": not problems,
            "problems": problems,
        }

    def break_off(self, output: Path, draw: random.Random) -> dict[str, Any]:
        """Start the run and end it at a drawn moment; what was there when it had ended."""
        name = draw.choices(("KILL", "TERM", "INT"), (70, 15, 15))[0]
        aimed = name == "KILL" and draw.random() < 0.5
        moment = draw.uniform(0.0, 1.1 * self.seconds)
        process = self.start(output)
        began = time.monotonic()
        if aimed:
            wait_for_writing(process, output, draw.randrange(0, STEPS, 2), draw.uniform(0, 0.008))
        else:
            wait(process, moment)
        ended = process.poll() is not None
        at = time.monotonic() - began
        if not ended and name == "KILL":
            os.killpg(process.pid, signal.SIGKILL)
        elif not ended:
            process.send_signal(SIGNALS[name])
        _, stderr = process.communicate(timeout=LONGEST_SECONDS)
        allowed = {"KILL": (-signal.SIGKILL,), "TERM": (130, -signal.SIGTERM), "INT": (130, -signal.SIGINT)}[
            name
        ]
        problems = []
        if not ended and process.returncode not in (0, *allowed):
            problems.append(f"{name}: exit {process.returncode}: {stderr[-300:]}")
        if "Traceback" in stderr and stderr.count("executor"):
            problems.append(f"{name}: a traceback: {stderr[-300:]}")
        return {
            "signal": name,
            "aimed_at_writing": aimed,
            "at_seconds": round(at, 3),
            "after_its_end": ended or finished(output),
            "exit_code": process.returncode,
            "last_checkpoint": last_checkpoint(output),
            "left_half_written": left(output / ".partial"),
            "problems": problems,
        }

    def describe(self, args: argparse.Namespace) -> dict[str, Any]:
        """The first line of the results."""
        return {
            "command": f"python benchmarks/faults/kill.py --kills {args.kills} --seed {args.seed}",
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "unbroken": {"seconds": round(self.seconds, 2), **self.whole},
            "environment": {
                "python": platform.python_version(),
                "system": f"{platform.system()} {platform.release()}",
                "cores": len(os.sched_getaffinity(0)),
                "threads": 1,
                "libraries": {
                    n: metadata.version(n) for n in ("torch", "transformers", "peft", "bitsandbytes")
                },
            },
        }


def write_inputs(folder: Path) -> None:
    """Model, dataset and plan, as a user would make them."""
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


def wait(process: subprocess.Popen[str], seconds: float) -> None:
    """Until the moment, or the end of the process."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)


def wait_for_writing(process: subprocess.Popen[str], output: Path, after: int, into: float) -> None:
    """Until the checkpoint after step `after` is being written, and then some seconds into it."""
    while process.poll() is None and (last_checkpoint(output) < after or not left(output / ".partial")):
        time.sleep(0.0005)
    wait(process, into)


def finished(output: Path) -> bool:
    """Whether the run had ended by itself: what came then broke nothing off."""
    state = output / "run.json"
    return state.exists() and json.loads(state.read_text())["status"] == "finished"


def left(partial: Path) -> int:
    """Files of what is being built."""
    try:
        return sum(1 for path in partial.rglob("*") if path.is_file())
    except FileNotFoundError:  # renamed while it was looked at
        return 0


def last_checkpoint(output: Path) -> int:
    """Step of the newest complete checkpoint, 0 if there is none."""
    return max((int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")), default=0)


def finish(process: subprocess.Popen[str], output: Path) -> dict[str, Any]:
    """What a run that is left alone leaves."""
    _, stderr = process.communicate(timeout=LONGEST_SECONDS)
    adapter, report = output / "adapter" / "adapter_model.safetensors", output / "report.json"
    found = json.loads(report.read_text()) if report.exists() else {}
    return {
        "exit_code": process.returncode,
        "stderr": stderr if process.returncode else "",
        "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter.exists() else None,
        "losses": found.get("losses"),
        "resumed_from_step": found.get("resumed_from_step"),
    }


def summary(row: dict[str, Any]) -> str:
    """One line for a person."""
    broken = ", ".join(
        f"{b['signal']} at {b['at_seconds']:.1f} s"
        + (" while writing" if b["left_half_written"] else "")
        + f" (checkpoint {b['last_checkpoint']})"
        for b in row["breaks"]
    )
    return f"{broken}: {'same bytes' if row['passed'] else '; '.join(row['problems'])}"


if __name__ == "__main__":
    sys.exit(main())
