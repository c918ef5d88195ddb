"""Reading a slab file into memory: threads read, check and send on, block after block.

Blocks for host memory are read where they will stay; blocks for the card pass through a few page-locked
buffers. While a block is read, memory for the next ones is mapped and page-locked, several times faster than
it is filled; the disk would wait for that only at first, so the largest blocks, tables of a vocabulary, come
last. There are twice as many threads as keep a disk busy, for at any time some check what they have read, or
wait for the card.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from executor.streaming.direct_io import THREADS, DirectFile, Staging, copied
from executor.streaming.slab_file import CHECKED_BYTES, BlockEntry, SlabFile, check_bytes, refuse

_READERS = 2 * THREADS
_PIECE_BYTES = 2 * CHECKED_BYTES
"""Read at a time: the more, the less often a reader has to wait for the interpreter."""

Place = Callable[[BlockEntry], torch.Tensor]
"""Memory for a block: 1-D uint8 on the host or on a card."""


class SlabReader:
    """Reads blocks of `slab` in the background from the moment it is made.

    `place`: called in a thread of its own, one block after the other.
    """

    def __init__(
        self, slab: SlabFile, blocks: Sequence[BlockEntry], place: Place, device: torch.device
    ) -> None:
        """Errors: `OSError` when the file cannot be opened."""
        self._slab, self._place, self._device = slab, place, device
        self._file = DirectFile(slab.path)
        self._staging = Staging(device, _READERS, _PIECE_BYTES) if device.type == "cuda" else None
        self._stopped, self._closed = threading.Event(), False
        self._targets: dict[int, torch.Tensor] = {}
        self._pieces: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="slab-reader")
        self._feeder = ThreadPoolExecutor(1, thread_name_prefix="slab-memory")
        self._fed = self._feeder.submit(self._feed, sorted(blocks, key=_last_what_is_large))

    def _feed(self, blocks: Sequence[BlockEntry]) -> None:
        for block in blocks:
            if self._stopped.is_set():
                return
            target = self._targets[block.offset] = self._place(block)
            read = self._read if self._staging is None or target.device.type == "cpu" else self._read_through
            for at in range(0, block.nbytes, _PIECE_BYTES):
                self._pieces.append(self._pool.submit(read, block, at, target[at : at + _PIECE_BYTES]))

    def _read(self, block: BlockEntry, at: int, target: torch.Tensor) -> None:
        if self._stopped.is_set():
            return
        if self._file.read(target, block.offset + at) < len(target):
            refuse(self._slab.path, "ends early: it was changed while it was read")
        check_bytes(self._slab.path, block, memoryview(target.numpy()), at)

    def _read_through(self, block: BlockEntry, at: int, target: torch.Tensor) -> None:
        assert self._staging is not None
        buffer = self._staging.take()
        try:
            piece = buffer[: len(target)]
            self._read(block, at, piece)
            with torch.cuda.device(self._device):
                target.copy_(piece, non_blocking=True)
                copied(self._device).synchronize()
        finally:
            self._staging.give(buffer)

    def wait(self) -> dict[int, torch.Tensor]:
        """Every block, by its offset in the file, once all are read and checked.

        Errors: `BadWeights` for damaged bytes, `OSError`, and whatever `place` raises.
        """
        try:
            self._fed.result()
            for piece in self._pieces:
                piece.result()
        finally:
            self.close()
        return self._targets

    def close(self) -> None:
        """Stop reading. The memory given by `place` is not touched any more when this returns."""
        if self._closed:
            return
        self._closed = True
        self._stopped.set()
        self._feeder.shutdown()
        self._pool.shutdown(cancel_futures=True)
        self._file.close()
        if self._staging is not None:
            self._staging.close()


def _last_what_is_large(block: BlockEntry) -> tuple[int, int]:
    return block.nbytes, block.offset
