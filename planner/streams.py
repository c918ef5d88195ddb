"""Standard streams that are closed, full or gone: a command's exit code stays its own."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def reopen_closed() -> None:
    """A shell's `>&-` leaves None where a stream was: what is printed then goes nowhere."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def forget(stream: TextIO) -> None:
    """What is still buffered for a stream that takes nothing more goes nowhere: a flush at exit would fail
    again, print, and change the exit code."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != stream.fileno():  # the lowest free number: that of the stream itself where it was closed
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    stream.flush()


def settle(stream: TextIO) -> None:
    """Flush `stream`; where that fails nothing of it is tried again at exit. Errors: `OSError`."""
    try:
        stream.flush()
    except OSError:
        forget(stream)
        raise


def tell(*lines: str) -> None:
    """Lines on stderr, or, where it takes none, nowhere: the exit code still tells."""
    try:
        for line in lines:
            print(line, file=sys.stderr)
        settle(sys.stderr)
    except OSError:
        forget(sys.stderr)
