"""Where the time of a training step goes: forward, loss, backward and what lies between two steps.

    python benchmarks/streaming/phases.py PLAN [-- EXECUTOR OPTIONS]

Rehearses the plan and marks the beginning of each part, on the card by an event and on the host by the clock:
where both agree, the card waits for the host. The first two steps do not count; each micro-batch of gradient
accumulation is a step here. Needs a card. One JSON line is appended to phases.jsonl and printed.
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
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from executor.cli import main as executor  # noqa: E402  found beside this folder
from executor.measure import MomentMeter  # noqa: E402

PARTS = ("forward", "loss", "backward", "optimizer_step")
"""The last one lasts until the next forward: everything between two steps is in it."""
WARM_STEPS = 2


@dataclass(frozen=True)
class Mark:
    """The beginning of a part."""

    part: str
    event: Any
    seconds: float


def main() -> int:
    """Measure; the exit code of the rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--results", type=Path, default=HERE / "phases.jsonl")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    command = ["rehearse", str(args.plan), "--candidate", "1", *options]
    marks: list[Mark] = []
    with tempfile.TemporaryDirectory() as folder, marking(marks), contextlib.redirect_stdout(io.StringIO()):
        code = executor([*command, "--output", folder, "--json"])
    if code == 0 and sum(mark.part == "forward" for mark in marks) < WARM_STEPS + 2:
        parser.error(f"a rehearsal of more than {WARM_STEPS + 1} training steps is needed: -- --max-steps 10")
    if code == 0:
        row = {
            "plan": args.plan.name,
            "command": f"executor {shlex.join(command)}",
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            **means(marks),
            **allocator(),
        }
        with open(args.results, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row))
    return code


@contextlib.contextmanager
def marking(marks: list[Mark]) -> Iterator[None]:
    """Within, every part of a step leaves a mark when it begins."""
    import torch

    stock = MomentMeter.enter

    def enter(meter: MomentMeter, moment: str) -> None:
        if moment in PARTS and (not marks or marks[-1].part != moment):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(Mark(moment, event, time.perf_counter()))
        stock(meter, moment)

    with patch.object(MomentMeter, "enter", enter):
        yield


def means(marks: list[Mark]) -> dict[str, Any]:
    """Milliseconds of each part, on the card and on the host."""
    import torch

    torch.cuda.synchronize()
    begins = [number for number, mark in enumerate(marks) if mark.part == "forward"]
    counted = marks[begins[WARM_STEPS] : begins[-1] + 1]
    card, host = defaultdict(list), defaultdict(list)
    for mark, after in pairwise(counted):
        card[mark.part].append(mark.event.elapsed_time(after.event))
        host[mark.part].append(1000 * (after.seconds - mark.seconds))
    return {
        "steps": len(begins) - 1 - WARM_STEPS,
        "card_ms": {part: round(sum(found) / len(found), 1) for part, found in card.items()},
        "host_ms": {part: round(sum(found) / len(found), 1) for part, found in host.items()},
    }


def allocator() -> dict[str, Any]:
    """How often the allocator asked the driver for memory, gave some back, and gave all back to go on."""
    import torch

    books = torch.cuda.memory_stats()
    names = ("num_device_alloc", "num_device_free", "num_alloc_retries", "num_sync_all_streams")
    return {name: books.get(name, 0) for name in names}


if __name__ == "__main__":
    sys.exit(main())
