"""Telling that a file could not be written, whichever library tried, and saying so in one line."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from executor.errors import CannotWrite
from planner.units import format_bytes

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
BARRED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_SAFETENSORS = re.compile(r"os error (\d+)|code: (\d+)")
_TORCH = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")
_NEARLY_FULL = 2**20


def writing_failed(error: BaseException, folder: Path, goes_on: bool) -> CannotWrite | None:
    """The error to show when `error` says that `folder` took no more data; None when it says something else.

    `goes_on`: there is a checkpoint or a part of the answers that the next run begins with.
    """
    number = next((n for e in chain(error) if (n := _errno(e)) is not None), None)
    if number is None:
        return None
    name = next((e.filename for e in chain(error) if isinstance(e, OSError) and e.filename), None)
    left = _free_bytes(folder)
    if number == 0 and left is not None and left < _NEARLY_FULL:
        number = errno.ENOSPC
    reason = os.strerror(number) if number else "writing failed"
    free = f" ({format_bytes(left)} free)" if left is not None else ""
    then = "the same command goes on from the last checkpoint" if goes_on else "run the same command again"
    if number in BARRED:
        # a name elsewhere was to be read: a weight file that was taken away in the middle of the run
        verb = "write" if name is None or Path(name).absolute().is_relative_to(folder.absolute()) else "open"
        return CannotWrite(f"cannot {verb} {name or folder}: {reason}", f"mend that; {then}")
    return CannotWrite(f"cannot write {name or folder}: {reason}{free}", f"{way_out(error)}; {then}")


def way_out(error: BaseException) -> str:
    """What would let a file grow: of a file that is as large as it may be, room on the disk is no help."""
    if any(isinstance(e, OSError) and e.errno == errno.EFBIG for e in chain(error)):
        return "lift the limit on the size of files (ulimit -f; 4 GiB on FAT), or write to another disk"
    return "free some space"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _errno(error: BaseException) -> int | None:
    """The system's number for a failed write, 0 where a library keeps it back, None for other errors."""
    if isinstance(error, OSError):
        return error.errno if error.errno in FULL | BARRED else None
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (match := _SAFETENSORS.search(text)):
        number = int(match[1] or match[2])
        return number if number in FULL | BARRED else None
    if isinstance(error, RuntimeError) and any(sign in text for sign in _TORCH):
        return 0
    return None


def _free_bytes(folder: Path) -> int | None:
    try:
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        space = os.statvfs(there)
    except (OSError, StopIteration):
        return None
    return space.f_bavail * space.f_frsize
