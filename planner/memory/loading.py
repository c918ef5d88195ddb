"""What quantizing while loading leaves over in the allocator's blocks, in transformers' order of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from planner.memory.segments import Block, Segments
from planner.memory.tape import ALIGNMENT
from profiles.schema import Architecture, Layer, Linear

WATCHED = 96
"""Quantized matrices that are followed for what is handed out unasked; what the later half of them leaves
over goes for the rest."""
FOLLOWED = 300
"""Quantized matrices that are followed for holes; those of the others are like theirs."""


class Loaded(NamedTuple):
    """A matrix as the loader meets it. Smaller tensors leave nothing over and are not looked at."""

    elements: int
    width: int
    quantized: bool = False
    transposed: bool = False


@lru_cache(maxsize=1024)
def unasked_bytes(arch: Architecture, quant: str, width: int) -> int:
    """Bytes booked beside the quantized weights themselves.

    Right to 0.2 % of the whole load on 45 models of the accuracy grid, where they are up to 10 % of it.
    """
    if quant == "none":
        return 0
    segments, matrices, every = _begun(arch, quant, width)
    return _followed(segments, matrices, quant, every) if every else 0


@lru_cache(maxsize=1024)
def load_holes(arch: Architecture, quant: str, width: int) -> tuple[int, ...]:
    """Free blocks of more than 1 MiB that loading leaves in segments with weights."""
    if quant == "none":
        return ()
    segments, matrices, every = _begun(arch, quant, width)
    seen = 0
    for item in matrices:
        _load(segments, item, quant)
        seen += item.quantized
        if seen == FOLLOWED < every:
            # the largest is what was reserved at first for the matrices still to come
            return tuple(segments.holes()[:-1] * round(every / seen))
    return tuple(segments.holes())


def _begun(arch: Architecture, quant: str, width: int) -> tuple[Segments, Iterator[Loaded], int]:
    """The block that transformers reserves first, with embeddings and head in it; the layers' matrices that
    follow, and how many of them are quantized."""
    layers = [_matrices(layer, width) for layer in arch.kinds]
    packed = 0.5 if quant == "nf4" else 1.0
    first = [Loaded(arch.head.parameters, width)] if arch.head else []
    first += [Loaded(item.elements, width) for item in arch.embeddings]
    whole = sum(item.elements * item.width for item in first)
    sizes = [sum(x.elements * (packed if x.quantized else x.width) for x in layer) for layer in layers]
    segments = Segments(int(whole + sum(sizes[kind] for kind in arch.order)))
    for item in first:
        segments.request(item.elements * item.width)
    every = sum(sum(x.quantized for x in layers[kind]) for kind in arch.order)
    return segments, (x for kind in arch.order for x in layers[kind]), every


def _load(segments: Segments, item: Loaded, quant: str) -> None:
    if not item.quantized:
        segments.request(item.elements * item.width)
    elif quant == "nf4":
        _pack_4bit(segments, item)
    else:
        _pack_8bit(segments, item)


def _followed(segments: Segments, matrices: Iterator[Loaded], quant: str, every: int) -> int:
    seen = halfway = 0
    for item in matrices:
        _load(segments, item, quant)
        seen += item.quantized
        if item.quantized and seen == WATCHED // 2:
            halfway = segments.unasked
        elif item.quantized and seen == WATCHED:
            more = (segments.unasked - halfway) * (every - seen) // (seen - WATCHED // 2)
            return segments.unasked + more // ALIGNMENT * ALIGNMENT
    return segments.unasked


def _pack_4bit(segments: Segments, item: Loaded) -> None:
    """bitsandbytes `quantize_4bit` with double quantization: scales and packed weight are made, the scales
    less their mean are quantized, then they and the matrix go."""
    n, scales = item.elements, item.elements // 16
    held: list[tuple[Block | None, int]] = [(segments.request(n * item.width), n * item.width)]
    if item.transposed:
        held.append((segments.request(n * item.width), n * item.width))
    held.append((segments.request(scales), scales))
    segments.request(n // 2)
    centred = segments.request(scales)
    segments.request(n // 64)
    segments.give(centred, scales)
    for block, size in reversed(held):
        segments.give(block, size)


def _pack_8bit(segments: Segments, item: Loaded) -> None:
    """bitsandbytes `Int8Params._quantize`: a 16-bit copy beside the matrix, and its int8 rows."""
    n = item.elements
    matrix, copy = segments.request(n * item.width), segments.request(2 * n)
    segments.request(n)
    segments.give(copy, 2 * n)
    segments.give(matrix, n * item.width)


@lru_cache(maxsize=4096)
def _matrices(layer: Layer, width: int) -> tuple[Loaded, ...]:
    """Everything of a layer that can be large, in the order of its names."""
    named: list[tuple[str, Loaded]] = []

    def see(item: Linear, name: str = "") -> None:
        size = item.inputs * item.outputs
        named.append((name or item.name, Loaded(size, width, item.quantized, item.transposed)))

    for item in (*layer.attention.linears, *layer.feed_forward.linears, *layer.linears):
        see(item)
    experts = layer.feed_forward.experts
    parameters = [*layer.parameters, *layer.attention.parameters, *layer.feed_forward.parameters]
    if experts is not None:
        parameters += experts.parameters
        for item in experts.linears:
            for i in range(experts.count):
                see(item, f"{item.name.rpartition('.')[0]}.{i}.{item.name.rpartition('.')[2]}")
    named.extend((x.name, Loaded(x.elements, 4 if x.float32 else width)) for x in parameters)
    return tuple(item for _, item in sorted(named, key=lambda pair: _order(pair[0])))


def _order(name: str) -> tuple[tuple[int, str, int], ...]:
    """transformers' `dot_natural_key` (core_model_loading.py)."""
    parts = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        digits = part[len(text) :]
        parts.append((1 if text else 0, text, int(digits) if digits else -1))
    return tuple(parts)
