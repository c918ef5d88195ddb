"""A strategy in its place: the model, the machine and the job it is for."""

from __future__ import annotations

from msgspec import Struct

from planner.draft import draft_architecture, other_words
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

    @property
    def drafts_other_words(self) -> bool:
        """Whether the draft model is known, and its vocabulary surely another one."""
        draft = draft_architecture(self.strategy.draft) if self.strategy.speculate == "draft" else None
        return draft is not None and other_words(draft, self.arch)

    def weaker_than(self, least: str | None) -> bool:
        """Whether a card's known compute capability is below `least` (`8.0`)."""
        wanted = parse_capability(least)
        if wanted is None:
            return False
        return any(known is not None and known < wanted for known in map(capability, self.cards))
