"""A model's weights as a file: every layer one slab, ready to be read straight into the memory it runs from.

Format 1, all numbers little-endian:

    0        header, one block of 4096 bytes: magic, version, place, size and checksum of the index, size of
             the file, checksum of what stands before
    4096     blocks, one after another: a slab (`slab.Layout`) for every layer, and one for every weight
             that is in no slab (embeddings, norms, head)
    last     index, JSON (`Index`), padded to a multiple of 4096 bytes

What is guaranteed: every block begins at a multiple of 4096 and its size is a multiple of 4096, so that
direct reads (`O_DIRECT`) of a block, or of any part of it cut at multiples of 4096, need no bounce buffer;
the size of the file is a multiple of 4096 too. Blocks stand in the order the weights were loaded in, which
is that of the layers in all but exotic models: `SlabFile.layers` gives each its place. Checksums (XXH3, 64
bits) are of stretches of `CHECKED_BYTES` within a block, the last one shorter: a reader can check what it
has read without reading all. The header is written last: a file without it is unfinished.
"""

from __future__ import annotations

import os
import struct
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
import xxhash

from executor.errors import BadWeights
from executor.streaming.slab import SLAB_ALIGNMENT, Layout, Piece

MAGIC = b"FWSLAB\r\n"
VERSION = 1
CHECKED_BYTES = 16 * 2**20
HEADER_BYTES = SLAB_ALIGNMENT
SUFFIX = ".slab"
_HEADER = struct.Struct("<8sIIQQQQ")
"""Magic, version, zero, offset and size and checksum of the index, size of the file."""
_LARGEST_INDEX = 2**30


class WeightEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One parameter or buffer of the model and where its tensors are."""

    name: str
    """As the model names it."""
    pieces: int
    """How many pieces of the block are its own; they follow those of the weight before."""
    form: dict[str, Any] = {}
    """What it takes besides the pieces to make the parameter (`executor.streaming.forms`)."""


class BlockEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One block of the file."""

    layer: int | None
    """Number of the layer; None for a weight that is in no layer's slab."""
    offset: int
    nbytes: int
    checksums: list[int]
    """Of stretches of `CHECKED_BYTES`."""
    tensors: list[tuple[str, tuple[int, ...], tuple[int, ...], int, int]]
    """dtype, shape, stride, offset in the block, bytes: one `Piece` each."""
    weights: list[WeightEntry]

    @property
    def layout(self) -> Layout:
        """Where each tensor is in the block. Equal for layers of equal shapes."""
        pieces = [
            Piece(getattr(torch, dtype), shape, stride, offset, nbytes)
            for dtype, shape, stride, offset, nbytes in self.tensors
        ]
        return Layout(tuple(pieces), self.nbytes)


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What the file holds."""

    recipe: dict[str, Any]
    """What the bytes were made from, and how (`executor.streaming.recipe`)."""
    blocks: list[BlockEntry]
    tables: list[tuple[str, bytes]] = []
    """Lookup tables that weights share, as dtype and bytes."""


class SlabLayer:
    """One layer of a slab file: `nbytes` bytes of `path` from `offset`, both multiples of 4096."""

    def __init__(self, path: Path, entry: BlockEntry) -> None:
        self.path, self.entry = path, entry
        self.offset, self.nbytes = entry.offset, entry.nbytes

    @cached_property
    def layout(self) -> Layout:
        """Where each tensor is in the slab."""
        return self.entry.layout

    def check(self, block: Any, begin: int = 0) -> None:
        """Compare bytes of the layer, from its byte `begin` (a multiple of `CHECKED_BYTES`), with the file's
        checksums. `block`: whole stretches, or all to the layer's end; anything with the buffer interface.

        Errors: `BadWeights` naming the file.
        """
        check_bytes(self.path, self.entry, block, begin)


class SlabFile:
    """An opened slab file. Its bytes are read by who needs them; nothing here holds the file open."""

    def __init__(self, path: Path, index: Index, nbytes: int) -> None:
        self.path, self.index, self.nbytes = path, index, nbytes

    @classmethod
    def open(cls, path: Path) -> SlabFile:
        """Read header and index.

        Errors: `BadWeights` for a file that is unfinished, cut short, damaged or of another version;
        `OSError` where it cannot be opened.
        """
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            offset, nbytes, checksum, whole = _read_header(path, file.read(HEADER_BYTES))
            if size < whole:
                refuse(path, f"is truncated: {size} of {whole} bytes")
            file.seek(offset)
            raw = file.read(nbytes)
        if digest_of(raw) != checksum:
            refuse(path, "is damaged: its index is not what was written")
        try:
            return cls(path, msgspec.json.decode(raw, type=Index), whole)
        except msgspec.DecodeError as error:
            refuse(path, f"was written by another program: {error}")

    def check(self) -> None:
        """Read every block and compare it with its checksums. Errors: `BadWeights`; `OSError`."""
        with open(self.path, "rb") as file:
            for entry in self.index.blocks:
                for begin in range(0, entry.nbytes, CHECKED_BYTES):
                    file.seek(entry.offset + begin)
                    block = file.read(min(CHECKED_BYTES, entry.nbytes - begin))
                    check_bytes(self.path, entry, block, begin)

    @cached_property
    def layers(self) -> tuple[SlabLayer, ...]:
        """Every layer of the model, in its order."""
        found = [entry for entry in self.index.blocks if entry.layer is not None]
        return tuple(SlabLayer(self.path, entry) for entry in sorted(found, key=_number))

    @property
    def others(self) -> tuple[BlockEntry, ...]:
        """Blocks of what is in no layer's slab."""
        return tuple(entry for entry in self.index.blocks if entry.layer is None)


def _number(entry: BlockEntry) -> int:
    assert entry.layer is not None
    return entry.layer


def digest_of(data: Any) -> int:
    """XXH3 of bytes, 64 bits."""
    return int(xxhash.xxh3_64_intdigest(data))


def checksums_of(block: Any) -> list[int]:
    """Of a whole block, stretch by stretch."""
    view = memoryview(block)
    return [digest_of(view[at : at + CHECKED_BYTES]) for at in range(0, len(view), CHECKED_BYTES)]


def check_bytes(path: Path, entry: BlockEntry, block: Any, begin: int = 0) -> None:
    """See `SlabLayer.check`."""
    first = begin // CHECKED_BYTES
    found = checksums_of(block)
    if found == entry.checksums[first : first + len(found)]:
        return
    what = f"layer {entry.layer}" if entry.layer is not None else entry.weights[0].name
    refuse(path, f"is damaged: the bytes of {what} are not what was written")


def pack_header(index: bytes, index_offset: int, file_bytes: int) -> bytes:
    """The first block of a file."""
    head = _HEADER.pack(MAGIC, VERSION, 0, index_offset, len(index), digest_of(index), file_bytes)
    return (head + struct.pack("<Q", digest_of(head))).ljust(HEADER_BYTES, b"\0")


def pack_index(index: Index) -> bytes:
    """The last block of a file."""
    raw = msgspec.json.encode(index)
    return raw + b" " * (-len(raw) % SLAB_ALIGNMENT)


def tensors_of(layout: Layout) -> list[tuple[str, tuple[int, ...], tuple[int, ...], int, int]]:
    """A layout as the index holds it."""
    return [
        (str(piece.dtype).removeprefix("torch."), piece.shape, piece.stride, piece.offset, piece.nbytes)
        for piece in layout.pieces
    ]


def _read_header(path: Path, raw: bytes) -> tuple[int, int, int, int]:
    """Offset, size and checksum of the index, and the file's size."""
    if len(raw) < HEADER_BYTES or raw[: len(MAGIC)] != MAGIC:
        refuse(path, "is no slab file, or an unfinished one")
    _magic, version, _, offset, nbytes, checksum, whole = _HEADER.unpack_from(raw)
    if version != VERSION:
        refuse(path, f"has version {version} of the format; this is version {VERSION}")
    (found,) = struct.unpack_from("<Q", raw, _HEADER.size)
    if found != digest_of(raw[: _HEADER.size]) or nbytes > _LARGEST_INDEX or offset + nbytes != whole:
        refuse(path, "is damaged: its header is not what was written")
    return offset, nbytes, checksum, whole


def refuse(path: Path, what: str) -> NoReturn:
    """Errors: `BadWeights`, always."""
    raise BadWeights(
        f"slab file {path.resolve()} {what}", "remove it; `executor pack` or --pack makes it again"
    )
