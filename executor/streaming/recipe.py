"""What the bytes of a slab file were made from, and how: two files of one recipe hold the same bytes.

A checkpoint is known by its config and, for every weight file, by size, time of change and a digest over
the header and a sample of every tensor: a training step changes every tensor, an edit in place the time.
Files in the Hub's cache are named by the digest of their content, which stands for the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from executor.merge_write import Shard, read_shards
from executor.source import ModelSource
from planner.types import Strategy

LAYOUT = 1
"""Raised whenever this program lays the same weights out in other bytes."""
_SAMPLE_BYTES = 4096
_THREADS = 8
_BLOB = re.compile(r"[0-9a-f]{64}")


def recipe_of(source: ModelSource, strategy: Strategy, device_type: str, seed: int) -> dict[str, Any]:
    """The recipe of `source` in the precision of `strategy`, quantized on a device of that type.

    Errors: `BadWeights` where a weight file is malformed.
    """
    quantized = strategy.quant != "none"
    recipe = {
        "layout": LAYOUT,
        "weights": _random(source, device_type, seed)
        if source.folder is None
        else _checkpoint(source.folder),
        "dtype": strategy.dtype,
        "quant": strategy.quant,
        "quant_experts": strategy.quant_experts,
        "quantizer": f"bitsandbytes {version('bitsandbytes')} on {device_type}" if quantized else None,
        "transformers": ".".join(version("transformers").split(".")[:2]),
    }
    return json.loads(json.dumps(recipe))  # type: ignore[no-any-return]  # as a file gives it back


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """In words, how the recipe of a file differs from the wanted one; None where they are equal."""
    if found == wanted:
        return None
    theirs, ours = found.get("weights", {}), wanted["weights"]
    for name in ("quant", "dtype", "quant_experts", "quantizer", "transformers", "layout"):
        if found.get(name) != wanted[name]:
            return f"packed with {name} {found.get(name)}, now {wanted[name]}"
    for name, what in (("random", "random weights"), ("config", "a model of another config.json")):
        if theirs.get(name) != ours.get(name):
            return f"packed from {what if theirs.get(name) else 'a checkpoint'}"
    changed = {file[0] for file in theirs.get("files", ())} ^ {file[0] for file in ours.get("files", ())}
    changed |= {a[0] for a, b in zip(theirs.get("files", ()), ours.get("files", ()), strict=False) if a != b}
    return f"packed before {min(changed)} changed" if changed else "packed from other weights"


def _random(source: ModelSource, device_type: str, seed: int) -> dict[str, Any]:
    """Seeded random weights: the generators differ between devices and may between versions of torch."""
    made = f"torch {version('torch')} on {device_type}, seed {seed}"
    return {"random": made, "config": _digest(json.dumps(source.config, sort_keys=True, default=str))}


def _checkpoint(folder: Path) -> dict[str, Any]:
    files = [_identity(shard) for shard in read_shards(folder)]
    return {"config": _digest((folder / "config.json").read_bytes()), "files": files}


def _identity(shard: Shard) -> list[Any]:
    """Name, bytes, time of change or the Hub's name, digest of samples."""
    status = shard.path.stat()
    real = Path(os.path.realpath(shard.path))
    blob = real.name if real.parent.name == "blobs" and _BLOB.fullmatch(real.name) else None
    return [shard.path.name, status.st_size, blob or status.st_mtime_ns, _samples(shard)]


def _samples(shard: Shard) -> str:
    """Digest of the header and the middle of every tensor."""
    header = json.dumps([shard.metadata, [(n, t.dtype, t.shape, t.start) for n, t in shard.tensors.items()]])
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    with open(shard.path, "rb") as file:

        def sample(place: tuple[int, int]) -> bytes:
            return os.pread(file.fileno(), place[1], place[0])

        with ThreadPoolExecutor(_THREADS) as pool:
            for piece in pool.map(sample, _places(shard)):
                digest.update(piece)
    return digest.hexdigest()


def _places(shard: Shard) -> Iterator[tuple[int, int]]:
    """Offset and length of every sample."""
    for stored in shard.tensors.values():
        length = min(stored.bytes, _SAMPLE_BYTES)
        yield stored.start + (stored.bytes - length) // 2, length


def _digest(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()
