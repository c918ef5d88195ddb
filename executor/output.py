"""The output directory of a run: who holds it, whose it is, and how far it got.

DIR/.lock                held by the process that works here (released by the kernel at its death)
DIR/run.json             plan digest, settings and status of the run, and the candidate it came to
DIR/checkpoint-<step>/   complete checkpoints only; they are written under DIR/.partial and renamed
DIR/.left/<state>/       checkpoints of a candidate that ran out of memory, which the next one cannot use
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
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

from executor.errors import DirectoryInUse
from executor.files import sweep_temporaries, write_atomically

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
    ".left",
    "logs",
)


class OutputDirectory:
    """Holds the lock of `path` from `open` to `close`.

    Errors: `DirectoryInUse` when another process works there, when it holds the run of another plan or of the
    same plan under other settings, when something in it leads elsewhere, or when it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._state: dict[str, Any] = {}
        self._created = False

    def open(self, digest: str, settings: dict[str, Any], restart: bool) -> Status:
        """Take the directory for the plan of this digest; says whether a run of it is there already."""
        try:
            self._acquire()
            return self._enter(digest, settings, restart)
        except OSError as error:
            self.forget_if_empty()
            self.close()
            what = (
                "it is no folder"
                if isinstance(error, FileExistsError | NotADirectoryError)
                else error.strerror
            )
            raise DirectoryInUse(
                f"cannot write to {self.path}: {what}",
                "give a folder with space that you may write to with --output",
            ) from None
        except BaseException:
            self.close()
            raise

    def _enter(self, digest: str, settings: dict[str, Any], restart: bool) -> Status:
        self._refuse_links()
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
        self.sweep()
        return "finished" if found.get("status") == "finished" and self.report.exists() else "unfinished"

    def close(self) -> None:
        """Let others use the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def sweep(self) -> None:
        """Remove what was never finished: folders being built, temporary files of a killed process."""
        shutil.rmtree(self.partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            sweep_temporaries(self.path, _OURS)

    def has_progress(self) -> bool:
        """Whether there is something that the next run would not have to do again."""
        return bool(self.checkpoints()) or any((self.path / name).exists() for name in _RESULTS)

    def forget_if_empty(self) -> None:
        """After an error before anything was made: leave no trace that would stand in another run's way."""
        if self._lock is None or self.has_progress() or (self.path / ".left").exists():
            return
        with contextlib.suppress(OSError):
            self.sweep()
            (self.path / "run.json").unlink(missing_ok=True)
            if self._created:
                (self.path / ".lock").unlink(missing_ok=True)
                self.path.rmdir()

    def finish(self) -> None:
        """Mark the run as finished; from now on it is only reported."""
        self._state["status"] = "finished"
        self._write_state()
        shutil.rmtree(self.path / ".left", ignore_errors=True)
        self.sweep()

    @property
    def reached(self) -> tuple[int, tuple[str, ...]]:
        """Rank of the candidate whose work is here (0: none yet), and why those before it were left."""
        if not self.has_progress():
            return 0, ()
        return int(self._state.get("candidate", 0)), tuple(map(str, self._state.get("left", ())))

    def take_up(self, rank: int, left: Sequence[str], state: str) -> bool:
        """A candidate begins: note it, and put checkpoints aside that it cannot go on from.

        `state`: names what its checkpoints hold; candidates of the same name go on from each other's. What is
        put aside comes back when a candidate of that name begins. True when something was put aside.
        """
        before = self._state.get("state", state)
        moved = self._move_checkpoints(self.path, self.path / ".left" / before) if before != state else False
        self._state |= {"candidate": rank, "left": list(left), "state": state}
        self._write_state()
        self._move_checkpoints(self.path / ".left" / state, self.path)
        return moved

    def all_left(self) -> None:
        """Every candidate ran out of memory: the next run may have more, and begins with the first again."""
        self._state |= {"candidate": 0, "left": []}
        self._write_state()

    def _move_checkpoints(self, source: Path, target: Path) -> bool:
        found = _checkpoints_in(source)
        for entry in found:
            target.mkdir(parents=True, exist_ok=True)
            entry.rename(target / entry.name)
        return bool(found)

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
        return _checkpoints_in(self.path)

    def _acquire(self) -> None:
        self._created = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / ".lock"
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            file = os.fdopen(os.open(path, flags, 0o644), "w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise DirectoryInUse(
                    f"another run is working in {self.path}", "wait for it, or give another --output"
                ) from None
            except BaseException:
                file.close()
                raise
            if _is_still(path, file):
                self._lock = file  # from here on the directory is ours
                return
            file.close()  # its last holder has removed the file in between: lock the one that is there now

    def _refuse_links(self) -> None:
        """What is written here must not land elsewhere."""
        for name in (*_OURS, *(path.name for path in self.path.glob("checkpoint-*"))):
            if (self.path / name).is_symlink():
                raise DirectoryInUse(
                    f"{self.path / name} is a link to somewhere else", "remove it, or give another --output"
                )

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


def _checkpoints_in(folder: Path) -> list[Path]:
    found = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _CHECKPOINT.fullmatch(entry.name)
        if match and entry.is_dir() and not entry.is_symlink():
            found.append((int(match[1]), entry))
    return [entry for _, entry in sorted(found)]


def _is_still(path: Path, file: IO[str]) -> bool:
    """Whether `path` names the open `file`."""
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
