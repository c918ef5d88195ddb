"""What the stock allocator needs above the allocated peak: the tape, replayed on a made-up allocator.

    python -m benchmarks.accuracy.fragmentation

For every training cell with a measured cap: what starting the whole job under a cap needs, what one more step
of a run that is there needs, and what a free run reserves, each over the allocated peak, beside the measured
figures. Two steps are replayed: embeddings, layers, loss, backward layer by layer, optimizer states, as
`planner.memory` has them; the workspace that cuBLAS makes for autograd's thread comes with the first product
of backward and stays, like the states. Nothing is fitted.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy.caching_allocator import CachingAllocator, Event, OutOfMemory, replay, smallest_cap
from benchmarks.accuracy.cells import GRID, RESULTS, model_of, read_cells, read_lines
from planner.estimate import architecture_of
from planner.memory.head import _chunked_loss, _full_loss, _liger_loss, ending, norm
from planner.memory.lasting import trained_tensors
from planner.memory.layer import _forward, embedded
from planner.memory.optimizer import OPTIMIZERS, _one
from planner.memory.shapes import Pass
from planner.memory.tape import Tape, Tensor, booked, rounded
from planner.memory.train import training_pass
from planner.memory.weights import weight_bytes
from planner.types import Strategy, Workload
from planner.units import MIB
from profiles.schema import Architecture, Layer

WORKSPACE = 32 * MIB
"""Of cuBLAS on the card that was measured (profiles/overheads.json)."""


class EventTape(Tape):
    """A tape that also writes down what it allocates and frees, temporaries included."""

    def __init__(self, recording: bool = True, stop_after: int | None = None) -> None:
        super().__init__(recording, stop_after)
        self.events: list[Event] = []
        self._inside = False

    def touch(self, n: int) -> None:
        """As `Tape.touch`: a block that is there for one kernel."""
        super().touch(n)
        if n > 0 and not self._inside and not self.stopped:
            self._brief(n)

    def new(self, n: int, needs_grad: bool = False, width: int = 2) -> Tensor:
        """As `Tape.new`."""
        tensor = super().new(n, needs_grad, width)
        if tensor.booked:
            self.events.append((tensor, tensor.bytes))
        return tensor

    def free(self, *tensors: Tensor | None) -> None:
        """As `Tape.free`."""
        for tensor in tensors:
            if tensor is None:
                continue
            last = tensor.refs == 1 and tensor.base is None and tensor.booked
            super().free(tensor)
            if last:
                self.events.append((tensor, 0))

    def op(
        self, inputs: Sequence[Tensor], out_bytes: int, *args: Any, temp: int = 0, **kwargs: Any
    ) -> Tensor:
        """As `Tape.op`; a temporary is there until the output is."""
        if not temp or self.stopped:
            return super().op(inputs, out_bytes, *args, temp=temp, **kwargs)
        name = object()
        self.events.append((name, temp))
        self._inside = True
        out = super().op(inputs, out_bytes, *args, temp=temp, **kwargs)
        self._inside = False
        self.events.append((name, 0))
        return out

    def _brief(self, n: int) -> None:
        name = object()
        self.events += [(name, n), (name, 0)]


@dataclass
class Part:
    """Events of one layer's or the head's pass. The names are tensors of the tape."""

    events: list[Event]
    given: Tensor | None = None
    """Gradient that comes in."""
    result: Tensor | None = None
    """Output, or gradient that goes out."""

    @property
    def left(self) -> list[Hashable]:
        """What stays: gradients of parameters."""
        freed = {id(name) for name, n in self.events if n == 0}
        apart = {id(self.given), id(self.result)}
        return [name for name, n in self.events if n and id(name) not in freed | apart]


def layer_parts(layer: Layer, p: Pass, hidden: int, checkpointing: bool) -> tuple[Part, Part]:
    """Forward and backward of one layer."""
    p = replace(p, hidden=hidden)

    def start() -> Tensor:
        return Tensor(rounded(p.tokens * hidden * p.stream), needs_grad=True, width=p.stream)

    tape, x = EventTape(recording=not checkpointing), start()
    out = _forward(tape, p, x, layer)
    tape.leave_autocast()
    forward = Part(list(tape.events), result=out)
    if checkpointing:
        counting = Tape()
        _forward(counting, p, start(), layer)
        tape, x = EventTape(stop_after=counting.saving_ops), start()
        gradient = tape.new(out.bytes)
        out = _forward(tape, p, x, layer)
        tape.leave_autocast()
    else:
        tape.events.clear()
        gradient = tape.new(out.bytes)
    tape.free(out)
    out.grad = gradient
    tape.backward(out)
    return forward, Part(tape.events, gradient, x.grad)


def head_part(arch: Architecture, p: Pass, how: Strategy) -> Part:
    """Final norm, projection and loss, forward and backward, with the workspace of autograd's thread."""
    tape, end = EventTape(), ending(arch)
    x = tape.new(p.tokens * end.hidden * p.stream, needs_grad=True, width=p.stream)
    y = norm(tape, p, x, end.norm, p.tokens) if end.norm else tape.hold(x)
    tape.free(x)
    fused = how.loss == "fused" or how.kernels == "liger"
    loss = (_full_loss if not fused else _liger_loss if p.liger else _chunked_loss)(tape, p, y, end)
    turn = len(tape.events)
    loss.grad = tape.new(512)
    tape.backward(loss)
    products = {rounded(p.tokens * end.hidden * width) for width in (2, 4)}
    products.add(booked(end.vocab * end.hidden * p.width))
    later = range(turn, len(tape.events))
    at = next((i for i in later if tape.events[i][1] in products), turn)
    tape.events.insert(at, ("workspace", WORKSPACE))
    return Part(tape.events, x, x.grad)


@dataclass
class Script:
    """The events of a run, each name used once; what a step allocates and frees."""

    events: list[Event] = field(default_factory=list)
    _alive: set[Hashable] = field(default_factory=set)
    _number: int = 0

    def allocate(self, n: int) -> int:
        """A block of `n` bytes; its name."""
        self._number += 1
        self.events.append((self._number, n))
        self._alive.add(self._number)
        return self._number

    def free(self, names: Iterable[Hashable]) -> None:
        """Free blocks by name; what one part has let go of, the next may hold no more."""
        for name in names:
            if name in self._alive:
                self._alive.remove(name)
                self.events.append((name, 0))

    def play(self, part: Part, names: dict[Hashable, Hashable]) -> None:
        """The events of a part under new names. `names`: of its tensors that are there already, and after it
        of all."""
        for name, n in part.events:
            if n and name not in names:
                names[name] = self.allocate(n)
            elif n == 0 and name in names:
                self.free([names[name]])


class Run:
    """A training run as events: `first`, a step that makes what lasts, and `step`, one more."""

    def __init__(self, arch: Architecture, work: Workload, how: Strategy) -> None:
        p = training_pass(arch, work, how)
        self._p = replace(p, stream=embedded(arch, p).width)
        self._arch, self._how, self._script = arch, how, Script()
        tensors, embeddings, self._width = trained_tensors(arch, work, self._p)
        self._embeddings = embeddings
        self._sizes = [size for size, count in tensors for _ in range(count)] + list(embeddings)
        self._layers, width = [], self._p.stream
        known: dict[tuple[int, int], tuple[Part, Part]] = {}
        for kind in arch.order:
            if (kind, width) not in known:
                shape = replace(self._p, stream=width)
                known[kind, width] = layer_parts(
                    arch.kinds[kind], shape, arch.hidden_size, how.gradient_checkpointing
                )
            self._layers.append(known[kind, width])
            result = known[kind, width][0].result
            assert result is not None
            width = result.width
        self._head = head_part(arch, replace(self._p, stream=width), how)
        if not self._p.full:
            for size in self._sizes:
                self._script.allocate(rounded(size * self._width))
        self._step(first=True)
        self.first = list(self._script.events)
        self._step(first=False)
        self.step = self._script.events[len(self.first) :]

    def _step(self, first: bool) -> None:
        script, gradients = self._script, []
        start = rounded(self._p.tokens * self._arch.hidden_size * self._p.stream)
        inputs: list[Hashable] = [script.allocate(start)]
        passes: list[dict[Hashable, Hashable]] = []
        for forward, _ in self._layers:
            names: dict[Hashable, Hashable] = {}
            script.play(forward, names)
            inputs.append(names[forward.result])
            passes.append(names)
        names = {self._head.given: inputs[-1]}
        if not first:
            names["workspace"] = "there already"
        script.play(self._head, names)
        gradients += [names[name] for name in self._head.left if name != "workspace"]
        gradient = names.get(self._head.result)
        for index in reversed(range(len(self._layers))):
            backward = self._layers[index][1]
            names = {} if self._how.gradient_checkpointing else passes[index]
            names[backward.given] = gradient
            script.play(backward, names)
            if self._how.gradient_checkpointing or index == 0:
                script.free([inputs[index]])
            gradients += [names[name] for name in backward.left]
            gradient = names.get(backward.result)
        if gradient is not None:
            script.free([gradient])
        gradients += [script.allocate(size * self._width) for size in self._embeddings]
        self._optimizer(first)
        script.free(gradients)

    def _optimizer(self, first: bool) -> None:
        kind = OPTIMIZERS[self._how.optimizer]
        for size in self._sizes if first and kind.states else ():
            state, _ = _one(kind, size, self._width, size in self._embeddings)
            for _ in range(kind.states if state else 0):
                self._script.allocate(max(512, state // kind.states))
        for _ in range(kind.lists):
            self._script.free([self._script.allocate(rounded(size * self._width)) for size in self._sizes])


@dataclass(frozen=True)
class Need:
    """Smallest caps and reserved bytes over the allocated peak."""

    allocated_bytes: int
    from_the_start: float
    one_more_step: float
    reserved: float


def need(arch: Architecture, work: Workload, how: Strategy) -> Need:
    """Replay a training run of `arch`."""
    run = Run(arch, work, how)
    base = weight_bytes(arch, how.quant, how.quant_experts, how.dtype).total(arch.order) + WORKSPACE
    whole = run.first + run.step
    freely = replay(whole, base=base)
    peak = freely.allocated_peak
    low, high = peak, freely.reserved_peak
    while high - low > 0.002 * peak:
        middle = (low + high) // 2
        if _goes_on(run, middle, base):
            high = middle
        else:
            low = middle
    return Need(peak, smallest_cap(whole, base) / peak, high / peak, freely.reserved_peak / peak)


def _goes_on(run: Run, cap: int, base: int) -> bool:
    allocator = CachingAllocator(base=base)
    blocks = allocator.play(run.first, {})
    allocator.empty_cache()
    allocator.cap = cap
    try:
        allocator.play(run.step, blocks)
    except OutOfMemory:
        return False
    return True


def main() -> int:
    """Command line."""
    cells = {cell.id: cell for cell in read_cells(GRID)}
    table = Table("cell", "from the start", "measured", "one more step", "measured", "reserved", "measured")
    for row in read_lines(RESULTS):
        cell = cells[row["id"]]
        if cell.workload.task != "train" or cell.strategy.placement != "full_gpu" or "figures" not in row:
            continue
        peak = row["figures"]["allocated_peak_bytes"]
        caps = [
            row.get(name, {}).get("stock", {}).get("worked_bytes") for name in ("caps_from_the_start", "caps")
        ]
        if not any(caps):
            continue
        found = need(architecture_of(model_of(cell.model)), cell.workload, cell.strategy)
        shown = [f"{cap / peak:.3f}" if cap else "" for cap in caps]
        reserved = f"{row['figures']['reserved_peak_bytes'] / peak:.3f}"
        columns = [f"{found.from_the_start:.3f}", shown[0], f"{found.one_more_step:.3f}", shown[1]]
        table.add_row(cell.name[11:], *columns, f"{found.reserved:.3f}", reserved)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
