"""Rehearse plans and hold what they predicted against what was measured.

    python benchmarks/rehearse.py FOLDER [--cap-at process_bytes] [--only TEXT] [-- EXECUTOR OPTIONS]

Each plan runs in a fresh process with random weights in the model's real shapes. One JSON line per plan is
appended to the results: plan and digest, command, prediction, measurement, error (measured / predicted -
1), environment. Commit the plans before running this: they are the predictions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MEASURED = (
    "load_bytes",
    "allocated_peak_bytes",
    "reserved_peak_bytes",
    "process_peak_bytes",
    "context_bytes",
    "managed_bytes",
    "host_peak_bytes",
    "moments",
    "components",
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "train_tokens_per_s",
    "steps",
    "losses",
    "notes",
)


def main() -> int:
    """Rehearse every plan; exit code 1 if one failed or its allocated peak is off beyond the tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="what follows -- is passed on to `executor rehearse`",
    )
    parser.add_argument("folder", type=Path, help="folder of plan files; results.jsonl is written there")
    parser.add_argument("--results", type=Path, help="another file for the results")
    parser.add_argument("--tolerance", type=float, default=0.05, help="largest error of the allocated peak")
    parser.add_argument(
        "--cap-at",
        choices=("process_bytes", "low_bytes", "high_bytes"),
        help="run under --vram-cap at this figure of the first card's estimate",
    )
    parser.add_argument("--only", default="", help="only plans with this in their name")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a plan is given up")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    plans = sorted(plan for plan in args.folder.glob("*.plan.json") if args.only in plan.name)
    results = args.results or args.folder / "results.jsonl"
    if not plans:
        print(f"no plans in {args.folder}", file=sys.stderr)
        return 2
    worst = 0.0
    failed = False
    for plan in plans:
        row = rehearse(plan, options, args.cap_at, args.timeout)
        with open(results, "a") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")
        print(summary(row), flush=True)
        failed |= "error" not in row
        worst = max(worst, abs(row.get("error", {}).get("allocated_peak_bytes", 0.0)))
    return int(failed or worst > args.tolerance)


def rehearse(
    plan: Path, options: list[str], cap_at: str | None = None, timeout: float | None = None
) -> dict[str, Any]:
    """One plan in a process of its own, killed after `timeout` seconds (exit code 124)."""
    content = json.loads(plan.read_text())
    candidate = content["candidates"][0]
    if cap_at is not None:
        cap = candidate["estimate"]["gpus"][0][cap_at] // 2**20
        options = [*options, "--candidate", "1", "--vram-cap", f"{cap}MiB"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", "executor", "rehearse", str(plan), "--output", folder, "--json", *options]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        code, out, err = _run([sys.executable, *arguments], environment, timeout)
    row: dict[str, Any] = {
        "plan": plan.name,
        "plan_digest": content["digest"],
        "command": f"executor rehearse {plan.parent.name}/{plan.name} {shlex.join(options)}".strip(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "predicted": {
            "gpu": {k: v for k, v in candidate["estimate"]["gpus"][0].items() if k != "components"},
            "host": {"ram_bytes": candidate["estimate"]["host"]["ram_bytes"]},
            "speed": candidate["speed"],
        },
    }
    if code:
        return {**row, "exit_code": code, "stderr": err.strip()[-4000:]}
    report = json.loads(out)
    row["measured"] = {name: report[name] for name in MEASURED}
    return {**row, "error": report["error"], "environment": report["environment"]}


def _run(command: list[str], environment: dict[str, str], timeout: float | None) -> tuple[int, str, str]:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            return 124, out, f"{err}\ngiven up after {timeout:g} s"
        return process.returncode, out, err


def summary(row: dict[str, Any]) -> str:
    """One line for a person."""
    if "error" not in row:
        return f"{row['plan']}: exit {row['exit_code']}: {row['stderr'][-300:]}"
    figures = ", ".join(f"{name} {value:+.2%}" for name, value in row["error"].items())
    return f"{row['plan']}: {figures}"


if __name__ == "__main__":
    sys.exit(main())
