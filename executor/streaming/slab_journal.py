"""The journal of a slab file in the making: its recipe, then every table and every block that is written.

A line each: its checksum and JSON. A line is written after the bytes it speaks of; since both may be lost
when power fails, a block counts only if its line is whole and its bytes still have the checksums named there.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch

from executor.files import write_atomically
from executor.streaming.direct_io import THREADS, DirectFile, aligned_memory
from executor.streaming.slab_file import CHECKED_BYTES, HEADER_BYTES, VERSION, BlockEntry, digest_of

Table = tuple[str, bytes]


class _Line(msgspec.Struct, omit_defaults=True):
    """One of its fields is set."""

    recipe: dict[str, Any] | None = None
    version: int | None = None
    table: Table | None = None
    block: BlockEntry | None = None


class Journal:
    """The journal at `path` for a file of this recipe."""

    def __init__(self, path: Path, recipe: dict[str, Any]) -> None:
        self.path, self._recipe = path, recipe
        self.tables: list[Table] = []
        self._file: Any = None

    def whole_blocks(self, file: DirectFile) -> list[BlockEntry]:
        """Blocks of an earlier process, up to the first that is not in `file` as it was written.

        None of a file of another recipe. Errors: `OSError`.
        """
        blocks, end = [], HEADER_BYTES
        for line in self._lines():
            if line.table is not None:
                self.tables.append(line.table)
            if line.block is not None and line.block.offset == end:
                blocks.append(line.block)
                end += line.block.nbytes
        with ThreadPoolExecutor(THREADS) as pool:
            for number, whole in enumerate(pool.map(lambda block: _is_whole(file, block), blocks)):
                if not whole:
                    pool.shutdown(cancel_futures=True)
                    return blocks[:number]
        return blocks

    def _lines(self) -> Iterator[_Line]:
        try:
            first, *rest = self.path.read_bytes().splitlines()
            head = _decoded(first)
            if head.recipe != self._recipe or head.version != VERSION:
                return
            for raw in rest:
                yield _decoded(raw)
        except (FileNotFoundError, ValueError, msgspec.DecodeError):
            return  # there is none, or this line is not as it was written

    def begin(self, kept: list[BlockEntry]) -> None:
        """Start the journal with what is kept. Errors: `OSError`."""
        lines = [_Line(recipe=self._recipe, version=VERSION)]
        lines += [_Line(table=table) for table in self.tables]
        lines += [_Line(block=block) for block in kept]
        write_atomically(self.path, b"".join(map(_encoded, lines)))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  closed by `close`

    def add_table(self, table: Table) -> None:
        """Errors: `OSError`."""
        self._file.write(_encoded(_Line(table=table)))

    def add_block(self, block: BlockEntry) -> None:
        """Errors: `OSError`."""
        self._file.write(_encoded(_Line(block=block)))

    def close(self) -> None:
        """Keep it for the next process."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """The file is finished."""
        self.close()
        self.path.unlink(missing_ok=True)


def _encoded(line: _Line) -> bytes:
    text = msgspec.json.encode(line)
    return b"%016x %b\n" % (digest_of(text), text)


def _decoded(raw: bytes) -> _Line:
    """Errors: `ValueError` for a line that was cut or damaged."""
    checksum, _, text = raw.partition(b" ")
    if int(checksum, 16) != digest_of(text):
        raise ValueError("not the line that was written")
    return msgspec.json.decode(text, type=_Line)


def _is_whole(file: DirectFile, block: BlockEntry) -> bool:
    buffer = aligned_memory(min(CHECKED_BYTES, block.nbytes))
    for number, checksum in enumerate(block.checksums):
        at = number * CHECKED_BYTES
        stretch: torch.Tensor = buffer[: min(CHECKED_BYTES, block.nbytes - at)]
        if file.read(stretch, block.offset + at) < len(stretch):
            return False
        if digest_of(memoryview(stretch.numpy())) != checksum:
            return False
    return True
