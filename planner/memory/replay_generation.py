"""A generation played on torch's allocator: what the smallest working cap needs above the allocated peak.

A prompt leaves each layer's keys and values in the holes of its own activations, and every token asks for
slightly larger ones before the old go. Only what is larger than 1 MiB is followed.
"""

from __future__ import annotations

from functools import lru_cache

from msgspec.structs import replace

from planner.memory.allocator import NOWHERE, Allocator
from planner.memory.attention import input_bytes
from planner.memory.forward import norm
from planner.memory.kvcache import token_elements
from planner.memory.layer import _forward
from planner.memory.loading import left_over
from planner.memory.parts import EventTape, Part, Places
from planner.memory.replay import Played
from planner.memory.shapes import Pass
from planner.memory.tape import Tensor, rounded
from planner.types import Workload
from profiles.schema import Architecture, Attention, Layer, Norm

STEPS = 1
"""Tokens that are decoded."""


@lru_cache(maxsize=1024)
def prompt_part(layer: Layer, p: Pass, hidden: int, share: float = 0.0) -> Part:
    """A layer's pass over the prompt. What it leaves is its cache."""
    p = replace(p, hidden=hidden)
    tape, x = EventTape(recording=False), Tensor(rounded(p.tokens * hidden * p.stream), width=p.stream)
    tape.settled_share = share
    out = _forward(tape, p, x, layer)
    return Places().part(tape.events, x, out)


@lru_cache(maxsize=1024)
def _norm_part(spec: Norm, p: Pass, hidden: int) -> Part:
    tape, x = EventTape(recording=False), Tensor(rounded(p.tokens * hidden * p.stream), width=p.stream)
    out = norm(tape, p, x, spec, p.tokens)
    return Places().part(tape.events, x, out)


def played_generation(arch: Architecture, work: Workload, p: Pass, workspace: int) -> Played:
    """A prompt and the first tokens after it, under the tightest cap."""
    allocator = Allocator()
    for size in left_over(arch, p.quant, p.width).holes:
        allocator.hole(size)
    allocator.thrifty = True
    n = rounded(p.tokens * arch.hidden_size * p.stream)
    allocator.request(input_bytes(arch, p, work.prompt_tokens + work.new_tokens))
    embedded = allocator.request(n)
    space = allocator.request(workspace)
    x, caches = embedded, []
    count = len(arch.order)
    for index, kind in enumerate(arch.order):
        part = prompt_part(arch.kinds[kind], p, arch.hidden_size, (work.prompt_tokens + work.new_tokens) / p.seq if p.cache == 'static' else 0.0)
        places = [NOWHERE] * part.places
        if part.given >= 0:
            places[part.given] = x
        allocator.play(part.events , places)
        if x != embedded:
            allocator.give(x)
        x = places[part.result] if part.result >= 0 else NOWHERE
        caches.append([places[place] for place in part.left])
    hidden = NOWHERE
    if arch.final_norm is not None:
        part = _norm_part(arch.final_norm, p, arch.hidden_size)
        places = [NOWHERE] * part.places
        if part.given >= 0:
            places[part.given] = x
        allocator.play(part.events, places)
        hidden = places[part.result] if part.result >= 0 else NOWHERE
    for block in (x, embedded):
        allocator.give(block)
    logits = allocator.request(work.sequences * arch.vocab_size * p.width)
    wide = allocator.request(work.sequences * arch.vocab_size * 4)
    for block in (hidden, logits):
        allocator.give(block)
    if p.cache == "dynamic":
        _decode(allocator, arch, work, p, caches)
    return Played(allocator.allocated_peak, allocator.reserved_peak, 0)


def _decode(allocator: Allocator, arch: Architecture, work: Workload, p: Pass, caches: list[list[int]]) -> None:
    for step in range(1, min(STEPS, work.new_tokens - 1) + 1):
        for kind, blocks in zip(arch.order, caches, strict=True):
            spec = arch.kinds[kind].attention
            tokens = p.seq + step
            if spec.window is not None:
                tokens = min(tokens, spec.window)
            sizes = [rounded(p.batch * tokens * elements * p.width) for elements in token_elements(spec)]
            if len(sizes) != len(blocks):
                continue
            if spec.window is not None and p.seq + step > spec.window:
                wide = [allocator.request(rounded(p.batch * (tokens + 1) * e * p.width)) for e in token_elements(spec)]
                for position, block in enumerate(blocks):
                    allocator.give(block)
                    blocks[position] = wide[position]
                continue
            for position, size in enumerate(sizes):
                block = allocator.request(size)
                allocator.give(blocks[position])
                blocks[position] = block
