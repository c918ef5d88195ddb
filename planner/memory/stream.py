"""What layer streaming keeps on the card and in RAM (`executor/streaming`).

Every streamed layer is one block of page-locked RAM, its slab: tensors begin at multiples of 256 bytes, a
slab ends at a multiple of 4 KiB. The card has `SLOTS` blocks of the largest slab's size for all of them
together. Buffers stay on the card, as do the few parameters that belong to a layer itself. What a whole run
takes is in `streamed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from planner.memory.weights import WIDTH, layer_linears, packed_stack, parameter_bytes
from planner.placement import spread_evenly
from planner.units import MIB
from profiles.precisions import load_precisions, stored_bytes
from profiles.schema import Architecture, Layer, Linear, Parameter

SLOTS = 2
"""One to read and one to fill: a third would hold what can as well be a resident layer."""

RING_BUFFERS = 3
"""Blocks of page-locked RAM that layers of the disk tier pass through, each of the largest slab's size: one
read by the link, one ready, one filled from disk."""

HEAD_BLOCK_BYTES = 64 * MIB
"""Most bytes of one block of vocabulary rows: large enough for the link's full rate, and its logits small.

A streamed output projection has no slots of its own: its blocks follow the last layer through those of the
layers, so each slot has the size of the largest slab or block. In RAM it is one page-locked block of V x D,
which serves tied embeddings too."""

GATHER_BYTES = 16 * MIB
"""Page-locked RAM beside embeddings that stay on the host: the rows of a pass's tokens are gathered there,
half of it while the other half is copied to the card."""


def head_block_rows(vocab: int, hidden: int, width: int) -> int:
    """Vocabulary rows of one block, a multiple of 128 unless they are all; `width`: bytes of an element."""
    rows = HEAD_BLOCK_BYTES // (hidden * width) // 128 * 128
    return min(vocab, max(128, rows))


_TENSOR, _SLAB = 256, 4096
_OFFSET = {"nf4": (4,)}
"""The offset of double quantization, a tensor of its own."""
_TABLES = {"nf4": (16 * 4, 256 * 4)}
"""Code books, which all streamed weights share."""


def slab_bytes(layer: Layer, quant: str, width: int, quant_experts: str = "none") -> int:
    """Bytes of one layer's slab. `width`: of an element that is not quantized."""
    used = sum(-(-size // _TENSOR) * _TENSOR for size in _tensors(layer, quant, width, quant_experts))
    return -(-used // _SLAB) * _SLAB


def _tensors(layer: Layer, quant: str, width: int, quant_experts: str) -> Iterator[int]:
    """Bytes of every tensor that is streamed with a layer."""
    attention, channel = layer.attention, layer.feed_forward
    for norm in (*layer.norms, *attention.norms, *channel.norms):
        yield from [norm.size * width] * (int(norm.weight) + int(norm.bias))
    for linear in layer_linears(layer):
        yield from _linear(linear, quant, width)
    parameters = [*layer.parameters, *attention.parameters, *channel.parameters]
    experts = channel.experts
    if experts is not None:
        for router in experts.router:
            if isinstance(router, Linear):
                yield from _linear(router, quant, width)
            else:
                parameters.append(router)
        for item in experts.parameters if experts.fused else ():
            if quant_experts != "none" and len(item.shape) == 3:
                yield from packed_stack(item, quant_experts)
            else:
                parameters.append(item)
        for linear in () if experts.fused else experts.linears * experts.count:
            yield from _linear(linear, quant, width)
    for item in parameters:
        if not _stays(item):
            yield item.elements * (4 if item.float32 else width)


def _linear(linear: Linear, quant: str, width: int) -> Iterator[int]:
    elements = linear.inputs * linear.outputs
    if quant == "none":
        yield elements * width
    else:
        yield from stored_bytes(load_precisions()[quant], linear.outputs, elements)
        yield from _OFFSET.get(quant, ())
    if linear.bias:
        yield linear.outputs * width


def _stays(item: Parameter) -> bool:
    return item.buffer or "." not in item.name


@lru_cache(maxsize=1024)
def slabs(arch: Architecture, quant: str, dtype: str, quant_experts: str = "none") -> tuple[int, ...]:
    """Bytes of the slab of every layer, in order."""
    kinds = [slab_bytes(layer, quant, WIDTH[dtype], quant_experts) for layer in arch.kinds]
    return tuple(kinds[kind] for kind in arch.order)


def streamed_layers(arch: Architecture, resident: int) -> tuple[int, ...]:
    """Indices of the layers that are streamed where `resident` stay."""
    kept = spread_evenly(resident, arch.layers)
    return tuple(index for index in range(arch.layers) if index not in kept)


def table_bytes(quant: str) -> tuple[int, ...]:
    """Bytes of the code books that all streamed weights of a precision share."""
    return _TABLES.get(quant, ())


def left_behind(layer: Layer, width: int) -> int:
    """Bytes of a streamed layer that stay on the card: buffers, and parameters of the layer itself."""
    experts = layer.feed_forward.experts
    routers = experts.router if experts is not None else ()
    items = [*layer.parameters, *layer.attention.parameters, *layer.feed_forward.parameters, *routers]
    return sum(parameter_bytes(item, width) for item in items if isinstance(item, Parameter) and _stays(item))
