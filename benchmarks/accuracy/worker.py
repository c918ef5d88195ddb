"""One process, one cell: waits for a task on stdin, writes what it measured to a file, ends.

    python -m benchmarks.accuracy.worker --output FILE --device cuda

Started ahead of time by `run.py`, so that importing the libraries overlaps with other cells. The file gets
one JSON object a line: `{"ready": true}`, then parts of the result as they are known, `{"done": true}` last.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.accuracy.cells import Cell


class Task(msgspec.Struct, frozen=True):
    """What the runner asks for."""

    cell: Cell
    share_bytes: int | None = None
    """What the allocator may take in the free run."""
    slack: float = 1.0
    """Predicted smallest cap over predicted allocated peak: where the search for the cap begins."""


def import_libraries() -> None:
    """What every cell needs, as far as it makes no CUDA context."""
    import accelerate  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.trainer  # noqa: F401

    import executor.attempt
    import executor.ladder  # noqa: F401


def work(task: Task, device: str, tell: Any) -> None:
    """Measure the cell; what goes wrong is told as the last line of its traceback."""
    from benchmarks.accuracy.bench import Bench, ShareExceeded, last_line

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
        try:
            Bench(task.cell, device, Path(folder), tell).measure(task.share_bytes, task.slack)
            tell({"status": "ok"})
        except ShareExceeded as error:
            tell({"status": "share_exceeded", "error": str(error)})
        except Exception as error:
            if os.environ.get("ACCURACY_DEBUG"):
                raise
            tell({"status": "failed", "error": last_line(error)})
    tell({"seconds": round(time.monotonic() - began, 1), "done": True})


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    out = open(args.output, "a")  # noqa: SIM115 - open as long as the process

    def tell(part: dict[str, Any]) -> None:
        out.write(json.dumps(part, default=str) + "\n")
        out.flush()

    os.dup2(2, 1)  # what libraries print is not the result
    import_libraries()
    tell({"ready": True})
    line = sys.stdin.readline()
    if line.strip():
        work(msgspec.json.decode(line, type=Task), args.device, tell)
    out.flush()
    os._exit(0)  # libraries' own clean-up takes seconds and frees nothing the system would not


if __name__ == "__main__":
    sys.exit(main())
