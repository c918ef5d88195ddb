"""Run one plan under a cap and set the bytes it streamed a second beside the link's own rate.

    python benchmarks/streaming/measure.py PLAN [--cap SIZE] [-- EXECUTOR OPTIONS]

The plan is rehearsed in this process: random weights in the real shapes. Then, in the same process, the link
is the best of five pinned copies of 1 GiB. The share is (bytes a pass brings to the card x passes a second) /
link, where a pass is a decoded token of the batch. One JSON line is appended to results.jsonl and printed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import msgspec  # noqa: E402

from executor.cli import main as executor  # noqa: E402  found beside this folder
from planner.memory.streamed import parts_of, traffic  # noqa: E402
from planner.placement import tiers_of  # noqa: E402
from planner.types import Plan  # noqa: E402
from profiles.architecture import architecture  # noqa: E402

GIB = 2**30


def main() -> int:
    """Measure; the exit code of the rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--cap", help="--vram-cap of the run (default: the memory the plan is for)")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    plan = json.loads(args.plan.read_text())
    candidate = plan["candidates"][0]
    budget = candidate["estimate"]["gpus"][0]["budget_bytes"]
    resident = candidate["engine"] == "resident"
    cap = [] if resident else ["--vram-cap", args.cap or f"{budget // 2**20}MiB"]
    command = ["rehearse", str(args.plan), "--candidate", "1", *cap, *options]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        code = executor([*command, "--output", folder, "--json"])
        report = json.loads((Path(folder) / "report.json").read_text()) if code == 0 else {}
    row: dict[str, Any] = {
        "plan": args.plan.name,
        "plan_digest": plan["digest"],
        "command": f"executor {shlex.join(command)}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "exit_code": code,
        "predicted": {
            "gpu": {k: v for k, v in candidate["estimate"]["gpus"][0].items() if k != "components"},
            "pinned_bytes": candidate["estimate"]["host"].get("pinned_bytes", 0),
            "speed": candidate["speed"],
        },
        "report": {k: v for k, v in report.items() if k not in ("strategy", "workload", "model")},
    }
    if code == 0:
        row["link_bytes_per_s"] = link_rate()
        row["share_of_link"] = _share(report, row["link_bytes_per_s"], _bytes_of_a_pass(args.plan))
    with open(args.results, "a") as f:
        f.write(json.dumps(row, sort_keys=True) + "\n")
    print(json.dumps(_shown(row)))
    return code


def link_rate() -> float:
    """Bytes per second of the best of five pinned copies of 1 GiB to the card."""
    import torch

    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    source = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    seconds = []
    for _ in range(6):  # the first wakes the link
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        target.copy_(source, non_blocking=True)
        ended.record()
        torch.cuda.synchronize()
        seconds.append(began.elapsed_time(ended) / 1000)
    return GIB / min(seconds[1:])


def _bytes_of_a_pass(file: Path) -> int:
    """What decoding one token brings to the card: streamed layers, and a streamed output projection."""
    plan = msgspec.json.decode(file.read_bytes(), type=Plan)
    candidate, arch = plan.candidates[0], architecture(plan.model.config)
    if candidate.engine != "stream":
        return 0
    tiers = tiers_of(arch, candidate.estimate.placement)
    return traffic(parts_of(arch, candidate.strategy), tiers, train=False).link


def _share(report: dict[str, Any], link: float, bytes_of_a_pass: int) -> float | None:
    """Of a decode; None for training, whose copies run under the computation."""
    tokens, batch = report["decode_tokens_per_s"], report["workload"]["batch_size"]
    if tokens is None or not bytes_of_a_pass:
        return None
    return float(bytes_of_a_pass * tokens / batch / link)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    names = ("layers_resident", "layers_streamed", "pinned_bytes", "allocated_peak_bytes")
    names += ("process_peak_bytes", "decode_tokens_per_s", "prefill_tokens_per_s", "train_tokens_per_s")
    names += ("error", "notes")
    report = {name: row["report"].get(name) for name in names}
    first = ("plan", "exit_code", "link_bytes_per_s", "share_of_link")
    return {name: row.get(name) for name in first} | report


if __name__ == "__main__":
    sys.exit(main())
