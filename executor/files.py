"""Writing files so that a kill or a power cut at any moment leaves the old file or the new one, never half.

A rename is seen at once by every process, but reaches the disk when it likes: what it names is flushed
before it, and the folder that holds the name after it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write `path` through a temporary file in the same folder. Errors: `OSError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def publish_folder(staging: Path, final: Path) -> None:
    """Make the finished folder `staging` appear as `final` in one rename, everything in it flushed first.

    A folder that is there already steps aside first, so a kill between the two renames leaves neither.
    Errors: `OSError`.
    """
    for entry in sorted(staging.rglob("*")):
        flush(entry)
    flush(staging)
    if final.exists():
        retired = staging.with_name(staging.name + ".old")
        shutil.rmtree(retired, ignore_errors=True)
        os.rename(final, retired)
        os.rename(staging, final)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.rename(staging, final)
    flush(final.parent)
    flush(staging.parent)


def flush(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep_temporaries(folder: Path, names: Iterable[str]) -> None:
    """Remove what a kill inside `write_atomically` left of files of these names."""
    for name in names:
        for left in folder.glob(f".{name}.*.tmp"):
            left.unlink(missing_ok=True)
