"""Which cells run side by side: pure bookkeeping of one card's memory and the host's.

A cell gets a share of the card: what its prediction says at most, and room for an allocator that is not
pressed. A cell that needs more than its share fails alone, takes nobody else down, and comes again with twice
the share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.accuracy.cells import Cell
from planner.units import GIB, MIB

CONTEXT = int(1.25 * GIB)
"""Set aside beside the allocator for a process' context and libraries."""
ROOM = 1.25
"""A free run reserves more than it needs: cached blocks that do not fit what is asked for next."""


@dataclass(frozen=True)
class Share:
    """What one cell may take."""

    allocator_bytes: int
    ram_bytes: int
    managed_bytes: int = 0

    @property
    def card_bytes(self) -> int:
        """Of the card, with context and managed memory."""
        return self.allocator_bytes + CONTEXT + self.managed_bytes


def share_of(prediction: Mapping[str, Any], factor: float = 1.0) -> Share:
    """The share that follows from a prediction; `factor` 2 for a second try."""
    need = prediction.get("high_bytes", 40 * GIB) - prediction.get("context_bytes", 0)
    ram = prediction.get("ram_bytes", 4 * GIB)
    managed = prediction.get("managed_bytes", 0)
    return Share(int(factor * (ROOM * need + 512 * MIB)), int(ram + GIB), managed)


@dataclass
class Room:
    """What is left of the machine."""

    card_bytes: int
    ram_bytes: int
    side_by_side: int
    taken: dict[str, Share] = field(default_factory=dict)

    def fits(self, share: Share) -> bool:
        """Whether one more cell may start. A cell larger than the machine may run alone."""
        if not self.taken:
            return True
        card = sum(s.card_bytes for s in self.taken.values()) + share.card_bytes
        ram = sum(s.ram_bytes for s in self.taken.values()) + share.ram_bytes
        return len(self.taken) < self.side_by_side and card <= self.card_bytes and ram <= self.ram_bytes

    def take(self, cell: Cell, share: Share) -> None:
        """Start a cell."""
        self.taken[cell.id] = share

    def leave(self, cell: Cell) -> None:
        """A cell has ended."""
        self.taken.pop(cell.id, None)


def order(cells: Iterable[Cell]) -> list[Cell]:
    """Timed cells last, because they want the machine for themselves; the others in the order of their ids,
    so that a session cut short has measured some of everything."""
    return sorted(cells, key=lambda cell: (cell.timed, cell.id))


def next_cell(
    waiting: list[Cell], shares: Mapping[str, Share], room: Room, seconds_left: float
) -> Cell | None:
    """The first waiting cell that fits beside those that run and can end in time; None where none does.

    A timed cell starts only when nothing runs, and nothing starts beside it.
    """
    for cell in waiting:
        if (cell.seconds or 30) * PATIENCE > seconds_left:
            continue
        if cell.timed:
            if not room.taken:
                return cell
            return None
        if room.fits(shares[cell.id]):
            return cell
    return None


PATIENCE = 1.5
"""Cells take longer than alone when others compute beside them."""
