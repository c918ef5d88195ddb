"""Writing a slab file block by block: copies off the device, checksums and disk run side by side.

The file grows as `NAME.partial` with a journal beside it that names every block once all bytes before its
end are written. Whatever ends the process, the next one compares the bytes with the journal's checksums and
goes on behind the last block that is whole. Only a finished file gets its header and its name.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from executor.errors import DirectoryInUse
from executor.files import flush
from executor.streaming.direct_io import THREADS, Copied, DirectFile, Staging, copied
from executor.streaming.slab import Layout, lay_out
from executor.streaming.slab_file import (
    CHECKED_BYTES,
    HEADER_BYTES,
    BlockEntry,
    Index,
    WeightEntry,
    digest_of,
    pack_header,
    pack_index,
    tensors_of,
)
from executor.streaming.slab_journal import Journal

_BUFFERS = 3 * THREADS
"""192 MiB: enough to write at full speed while the next layer is made."""


class SlabWriter:
    """Writes the slab file `path`, going on with what an earlier process has left of the same recipe."""

    def __init__(self, path: Path, recipe: dict[str, Any], device: torch.device) -> None:
        """Errors: `DirectoryInUse` when another process is writing it, `OSError`."""
        self.path, self._recipe, self._device = path, recipe, device
        self.partial = path.with_name(f"{path.name}.partial")
        self._file = DirectFile(self.partial, writable=True)
        self._lock = threading.Lock()
        self._failed: BaseException | None = None
        self._open: list[_Pending] = []
        kept: list[BlockEntry] | None = None
        try:
            self._acquire()
            self._journal = Journal(path.with_name(f"{path.name}.journal"), recipe)
            kept = self._journal.whole_blocks(self._file)
            os.ftruncate(self._file.handle, kept[-1].offset + kept[-1].nbytes if kept else HEADER_BYTES)
            self._journal.begin(kept)
        except BaseException:
            if kept == []:  # this is ours, and nothing in it is lost
                self.partial.unlink(missing_ok=True)
            self._file.close()
            raise
        self._blocks, self.tables = list(kept), self._journal.tables
        self._end = kept[-1].offset + kept[-1].nbytes if kept else HEADER_BYTES
        self._staging = Staging(device, _BUFFERS, CHECKED_BYTES)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="slab-writer")

    def _acquire(self) -> None:
        try:
            fcntl.flock(self._file.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryInUse(f"another process is writing {self.path}", "wait for it") from None
        try:
            same = os.path.samestat(os.fstat(self._file.handle), os.stat(self.partial))
        except FileNotFoundError:
            same = False
        if not same:  # between our opening and locking its writer has finished or removed it
            raise DirectoryInUse(f"another process has just written {self.path}", "run it again")

    @property
    def done(self) -> frozenset[str]:
        """Names of the weights in blocks that were there already or were added."""
        return frozenset(weight.name for block in self._blocks for weight in block.weights)

    @property
    def bytes(self) -> int:
        """Of the file so far."""
        return self._end

    @property
    def whole_bytes(self) -> int:
        """What the next process will find, up to the first block that is not written."""
        with self._lock:
            return self._open[0].entry.offset if self._open else self._end

    def number_of(self, table: torch.Tensor) -> int:
        """File a lookup table that weights refer to by its number."""
        entry = (str(table.dtype).removeprefix("torch."), bytes(table.cpu().view(torch.uint8).numpy()))
        if entry not in self.tables:
            self.tables.append(entry)
            self._journal.add_table(entry)
        return self.tables.index(entry)

    def add(self, layer: int | None, weights: Sequence[WeightEntry], tensors: Sequence[torch.Tensor]) -> None:
        """Write `tensors` as the next block. They may be dropped when this returns.

        Errors: whatever stopped the writing of this block or an earlier one.
        """
        layout = lay_out(tensors)
        entry = BlockEntry(
            layer=layer,
            offset=self._end,
            nbytes=layout.nbytes,
            checksums=[0] * -(-layout.nbytes // CHECKED_BYTES),
            tensors=tensors_of(layout),
            weights=list(weights),
        )
        self._end += layout.nbytes
        pending = _Pending(entry)
        with self._lock:
            self._open.append(pending)
            self._blocks.append(entry)
        images = [_image(tensor) for tensor in tensors]
        for number in range(len(entry.checksums)):
            buffer = self._staging.take()
            if self._failed is not None:
                self._staging.give(buffer)
                raise self._failed
            at = number * CHECKED_BYTES
            stretch = buffer[: min(CHECKED_BYTES, layout.nbytes - at)]
            _fill(stretch, at, layout, images)
            self._pool.submit(self._write, pending, number, stretch, buffer, copied(self._device))

    def _write(
        self, pending: _Pending, number: int, stretch: torch.Tensor, buffer: torch.Tensor, filled: Copied
    ) -> None:
        try:
            filled.synchronize()
            if self._failed is None:
                pending.entry.checksums[number] = digest_of(memoryview(stretch.numpy()))
                self._file.write(stretch, pending.entry.offset + number * CHECKED_BYTES)
                self._wrote_one(pending)
        except BaseException as error:
            self._failed = self._failed or error
        finally:
            self._staging.give(buffer)

    def _wrote_one(self, pending: _Pending) -> None:
        with self._lock:
            pending.left -= 1
            while self._open and self._open[0].left == 0:
                self._journal.add_block(self._open.pop(0).entry)

    def finish(self) -> int:
        """Complete the file and give it its name; returns its bytes. Errors: `OSError`."""
        self._pool.shutdown()
        if self._failed is not None:
            raise self._failed
        index = pack_index(Index(recipe=self._recipe, blocks=self._blocks, tables=self.tables))
        whole = self._end + len(index)
        self._file.write(_tensor(index), self._end)
        self._file.write(_tensor(pack_header(index, self._end, whole)), 0)
        self._file.flush()
        os.replace(self.partial, self.path)
        flush(self.path.parent)
        self._journal.remove()
        return whole

    def close(self) -> None:
        """Let go of everything; what is written stays for the next process to go on from."""
        self._failed = self._failed or RuntimeError("closed")
        self._pool.shutdown()
        if self.whole_bytes > HEADER_BYTES:
            self._journal.close()
        else:
            self._journal.remove()
            self.partial.unlink(missing_ok=True)
        self._file.close()
        self._staging.close()


class _Pending:
    """A block of which some stretches are not written yet."""

    def __init__(self, entry: BlockEntry) -> None:
        self.entry, self.left = entry, len(entry.checksums)


def _image(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as `lay_out` places them: in the order of memory where it is dense."""
    piece = lay_out([tensor]).pieces[0]
    if piece.nbytes and tuple(tensor.stride()) == piece.stride:
        return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _fill(stretch: torch.Tensor, at: int, layout: Layout, images: Sequence[torch.Tensor]) -> None:
    """Bytes `at` and following of a slab; what lies between tensors is zero."""
    end = 0
    for begin, part in _parts(at, at + len(stretch), layout, images):
        stretch[end:begin].zero_()
        end = begin + len(part)
        stretch[begin:end].copy_(part, non_blocking=True)
    stretch[end:].zero_()


def _parts(
    first: int, last: int, layout: Layout, images: Sequence[torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor]]:
    """What of each tensor lies in the bytes from `first` to `last`, and where."""
    for piece, image in zip(layout.pieces, images, strict=True):
        begin, end = max(first, piece.offset), min(last, piece.offset + piece.nbytes)
        if begin < end:
            yield begin - first, image[begin - piece.offset : end - piece.offset]


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
