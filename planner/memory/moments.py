"""A run as a list of moments, each with what is alive then; the peak is the largest."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from msgspec import Struct
from msgspec.structs import replace

from planner.types import Basis, MemoryLine, Moment


class Snapshot(Struct, frozen=True, dict=True):
    """What is alive at one moment. Lines add up to the allocated bytes of that moment."""

    moment: Moment
    lines: tuple[MemoryLine, ...]
    largest_block: int = 0
    """Biggest single allocation asked for at that moment: what fragmentation must leave room for."""

    @cached_property
    def bytes(self) -> int:
        """Allocated bytes."""
        return sum(line.bytes for line in self.lines)


class CardMemory(Struct, frozen=True, kw_only=True, dict=True):
    """Memory of one card over a whole run, before any budget is looked at."""

    load_bytes: int
    load_peak_bytes: int
    managed_bytes: int
    host_bytes: int = 0
    """Pinned RAM that belongs to the run: an offloaded cache, offloaded checkpoints."""
    dequantized_bytes: int = 0
    """The largest quantized matrix in the compute dtype: the workspace of one matmul."""
    snapshots: tuple[Snapshot, ...]

    @cached_property
    def peak(self) -> Snapshot:
        """The moment that decides (the first one of equals)."""
        return max(self.snapshots, key=lambda s: s.bytes)

    @cached_property
    def leading(self) -> tuple[Snapshot, ...]:
        """The largest snapshot of each moment and largest block: what can decide how small a cap may be."""
        best: dict[tuple[str, int], Snapshot] = {}
        for shot in sorted(self.snapshots, key=lambda s: s.bytes):
            best[shot.moment, shot.largest_block] = shot
        return tuple(best.values())

    @cached_property
    def lean(self) -> CardMemory:
        """The same run with no more snapshots than decide anything, in their order."""
        kept = set(map(id, self.leading))
        return replace(self, snapshots=tuple(shot for shot in self.snapshots if id(shot) in kept))

    @cached_property
    def by_moment(self) -> dict[str, int]:
        """The largest snapshot of each moment, in the order of the run."""
        out: dict[str, int] = {}
        for snapshot in self.snapshots:
            out[snapshot.moment] = max(out.get(snapshot.moment, 0), snapshot.bytes)
        return out


def line(name: str, n: int, formula: str, basis: Basis = "counted") -> MemoryLine:
    """A memory line of `n` bytes."""
    return MemoryLine(name, n, formula, basis)


def snapshot(moment: Moment, lines: Iterable[MemoryLine | None], largest_block: int = 0) -> Snapshot:
    """A snapshot without empty lines."""
    return Snapshot(moment, tuple(item for item in lines if item is not None and item.bytes), largest_block)
