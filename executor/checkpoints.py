"""Whole checkpoints only: each lists its files, and one that does not match its list is not resumed from.

A checkpoint appears in one rename after everything in it was flushed, so a kill or a power cut leaves none
that is cut short. What a failing disk does later is found here, and the checkpoint before is taken.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor import ui
from executor.files import write_atomically

if TYPE_CHECKING:
    from executor.output import OutputDirectory

FILES = "files.json"
_HASHED_BYTES = 32 * 2**20


def seal(folder: Path) -> None:
    """List the files of a checkpoint in it, with sizes and digests; the last thing before it is published."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    write_atomically(folder / FILES, json.dumps({name: _figures(folder / name) for name in names}))


def flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when it is as it was written."""
    try:
        listed = json.loads((folder / FILES).read_text())
        for name, figures in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != figures["bytes"]:
                return f"{name} has {path.stat().st_size} of {figures['bytes']} bytes"
            if _figures(path) != figures:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{FILES} cannot be read ({type(error).__name__})"
    return None


def last_whole(output: OutputDirectory) -> Path | None:
    """The newest checkpoint that is whole; damaged ones after it are named and removed."""
    found = output.checkpoints()
    while found:
        checkpoint = found.pop()
        wrong = flaw(checkpoint)
        if wrong is None:
            return checkpoint
        then = f"going back to {found[-1].name}" if found else "beginning again"
        ui.say(f"warning: {checkpoint} is damaged: {wrong}; {then}")
        shutil.rmtree(checkpoint)
    return None


def _figures(path: Path) -> dict[str, Any]:
    """Size, and SHA-256 of the first and last 32 MiB: hashing all of a large one takes too long."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        digest = hashlib.sha256(f.read(_HASHED_BYTES))
        f.seek(max(_HASHED_BYTES, size - _HASHED_BYTES))
        digest.update(f.read())
    return {"bytes": size, "sha256": digest.hexdigest()}
