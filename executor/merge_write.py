"""Writing a changed checkpoint, tensor by tensor: what does not change is copied by the kernel, unread.

Every output file has the tensors of its source file in the same order; new tensors follow the one they are
made from. Host memory holds one tensor and what its change needs, never a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from executor.errors import BadWeights
from executor.merge_plan import Changes
from executor.weights import weight_files

if TYPE_CHECKING:
    import torch

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Of its bytes, from the beginning of the file."""
    bytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    path: Path
    metadata: Any
    tensors: dict[str, Stored]
    """In the order of their bytes."""


def read_shards(folder: Path) -> list[Shard]:
    """The weight files of a checkpoint that `check_weights` has found whole."""
    return [_read_shard(path) for path in weight_files(folder)]


def _read_shard(path: Path) -> Shard:
    with open(path, "rb") as f:
        length = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(length))
    metadata = header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    tensors = {}
    for name, entry in entries:
        first, last = entry["data_offsets"]
        tensors[name] = Stored(entry["dtype"], tuple(entry["shape"]), 8 + length + first, last - first)
    return Shard(path, metadata, tensors)


def refuse_quantized(shards: Iterable[Shard], changes: Changes) -> None:
    """Errors: `BadWeights` where a change is for a tensor that is stored in fewer than 16 bits."""
    sources = {*changes.changed, *(source for source, _ in changes.added.values())}
    for shard in shards:
        for name, stored in shard.tensors.items():
            if name in sources and stored.dtype not in _FLOATS:
                raise BadWeights(
                    f"{shard.path}: {name} is stored as {stored.dtype}, and adapters fold into 16 or 32 bits",
                    "give the checkpoint before quantization as --base",
                )


def write_shard(shard: Shard, changes: Changes, target: Path, done: Callable[[int], None]) -> list[str]:
    """Write `shard` with its changes; `done` is told the bytes of each tensor. Returns all tensors' names."""
    layout = dict(_layout(shard, changes))
    with open(shard.path, "rb") as source, open(target, "wb") as out:
        out.write(_header(shard, layout))
        for name, (stored, change) in layout.items():
            if change is None:
                _copy(source, out, stored)
            else:
                out.write(_bytes_of(change(_read(source, stored)), stored, name))
                _give_back_memory()
            done(stored.bytes)
        out.flush()
        os.fsync(out.fileno())
    return list(layout)


def _layout(shard: Shard, changes: Changes) -> Iterable[tuple[str, tuple[Stored, Any]]]:
    new: dict[str, list[tuple[str, Any]]] = {}
    for name, (made_from, change) in changes.added.items():
        new.setdefault(made_from, []).append((name, change))
    for name, stored in shard.tensors.items():
        yield name, (stored, changes.changed.get(name))
        for added, change in new.get(name, ()):
            yield added, (stored, change)


def _header(shard: Shard, layout: dict[str, tuple[Stored, Any]]) -> bytes:
    header: dict[str, Any] = {} if shard.metadata is None else {"__metadata__": shard.metadata}
    offset = 0
    for name, (stored, _) in layout.items():
        end = offset + stored.bytes
        header[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers want the data aligned
    return struct.pack("<Q", len(text)) + text


def _copy(source: BinaryIO, out: BinaryIO, stored: Stored) -> None:
    out.flush()
    offset, left = stored.start, stored.bytes
    while left:
        sent = os.sendfile(out.fileno(), source.fileno(), offset, left)
        if sent == 0:
            raise BadWeights(f"{source.name} ends early: it was changed while it was read")
        offset, left = offset + sent, left - sent
    out.seek(0, os.SEEK_END)


def _read(source: BinaryIO, stored: Stored) -> torch.Tensor:
    import torch

    data = bytearray(stored.bytes)
    source.seek(stored.start)
    if source.readinto(data) != stored.bytes:
        raise BadWeights(f"{source.name} ends early: it was changed while it was read")
    if not data:
        return torch.empty(stored.shape, dtype=getattr(torch, _FLOATS[stored.dtype]))
    return torch.frombuffer(data, dtype=getattr(torch, _FLOATS[stored.dtype])).view(stored.shape)


def _bytes_of(tensor: torch.Tensor, stored: Stored, name: str) -> memoryview:
    import torch

    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise BadWeights(f"{name} is not finite after merging: the adapter or the base holds broken numbers")
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    assert flat.numel() == stored.bytes, name
    return memoryview(flat.numpy())


def _give_back_memory() -> None:
    """Return freed memory to the system: glibc keeps what lies between matrices of changing sizes, and over a
    whole checkpoint that adds up to the checkpoint."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
