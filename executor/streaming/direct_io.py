"""Files read and written past the page cache where the file system allows it.

Direct transfers need memory, offset and length at multiples of 4096; anything else, and everything on file
systems without them, goes through the page cache. The currency is the 1-D uint8 CPU tensor.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from executor.streaming.arena import Arena

ALIGNMENT = 4096
THREADS = 4
"""More than two keep an NVMe disk busy; more than eight have not been seen to help."""
STRETCH_BYTES = 16 * 2**20
SWITCH_SECONDS = 0.0002
"""The interpreter's switch interval while threads move bytes. One that is ready waits that long for a busy
thread, several times for each stretch; the default of 5 ms is about what a disk takes for a stretch."""


@contextmanager
def switching_fast() -> Iterator[None]:
    """Within, threads that read and write are not held up by Python that builds or quantizes a model."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def aligned_memory(nbytes: int) -> torch.Tensor:
    """Pageable memory that begins at a page."""
    return torch.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=torch.uint8)[:nbytes]


class DirectFile:
    """An open file. Methods may be called by several threads at once."""

    def __init__(self, path: Path, writable: bool = False) -> None:
        """`writable`: made if it is not there; no link is followed, for it may lead to a file of other worth.

        Errors: `OSError`.
        """
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW if writable else os.O_RDONLY
        flags |= os.O_CLOEXEC
        self._plain = os.open(path, flags, 0o644)
        self._direct: int | None = None
        self._opened = [self._plain]
        direct = getattr(os, "O_DIRECT", 0)
        if direct:
            try:
                self._direct = os.open(path, flags | direct)
                self._opened.append(self._direct)
            except OSError:
                self._direct = None  # a file system without direct transfers, like some in memory

    @property
    def handle(self) -> int:
        """Of the way through the page cache."""
        return self._plain

    def size(self) -> int:
        """In bytes, now."""
        return os.fstat(self._plain).st_size

    def read(self, target: torch.Tensor, offset: int) -> int:
        """Fill `target` with what stands at `offset`; the bytes read are fewer only at the end of the file.

        Errors: `OSError`.
        """
        view, done = memoryview(target.numpy()), 0
        while done < len(view):
            handle = self._handle_for(target.data_ptr() + done, offset + done, len(view) - done)
            try:
                count = os.preadv(handle, [view[done:]], offset + done)
            except OSError as error:
                self._no_direct(handle, error)
                continue
            if count == 0:
                break
            done += count
        return done

    def write(self, source: torch.Tensor, offset: int) -> None:
        """Write all of `source` at `offset`. Errors: `OSError`."""
        view, done = memoryview(source.numpy()), 0
        while done < len(view):
            handle = self._handle_for(source.data_ptr() + done, offset + done, len(view) - done)
            try:
                done += os.pwritev(handle, [view[done:]], offset + done)
            except OSError as error:
                self._no_direct(handle, error)

    def _handle_for(self, address: int, offset: int, length: int) -> int:
        direct = self._direct
        return self._plain if direct is None or (address | offset | length) % ALIGNMENT else direct

    def _no_direct(self, handle: int, error: OSError) -> None:
        """Go on through the page cache where the file system refuses direct transfers after all."""
        if handle == self._plain or error.errno != errno.EINVAL:
            raise error
        self._direct = None

    def flush(self) -> None:
        """Have everything on the disk. Errors: `OSError`."""
        os.fsync(self._plain)

    def close(self) -> None:
        """No method may be at work."""
        for handle in self._opened:
            os.close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Copied(Protocol):
    """The end of the copies that were asked for before it was made."""

    def query(self) -> bool:
        """Has it come?"""

    def synchronize(self) -> None:
        """Wait for it."""


class _AtOnce:
    """Copies within host memory have ended when the call that asks for them returns."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


def copied(device: torch.device) -> Copied:
    """The end of the copies between host and `device` that this thread has asked for."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else _AtOnce()


class Staging:
    """`count` buffers of `nbytes` bytes between disk and device, page-locked where there is a card."""

    def __init__(self, device: torch.device, count: int, nbytes: int = STRETCH_BYTES) -> None:
        self._arena = Arena(device)
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(self._arena.take(nbytes) if device.type == "cuda" else aligned_memory(nbytes))

    def take(self) -> torch.Tensor:
        """A free buffer; waits for one."""
        return self._free.get()

    def give(self, buffer: torch.Tensor) -> None:
        """`buffer` is free again."""
        self._free.put(buffer)

    def close(self) -> None:
        """Unlock the memory; no buffer may be in use."""
        self._arena.close()
