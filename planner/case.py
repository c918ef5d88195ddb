"""A strategy in its place: the model, the machine and the job it is for."""

from __future__ import annotations

from msgspec import Struct

from planner.rates import capability
from planner.types import Gpu, Machine, Strategy, Workload
from profiles.hardware import parse_capability
from profiles.schema import Architecture


class Case(Struct, frozen=True):
    """A strategy with everything that decides whether it is possible."""

    arch: Architecture
    machine: Machine
    workload: Workload
    strategy: Strategy

    @property
    def train(self) -> bool:
        """Whether this is training."""
        return self.workload.task == "train"

    @property
    def cards(self) -> tuple[Gpu, ...]:
        """The cards the job would use: none under placement cpu."""
        return () if self.strategy.placement == "cpu" else self.machine.gpus

    @property
    def offloads(self) -> bool:
        """Whether layers live off the card."""
        return self.strategy.placement in ("mixed_offload", "disk_offload")

    def weaker_than(self, least: str | None) -> bool:
        """Whether a card's known compute capability is below `least` (`8.0`)."""
        wanted = parse_capability(least)
        if wanted is None:
            return False
        return any(known is not None and known < wanted for known in map(capability, self.cards))
