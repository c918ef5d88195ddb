"""A generation played on torch's allocator: what the smallest working cap needs above the allocated peak.

A prompt leaves each layer's keys and values in holes of its own activations, and a token asks for slightly
larger ones before the old go. Only requests over 1 MiB are followed.
"""

from __future__ import annotations

from functools import lru_cache

from msgspec.structs import replace

from planner.memory.allocator import NOWHERE, Allocator
from planner.memory.attention import input_bytes
from planner.memory.forward import norm
from planner.memory.kvcache import kept_tokens, token_elements
from planner.memory.layer import run_layer
from planner.memory.loading import load_holes
from planner.memory.parts import EventTape, Part, Places
from planner.memory.replay import Played
from planner.memory.shapes import Pass
from planner.memory.tape import UNSPLIT, Tensor, rounded
from planner.types import Workload
from profiles.schema import Architecture, Layer, Norm

DEEP = 40
"""Layers played whole before the last one; of those between only what outlives their pass."""
MOST = 0.52
"""Largest share of what a run takes beside its weights that a measured generation has left in holes (the
half `fit` of benchmarks/accuracy/results.jsonl)."""


def played_generation(arch: Architecture, work: Workload, p: Pass, workspace: int) -> Played:
    """A prompt and the first token after it, three times; what the middle one needs.

    Of free blocks of one size the lowest is taken, and where a segment lies is the driver's affair: mostly
    below the one before. So the run is played both ways without a cap, and downwards once more as under the
    tightest cap, where a block may settle elsewhere. On the caps of the accuracy grid the middle one is off
    by 0.3 % (median), any single one by up to 30 %.
    """

    def played(thrifty: bool, downwards: bool) -> Allocator:
        return _Generation(arch, work, p, workspace, thrifty, downwards).allocator

    up, down = played(False, False), played(False, True)
    peak, holes = up.allocated_peak, [run.reserved_peak - run.allocated_peak for run in (up, down)]
    if down.wasteful and holes[0] != holes[1]:
        tight = played(True, True)
        holes.append(tight.reserved_peak - tight.allocated_peak)
    else:  # the third would go as the second
        holes.append(holes[1])
    middle = sorted(holes)[1]
    return Played(peak, min(peak + middle, int((1 + MOST) * peak)), 0)


class _Generation:
    """One run. Workspaces are made at their first use, as after everything was released."""

    def __init__(
        self,
        arch: Architecture,
        work: Workload,
        p: Pass,
        workspace: int,
        thrifty: bool,
        downwards: bool,
    ) -> None:
        self._arch, self._work, self._p = arch, work, p
        self.allocator = Allocator(downwards=downwards)
        for size in load_holes(arch, p.quant, p.width):
            self.allocator.hole(size)
        self.allocator.thrifty = thrifty
        tokens = work.prompt_tokens + work.new_tokens
        self.allocator.request(input_bytes(arch, p, tokens))
        embedded = self.allocator.request(p.tokens * arch.hidden_size * p.stream)
        self.allocator.request(workspace)
        last, caches = self._layers(embedded, tokens / p.seq if p.cache == "static" else 0.0)
        self._end(embedded, last)
        if p.cache == "dynamic":
            self._token(caches)

    def _layers(self, embedded: int, static: float) -> tuple[int, list[list[int]]]:
        """The last hidden state and each layer's cache."""
        x, seen = embedded, set()
        caches: list[list[int]] = []
        arch, count = self._arch, self._arch.layers
        parts = {i: prompt_part(arch.kinds[i], self._p, arch.hidden_size, static) for i in set(arch.order)}
        for index, kind in enumerate(arch.order):
            part = parts[kind]
            if not part.left:
                state = kind, x, self.allocator.state
                if state in seen:  # it would go as it went before, and leave nothing
                    caches.append([])
                    continue
                seen.add(state)
            places = self._through(part, x, not DEEP <= index < count - 1)
            if x != embedded:
                self.allocator.give(x)
            x = places[part.result] if part.result >= 0 else NOWHERE
            caches.append([places[place] for place in part.left])
        return x, caches

    def _end(self, embedded: int, x: int) -> None:
        """Final norm, and logits of the last position."""
        spec, hidden = self._arch.final_norm, NOWHERE
        if spec is not None:
            part = _norm_part(spec, self._p, self._arch.hidden_size)
            places = self._through(part, x)
            hidden = places[part.result] if part.result >= 0 else NOWHERE
        self.allocator.give(x)
        if x != embedded:
            self.allocator.give(embedded)
        logits = self._work.sequences * self._arch.vocab_size
        narrow = self.allocator.request(logits * self._p.width)
        self.allocator.request(4 * logits)
        for block in (hidden, narrow):
            self.allocator.give(block)

    def _token(self, caches: list[list[int]]) -> None:
        """Keys and values of one more token; both of a full window are there twice."""
        p, tokens = self._p, self._p.seq + 1
        known = {}
        for kind in set(self._arch.order):
            spec = self._arch.kinds[kind].attention
            full = spec.window is not None and tokens > spec.window
            kept = kept_tokens(spec, tokens, False) + (1 if full else 0)
            sizes = [rounded(p.batch * kept * elements * p.width) for elements in token_elements(spec)]
            known[kind] = full, sizes
        events: list[tuple[int, int]] = []
        places: list[int] = []
        for kind, blocks in zip(self._arch.order, caches, strict=True):
            full, sizes = known[kind]
            if len(sizes) != len(blocks):
                continue
            old = range(len(places), len(places) + 2 * len(blocks), 2)
            for place, block, size in zip(old, blocks, sizes, strict=True):
                places += (block, NOWHERE)
                if size > UNSPLIT:
                    events.append((place + 1, size))
                if not full:
                    events.append((place, 0))
            if full:
                events += ((place, 0) for place in old)
        self.allocator.play(events, places)

    def _through(self, part: Part, x: int, whole: bool = True) -> list[int]:
        places = [NOWHERE] * part.places
        if part.given >= 0:
            places[part.given] = x
        self.allocator.play(part.events if whole else part.brief, places)
        return places


@lru_cache(maxsize=1024)
def prompt_part(layer: Layer, p: Pass, hidden: int, static: float) -> Part:
    """A layer's pass over the prompt; what it leaves is its cache.

    `static`: bytes of a static cache, made when it is first written, for each byte it is handed.
    """
    p = replace(p, hidden=hidden)
    tape, x = EventTape(recording=False), Tensor(rounded(p.tokens * hidden * p.stream), width=p.stream)
    tape.settled_share = static
    out = run_layer(tape, p, x, layer)
    return Places().part(tape.events, x, out)


@lru_cache(maxsize=1024)
def _norm_part(spec: Norm, p: Pass, hidden: int) -> Part:
    tape, x = EventTape(recording=False), Tensor(rounded(p.tokens * hidden * p.stream), width=p.stream)
    out = norm(tape, p, x, spec, p.tokens)
    return Places().part(tape.events, x, out)
