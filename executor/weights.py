"""Looking at safetensors before anything heavy is imported: missing shards, truncated files, foreign formats.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the data; the header
gives every tensor's dtype, shape and byte range, so a file that was cut short shows itself without reading
the data. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from executor.errors import BadWeights

_LARGEST_HEADER = 100_000_000
_ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    "F4": 4,
}


def check_weights(folder: Path) -> int:
    """Bytes of all weight files of the model in `folder`, after checking that each is whole.

    Errors: `BadWeights` naming the file, and the tensor where one is cut off or missing.
    """
    expected = _index(folder)
    files = sorted(set(expected.values())) if expected else ["model.safetensors"]
    if not expected and not (folder / "model.safetensors").exists():
        raise _no_weights(folder)
    present: set[str] = set()
    total = 0
    for name in files:
        path = folder / name
        if Path(name).name != name:
            raise BadWeights(
                f"{folder / 'model.safetensors.index.json'} names a file outside its folder: {name!r}"
            )
        if not path.exists():
            raise BadWeights(
                f"{path} is missing", "download the model again; every shard of the index must be there"
            )
        present.update(_tensors(path))
        total += path.stat().st_size
    for tensor, name in expected.items():
        if tensor not in present:
            raise BadWeights(f"{folder / name} lacks the tensor {tensor}", "download the file again")
    return total


def _index(folder: Path) -> dict[str, str]:
    file = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not file.exists():
        return {}
    try:
        weight_map = json.loads(file.read_text())["weight_map"]
        return {str(k): str(v) for k, v in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadWeights(f"cannot read {file}", "download it again") from None


def _no_weights(folder: Path) -> BadWeights:
    foreign = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in folder.glob(pattern))
    if foreign:
        return BadWeights(
            f"{folder} has no safetensors weights, only {foreign[0]}",
            "only safetensors are loaded; convert the weights",
        )
    return BadWeights(
        f"{folder} has no weights (no model.safetensors)",
        "`executor rehearse` runs the plan with random weights",
    )


def _tensors(path: Path) -> list[str]:
    header, start = _header(path)
    size = path.stat().st_size
    names = []
    end = start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            first, last = entry["data_offsets"]
            bits = _ITEM_BITS.get(entry["dtype"])
            elements = 1
            for length in entry["shape"]:
                elements *= length
        except (KeyError, TypeError, ValueError):
            raise BadWeights(
                f"{path}: the header entry of {name} is malformed", "download the file again"
            ) from None
        if first < 0 or last < first or (bits is not None and elements * bits != (last - first) * 8):
            raise BadWeights(
                f"{path}: the shape of {name} does not match its bytes", "download the file again"
            )
        if start + last > size:
            raise BadWeights(
                f"{path} is truncated: {name} ends at byte {start + last}, the file at {size}",
                "download the file again",
            )
        end = max(end, start + last)
        names.append(name)
    if end != size:
        raise BadWeights(
            f"{path} has {size - end} bytes more than its header describes", "download the file again"
        )
    return names


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _LARGEST_HEADER:
            raise BadWeights(f"{path} is no safetensors file", "download the file again")
        raw = f.read(length)
    if len(raw) < length:
        raise BadWeights(f"{path} is truncated inside its header", "download the file again")
    try:
        header = json.loads(raw)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise BadWeights(f"{path} is no safetensors file: its header is not JSON", "download the file again")
    return header, 8 + length
