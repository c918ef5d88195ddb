"""The output directory of a run: who holds it, whose it is, and how far it got.

DIR/.lock                held by the process that works here (released by the kernel at its death)
DIR/run.json             plan digest, settings and status of the run
DIR/checkpoint-<step>/   complete checkpoints only; they are written under DIR/.partial and renamed
DIR/adapter/ or model/   what training leaves; DIR/outputs.jsonl what inference leaves
DIR/report.json          the report
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any, Literal

from executor.errors import DirectoryInUse
from executor.files import write_atomically

Status = Literal["new", "unfinished", "finished"]
STATE_SCHEMA = "fitwright.state/1"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_RESULTS = ("report.json", "outputs.jsonl", "outputs.partial.jsonl", "adapter", "model")
_OURS = (
    "run.json",
    "report.json",
    "outputs.jsonl",
    "outputs.partial.jsonl",
    "adapter",
    "model",
    ".partial",
    "logs",
)


class OutputDirectory:
    """Holds the lock of `path` from `open` to `close`.

    Errors: `DirectoryInUse` when another process works there, when it holds the run of another plan or of the
    same plan under other settings, or when it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._state: dict[str, Any] = {}
        self._created = False

    def open(self, digest: str, settings: dict[str, Any], restart: bool) -> Status:
        """Take the directory for the plan of this digest; says whether a run of it is there already."""
        self._acquire()
        if restart:
            self._clear()
        found = self._read_state()
        mine = {"schema": STATE_SCHEMA, "plan_digest": digest, "settings": settings}
        if found is None:
            self._state = {**mine, "status": "unfinished"}
            self._write_state()
            return "new"
        self._refuse_other_run(found, mine)
        self._state = found
        shutil.rmtree(self.partial, ignore_errors=True)
        return "finished" if found.get("status") == "finished" and self.report.exists() else "unfinished"

    def close(self) -> None:
        """Let others use the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def forget_if_empty(self) -> None:
        """After an error before anything was made: leave no trace that would stand in another run's way."""
        if self._lock is None or self.checkpoints() or any((self.path / name).exists() for name in _RESULTS):
            return
        (self.path / "run.json").unlink(missing_ok=True)
        shutil.rmtree(self.partial, ignore_errors=True)
        if self._created:
            (self.path / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def finish(self) -> None:
        """Mark the run as finished; from now on it is only reported."""
        self._state["status"] = "finished"
        self._write_state()

    @property
    def report(self) -> Path:
        """Where the report goes."""
        return self.path / "report.json"

    @property
    def partial(self) -> Path:
        """Where folders are built before they are renamed to their place."""
        return self.path / ".partial"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = []
        for entry in self.path.iterdir():
            match = _CHECKPOINT.fullmatch(entry.name)
            if match and entry.is_dir():
                found.append((int(match[1]), entry))
        return [entry for _, entry in sorted(found)]

    def _acquire(self) -> None:
        try:
            self._created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")  # noqa: SIM115  held until close()
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise DirectoryInUse(
                f"another run is working in {self.path}", "wait for it, or give another --output"
            ) from None
        except OSError as error:
            self.close()
            raise DirectoryInUse(
                f"cannot write to {self.path}: {error.strerror}",
                "give a folder you may write to with --output",
            ) from None

    def _read_state(self) -> dict[str, Any] | None:
        file = self.path / "run.json"
        if not file.exists():
            if any((self.path / name).exists() for name in _OURS) or self.checkpoints():
                raise DirectoryInUse(
                    f"{self.path} holds results of something else",
                    "give another --output, or --restart to replace them",
                )
            return None
        try:
            state = json.loads(file.read_text())
            if (
                state["schema"] == STATE_SCHEMA
                and isinstance(state["settings"], dict)
                and state["plan_digest"]
            ):
                return dict(state)
        except (ValueError, KeyError, TypeError, OSError):
            pass
        raise DirectoryInUse(f"cannot read {file}", "give another --output, or --restart to begin again")

    def _refuse_other_run(self, found: dict[str, Any], mine: dict[str, Any]) -> None:
        if found["plan_digest"] != mine["plan_digest"]:
            raise DirectoryInUse(
                f"{self.path} holds the run of another plan",
                "give another --output, or --restart to replace it",
            )
        before, now = found["settings"], json.loads(json.dumps(mine["settings"]))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise DirectoryInUse(
                    f"{self.path} holds a run with other settings: {name} was {_show(before.get(name))}, now "
                    f"{_show(now.get(name))}",
                    "give another --output, or --restart to begin again",
                )

    def _clear(self) -> None:
        for entry in [*self.checkpoints(), *(self.path / name for name in _OURS)]:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    def _write_state(self) -> None:
        write_atomically(
            self.path / "run.json", json.dumps(self._state, indent=1, sort_keys=True) + os.linesep
        )


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
