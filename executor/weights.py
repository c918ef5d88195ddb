"""Looking at safetensors before anything heavy is imported: missing shards, truncated files, foreign formats.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the data; the header
gives every tensor's dtype, shape and byte range, so a file that was cut short shows itself without reading
the data. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from executor.errors import BadWeights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000
_ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    "F4": 4,
}
_FLOATS = {"F64", "F32", "BF16", "F16"}
_AGAIN = "download the file again"


@dataclass(frozen=True)
class Tensor:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


def check_weights(folder: Path) -> int:
    """Bytes of all weight files of the model in `folder`, after checking that each is whole.

    Errors: `BadWeights` naming the file, and the tensor where one is cut off or missing.
    """
    files = weight_files(folder)
    read_headers(folder)
    return sum(path.stat().st_size for path in files)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the loader will read, all of them in `folder`.

    Errors: `BadWeights` when one is missing or lies elsewhere, or there is none.
    """
    expected = _index(folder)
    if not expected:
        if not (folder / SINGLE).is_file():
            raise _no_weights(folder)
        return [folder / SINGLE]
    files = []
    for name in sorted(set(expected.values())):
        if Path(name).name != name or "\\" in name or "\0" in name:
            raise BadWeights(f"{folder / INDEX} names a file outside its folder: {name[:100]!r}")
        if not (folder / name).is_file():
            raise BadWeights(
                f"{folder / name} is missing",
                "download the model again; every shard of the index must be there",
            )
        files.append(folder / name)
    return files


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the model in `folder` by name.

    Errors: `BadWeights` for a file that is cut short, malformed or lacks a tensor the index promises.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        found |= _tensors(path)
    for tensor, name in _index(folder).items():
        if tensor not in found:
            raise BadWeights(f"{folder / name} lacks the tensor {tensor}", _AGAIN)
    return found


def refuse_packed_numbers(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Errors: `BadWeights` for a weight stored as integers or in 8 bits where config.json speaks of no
    quantization: it would be read as plain numbers."""
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dtype not in _FLOATS:
            raise BadWeights(
                f"{tensor.file}: {name} is stored as {tensor.dtype} and {folder / 'config.json'} names no "
                "quantization",
                "take the model's 16-bit weights",
            )


def _index(folder: Path) -> dict[str, str]:
    file = folder / INDEX
    if (folder / SINGLE).exists() or not file.exists():
        return {}
    try:
        weight_map = json.loads(file.read_bytes())["weight_map"]
        found = {str(k): v for k, v in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = {}
    if not found or not all(isinstance(v, str) for v in found.values()):
        raise BadWeights(f"cannot read {file}", "download it again")
    return found


def _no_weights(folder: Path) -> BadWeights:
    foreign = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in folder.glob(pattern))
    if foreign:
        return BadWeights(
            f"{folder} has no safetensors weights, only {foreign[0]}",
            "only safetensors are loaded; convert the weights",
        )
    return BadWeights(
        f"{folder} has no weights (no {SINGLE})",
        "`executor rehearse` runs the plan with random weights",
    )


# --------------------------------------------------------------------------- one file


def _tensors(path: Path) -> dict[str, Tensor]:
    header, start, size = _header(path)
    found = {}
    at = 0
    spans = []
    for name, entry in header.items():
        if name != "__metadata__":
            dtype, shape, first, last = _entry(path, name, entry)
            spans.append((first, last, name))
            found[name] = Tensor(dtype, shape, path)
    for first, last, name in sorted(spans):
        if start + last > size:
            _bad(
                f"{path} is truncated: {name} ends at byte {start + last}, the file at {size}",
            )
        if first != at:
            _bad(f"{path}: the bytes of {name} do not begin where the tensor before it ends")
        at = last
    if start + at != size:
        _bad(f"{path} has {size - start - at} bytes more than its header describes")
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first byte and the byte after the last."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
    except (KeyError, TypeError, ValueError):
        _bad(f"{path}: the header entry of {name} is malformed")
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in numbers):
        _bad(f"{path}: the header entry of {name} is malformed")
    elements = 1
    for length in shape:
        elements *= length
    bits = _ITEM_BITS.get(dtype)
    if last < first or (bits is not None and elements * bits != (last - first) * 8):
        _bad(f"{path}: the shape of {name} does not match its bytes")
    return dtype, tuple(shape), first, last


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begin, and the size of the file."""
    try:
        with open(path, "rb") as f:
            size = path.stat().st_size
            prefix = f.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _LARGEST_HEADER:
                _bad(f"{path} is no safetensors file")
            raw = f.read(length)
    except OSError as error:
        _bad(f"cannot read {path}: {error.strerror}")
    if len(raw) < length:
        _bad(f"{path} is truncated inside its header")
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        _bad(f"{path} is no safetensors file: its header is not JSON")
    return header, 8 + length, size


def _bad(text: str) -> NoReturn:
    raise BadWeights(text, _AGAIN)
