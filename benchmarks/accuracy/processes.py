"""A worker process as the runner sees it: started ahead, given one cell, looked at, ended."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.accuracy.cells import Cell, read_lines
from benchmarks.accuracy.worker import Task

ROOT = Path(__file__).resolve().parents[2]
_numbers = itertools.count()


class Worker:
    """One process; `start` gives it its only cell."""

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        name = f"worker-{next(_numbers)}"
        self.output, self.log = folder / f"{name}.jsonl", folder / f"{name}.log"
        self._began = time.monotonic()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            # the allocator is chosen cell by cell (bench.py), before anything is allocated
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
        }
        arguments = ["-m", "benchmarks.accuracy.worker", "--output", str(self.output), "--device", device]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def start(self, cell: Cell, share_bytes: int | None, slack: float = 1.0) -> None:
        """Give it its cell."""
        self._began = time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(msgspec.json.encode(Task(cell, share_bytes, slack)) + b"\n")
            self.process.stdin.close()

    @property
    def seconds(self) -> float:
        """Since it got its cell."""
        return time.monotonic() - self._began

    @property
    def ready(self) -> bool:
        """It has imported everything and waits, or has ended."""
        return self.ended or any(row.get("ready") for row in read_lines(self.output))

    @property
    def ended(self) -> bool:
        """It will write no more."""
        return self.process.poll() is not None

    def result(self) -> dict[str, Any]:
        """What it has told so far, put together."""
        found: dict[str, Any] = {}
        for part in read_lines(self.output):
            for key, value in part.items():
                if isinstance(value, dict) and isinstance(found.get(key), dict):
                    found[key] |= value
                else:
                    found[key] = value
        found.pop("ready", None)
        if not found.pop("done", False):
            found.setdefault("status", "failed")
            code = self.process.poll()
            found.setdefault("error", f"the process ended with code {code}: {self._last_words()}")
        return found

    def kill(self) -> None:
        """End it and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing said")
