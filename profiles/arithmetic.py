"""Counts of an `Architecture`: parameters by part, and those a token really uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from msgspec import Struct

from profiles.schema import Architecture, Attention, Experts, FeedForward, Layer, Tower


class PartCounts(Struct, frozen=True):
    """Parameters by part; they add up to `parameter_count`."""

    embeddings: int
    """Token embedding, learned positions and other embeddings."""
    head: int
    """Output projection; 0 where it shares the embedding's weight."""
    layers: int
    """Decoder layers without their routed experts."""
    experts: int
    """Routed experts of all layers, routers not among them."""
    other: int
    """Final norm and tensors of the text model outside its layers."""
    towers: int
    """Vision and audio encoders with their projectors."""

    @property
    def total(self) -> int:
        """All parts together."""
        return self.embeddings + self.head + self.layers + self.experts + self.other + self.towers


class _Counted(Protocol):
    @property
    def parameters(self) -> int: ...


def _sum(tensors: Iterable[_Counted]) -> int:
    return sum(tensor.parameters for tensor in tensors)


def attention_count(attention: Attention) -> int:
    """Parameters of a token mixer."""
    return _sum(attention.linears) + _sum(attention.norms) + _sum(attention.parameters)


def expert_count(experts: Experts | None) -> int:
    """Parameters of the routed experts of one layer, the router not among them."""
    if experts is None:
        return 0
    return _sum(experts.parameters) + (0 if experts.fused else experts.count * _sum(experts.linears))


def feed_forward_count(feed_forward: FeedForward) -> int:
    """Parameters of a channel mixer with its router, without routed experts."""
    dense = _sum(feed_forward.linears) + _sum(feed_forward.norms) + _sum(feed_forward.parameters)
    return dense + (_sum(feed_forward.experts.router) if feed_forward.experts else 0)


def layer_count(layer: Layer) -> int:
    """Parameters of one decoder layer without routed experts."""
    own = _sum(layer.norms) + _sum(layer.parameters) + _sum(layer.linears)
    return own + attention_count(layer.attention) + feed_forward_count(layer.feed_forward)


def tower_count(tower: Tower) -> int:
    """Parameters of an encoder with its projector."""
    block = _sum(tower.block_linears) + _sum(tower.block_parameters)
    return tower.blocks * block + _sum(tower.linears) + _sum(tower.parameters)


def part_counts(arch: Architecture) -> PartCounts:
    """Parameters by part; tied tensors once, buffers not."""
    repeats = [arch.order.count(kind) for kind in range(len(arch.kinds))]
    layers = sum(n * layer_count(layer) for n, layer in zip(repeats, arch.kinds, strict=True))
    experts = sum(
        n * expert_count(layer.feed_forward.experts) for n, layer in zip(repeats, arch.kinds, strict=True)
    )
    final = arch.final_norm.parameters if arch.final_norm else 0
    return PartCounts(
        embeddings=_sum(arch.embeddings),
        head=arch.head.parameters if arch.head else 0,
        layers=layers,
        experts=experts,
        other=final + _sum(arch.linears) + _sum(arch.parameters),
        towers=sum(tower_count(tower) for tower in arch.towers),
    )


def parameter_count(arch: Architecture) -> int:
    """Parameters of the whole model; tied tensors once, buffers not."""
    return part_counts(arch).total


def active_parameter_count(arch: Architecture) -> int:
    """Parameters one token passes through in text-only work: towers idle, `per_token` of the routed experts.

    The embedding table counts whole, as published active counts have it.
    """
    counts = part_counts(arch)
    active = 0
    for kind in arch.order:
        experts = arch.kinds[kind].feed_forward.experts
        if experts is not None:
            active += expert_count(experts) * experts.per_token // experts.count
    return counts.total - counts.towers - counts.experts + active
