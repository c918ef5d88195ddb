"""Trace the measured runs without a card and say how far off the trace is, beside the fast estimator.

    python benchmarks/exact/trace.py [--output results.jsonl] [--every-layer]

The runs are those of `benchmarks/calibration`. One JSON object a line, the environment first. Nothing here is
fitted: modelling code, peft and bitsandbytes decide. What the trace says depends on the installed versions,
so it is compared on those the runs were made with (README.md beside this file).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "calibration")]

from report import HERE as CALIBRATION  # noqa: E402
from report import Run, read_model, read_runs  # noqa: E402

from planner.estimate import estimate, normal, normal_strategy  # noqa: E402
from planner.exact.trace import trace_job  # noqa: E402
from planner.machine import machine_from_gpus  # noqa: E402
from planner.memory.overheads import cublas_workspace  # noqa: E402
from profiles.hardware import load_gpu  # noqa: E402

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "triton")


def environment() -> dict[str, str]:
    """Versions of what was traced."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def rows(runs: list[Run], gpu: str, reduce: bool) -> Iterator[dict[str, Any]]:
    """Each run with what was measured, traced and estimated of its allocated peak, in bytes."""
    card = load_gpu(gpu)
    machine = machine_from_gpus([(card, 1)])
    for run in runs:
        model = read_model(CALIBRATION / "configs" / f"{run.model}.json")
        fast = estimate(model, machine, run.workload, run.strategy).gpus[0]
        work = normal(run.workload)
        began = time.perf_counter()
        memory = trace_job(
            model.config, work, normal_strategy(run.strategy, work), cublas_workspace(card), reduce=reduce
        ).memory
        seconds = time.perf_counter() - began
        measured = run.measured.allocated_peak_bytes
        yield {
            "model": run.model,
            "job": run.group,
            "tokens": work.seq_len if work.task == "train" else work.prompt_tokens,
            "sequences": work.sequences,
            "measured_bytes": measured,
            "traced_bytes": memory.peak.bytes,
            "estimated_bytes": fast.allocated_peak_bytes,
            "traced_error": round(memory.peak.bytes / measured - 1, 6),
            "estimated_error": round(fast.allocated_peak_bytes / measured - 1, 6),
            "traced_moment": memory.peak.moment,
            "load_error": round(memory.load_bytes / run.measured.load_bytes - 1, 6),
            "seconds": round(seconds, 2),
        }


def summary(results: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Median, 95th percentile (nearest rank), worst of the absolute errors, and the two extremes."""
    errors = [row[name] for row in results]
    sizes = sorted(map(abs, errors))
    return {
        "runs": len(sizes),
        "p50": median(sizes),
        "p95": sizes[math.ceil(0.95 * len(sizes)) - 1],
        "worst": sizes[-1],
        "lowest": min(errors),
        "highest": max(errors),
    }


def main() -> int:
    """Command line; exit code 1 where the median error of the trace is above half a percent."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the lines here")
    parser.add_argument("--every-layer", action="store_true", help="run all layers, not a few of each kind")
    args = parser.parse_args()
    described, runs = read_runs()
    results = []
    for row in rows(runs, described["gpu"], not args.every_layer):
        results.append(row)
        print(
            f"{row['model']:18} {row['job']:24} traced {row['traced_error']:+.3%}"
            f"  estimated {row['estimated_error']:+.3%}  {row['seconds']:.1f} s",
            flush=True,
        )
    totals = {name: summary(results, name) for name in ("traced_error", "estimated_error", "load_error")}
    for name, total in totals.items():
        print(f"{name:16} " + "  ".join(f"{key} {value:.3%}" for key, value in list(total.items())[1:]))
    if args.output is not None:
        head = {"environment": environment(), "measured_with": described, "summary": totals}
        args.output.write_text("".join(json.dumps(item) + "\n" for item in (head, *results)))
    return int(totals["traced_error"]["p50"] > 0.005)


if __name__ == "__main__":
    sys.exit(main())
