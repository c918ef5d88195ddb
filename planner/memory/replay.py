"""A fine-tuning run played on torch's allocator: what the smallest cap needs above the allocated peak.

What decides is where lasting blocks settle. The first step makes the optimizer's states and, at the first
product of backward, a cuBLAS workspace for autograd's thread; both take holes that the first logits left, and
later logits need a place of their own. A step of the steady run is then played in the segments that are left.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from planner.memory.allocator import NOWHERE, Allocator
from planner.memory.head import ending
from planner.memory.lasting import trained_in_order, trained_tensors
from planner.memory.layer import embedded
from planner.memory.loading import load_holes
from planner.memory.optimizer import OPTIMIZERS, state_tensors, step_temporaries
from planner.memory.parts import Part, head_parts, layer_parts
from planner.memory.shapes import Pass
from planner.memory.tape import UNSPLIT, rounded
from planner.memory.weights import WIDTH
from planner.types import Strategy, Workload
from profiles.schema import Architecture

FIRST, LAST, BACK = 3, 2, 3
"""Layers played whole where adapters are trained: at the beginning and the end of the forward pass, and at
the beginning of backward; of the others only what outlives their pass. On the caps of the accuracy grid that
is as right as playing all."""
DEEP = 36
"""The same for full fine-tuning, whose gradients and states settle among its activations."""


class Played(Struct, frozen=True):
    """What one more step of a steady run asks for, of requests over 1 MiB."""

    allocated_peak: int
    reserved_peak: int
    lasting: int
    """Allocated before the step."""

    @property
    def holes(self) -> int:
        """What the smallest cap must leave above the allocated peak."""
        return self.reserved_peak - self.allocated_peak


class TrainingRun:
    """Steps of a fine-tuning run, played on an allocator."""

    def __init__(self, arch: Architecture, work: Workload, how: Strategy, p: Pass, workspace: int) -> None:
        self._p = p = replace(p, stream=embedded(arch, p).width)
        self._how, self._workspace = how, workspace
        self._input = rounded(p.tokens * arch.hidden_size * p.stream)
        self._layers: list[tuple[Part, Part]] = []
        checkpointing, width = how.gradient_checkpointing, p.stream
        known: dict[tuple[int, int, bool], tuple[Part, Part, int]] = {}
        for index, kind in enumerate(arch.order):
            first = index == 0 and not p.full and not checkpointing
            key = kind, width, first
            if key not in known:
                shape = replace(p, stream=width)
                known[key] = layer_parts(arch.kinds[kind], shape, arch.hidden_size, checkpointing, first)
            forward, backward, width = known[key]
            self._layers.append((forward, backward))
        fused = how.loss == "fused" or how.kernels == "liger"
        self._head = head_parts(ending(arch), replace(p, stream=width), fused, workspace)
        _, self._embeddings, self._width = trained_tensors(arch, work, p)
        self._sizes = trained_in_order(arch, work, p)
        self._tied, self._again = arch.head is None, work.gradient_accumulation_steps > 1
        states = {size: self._large_states(size) for size in set(self._sizes)}
        self._states = [n for size in self._sizes for n in states[size]]
        left = any(backward.left for _, backward in self._layers)
        self._lasting = p.full or left or bool(self._states)
        """Does the first step leave anything after its workspaces?"""
        count = arch.layers
        front, end, back = (DEEP, DEEP, DEEP) if p.full else (FIRST, LAST, BACK)
        self._whole_from, self._back_from = (front, count - end), count - back
        self._spaces = [NOWHERE, NOWHERE]
        self._gradients: list[int] = []
        self.allocator = Allocator(downwards=True)
        for n in load_holes(arch, how.quant, WIDTH[how.dtype]):
            self.allocator.hole(n)
        if not p.full:
            self.allocator.keep(size * self._width for size in self._sizes)

    def play(self, cleared: bool = False) -> Played:
        """The first step, and one more in the segments that it leaves.

        `cleared`: cuBLAS workspaces are given back in between.
        """
        allocator = self.allocator
        self._step(first=True)
        if cleared:
            for block in self._spaces:
                allocator.give(block)
            self._spaces = [NOWHERE, NOWHERE]
        allocator.empty_cache()
        allocator.thrifty = True
        allocator.mark()
        lasting = allocator.allocated
        self._step(first=False)
        return Played(allocator.allocated_peak, allocator.reserved_peak, lasting)

    def play_from_the_start(self) -> Played:
        """Two steps of a job that begins under the tightest cap."""
        allocator = self.allocator
        allocator.thrifty = True
        for first in (True, False):
            self._step(first)
        return Played(allocator.allocated_peak, allocator.reserved_peak, 0)

    # ---------------------------------------------------------------- one step

    def _step(self, first: bool) -> None:
        self._pass(first, again=False)
        if self._again and not first:
            self._pass(first, again=True)
        self._optimizer(first)
        self.allocator.give_all(self._gradients)
        self._gradients.clear()

    def _pass(self, first: bool, again: bool) -> None:
        """Forward and backward of one micro-batch. `again`: gradients of one before it are there."""
        inputs, passes = self._forward()
        forward, backward = self._head
        places = _places(forward, backward)
        self._enter(forward, places, inputs[-1])
        self.allocator.play(forward.events, places)
        for (part, _), held in zip(self._layers, passes, strict=True):
            self._give(held, part.cached)
        if backward.until:
            places[backward.until[0]] = self._spaces[1]
        self._head_backward(backward, places)
        self._keep([places[place] for place in backward.left], again)
        gradient = places[backward.result] if backward.result >= 0 else NOWHERE
        self._backward(inputs, passes, gradient, again, first)
        if self._embeddings:
            self._embedding_gradients(again)

    def _forward(self) -> tuple[list[int], list[list[int]]]:
        allocator = self.allocator
        inputs, passes = [allocator.request(self._input)], []
        if self._spaces[0] == NOWHERE:
            self._spaces[0] = allocator.request(self._workspace)
        whole = self._whole_from
        for index, (forward, backward) in enumerate(self._layers):
            places = _places(forward, backward)
            self._enter(forward, places, inputs[-1])
            allocator.play(forward.events if index < whole[0] or index >= whole[1] else forward.brief, places)
            if not forward.keeps_input:
                allocator.give(inputs[-1])
                inputs[-1] = NOWHERE
            inputs.append(places[forward.result] if forward.result >= 0 else NOWHERE)
            passes.append(places)
        return inputs, passes

    def _head_backward(self, part: Part, places: list[int]) -> None:
        space = part.until[0] if part.until else NOWHERE
        if self._spaces[1] != NOWHERE:
            self.allocator.play([event for event in part.events if event[0] != space], places)
            return
        self.allocator.play(part.events, places)
        self._spaces[1] = places[space]

    def _backward(
        self, inputs: list[int], passes: list[list[int]], gradient: int, again: bool, first: bool
    ) -> None:
        allocator, checkpointing = self.allocator, self._how.gradient_checkpointing
        count = len(self._layers)
        for index in reversed(range(count)):
            forward, backward = self._layers[index]
            places = _places(backward) if checkpointing else passes[index]
            whole = index >= self._back_from and (self._lasting or not first)
            self._enter(backward, places, gradient)
            if whole:
                allocator.play(backward.events, places)
                gradient = places[backward.result] if backward.result >= 0 else NOWHERE
            else:
                passing = backward.result, backward.given  # one gradient stands for both
                allocator.play([event for event in backward.brief if event[0] not in passing], places)
            self._give(passes[index], forward.until)
            allocator.give(inputs[index])
            self._keep([places[place] for place in backward.left], again)
        allocator.give(gradient)

    def _embedding_gradients(self, again: bool) -> None:
        # a tied head's gradient waits; the two have different strides, so that their sum is a third tensor
        for position, size in enumerate(self._embeddings):
            block = self.allocator.request(size * self._width)
            if position == 0 and self._tied:
                total = self.allocator.request(size * self._width)
                self.allocator.give(block)
                block = total
            self._keep([block], again)

    def _optimizer(self, first: bool) -> None:
        allocator, kind = self.allocator, OPTIMIZERS[self._how.optimizer]
        if first:
            allocator.keep(self._states)
        for blocks in step_temporaries(kind, self._sizes, self._width):
            allocator.give_all(allocator.keep(blocks))

    # ---------------------------------------------------------------- blocks

    def _large_states(self, size: int) -> list[int]:
        kind = OPTIMIZERS[self._how.optimizer]
        found = state_tensors(kind, size, self._width, size in self._embeddings)
        return [n for n in found if n > UNSPLIT]

    def _enter(self, part: Part, places: list[int], block: int) -> None:
        if part.given >= 0:
            places[part.given] = block

    def _give(self, places: list[int], which: Sequence[int]) -> None:
        for place in which:
            self.allocator.give(places[place])
            places[place] = NOWHERE

    def _keep(self, blocks: list[int], again: bool) -> None:
        """Gradients of parameters: added to those that are there, or there from now on."""
        for block in blocks:
            if again:
                self.allocator.give(block)
            elif block != NOWHERE:
                self._gradients.append(block)


def _places(*parts: Part) -> list[int]:
    return [NOWHERE] * max(part.places for part in parts)
