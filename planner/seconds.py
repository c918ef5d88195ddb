"""How the times of what works on a pass beside each other add up.

A pass takes as long as the slowest of the card, the Python that feeds it and the copies that run beside them
(engine stream), plus what comes over the link or from disk while the card waits (accelerate's hooks do not
overlap the two) and what nothing runs beside:

    seconds = max(max(bytes / bandwidth, operations / rate) + small kernels, launches x host, streamed / link,
                  read / disk) + link + disk + alone

In a training step card and host hide behind each other only in part (`side_by_side`). Where layers stream, it
has stretches with copies of their own, forward, loss and backward: two slots let no copy run ahead of its
stretch, so where one waits for the link, the idle link of another is no help.
"""

from __future__ import annotations

from math import inf

from msgspec import Struct


def side_by_side(card: float, host: float, overlap: float) -> float:
    """What two take that work beside each other, in norm `overlap`: the slower of them where it is infinite.

    Long kernels and short ones take turns in a layer, so each is the slower one for a while, and what is
    queued evens that out only in part.
    """
    slower, faster = max(card, host), min(card, host)
    return slower * (1.0 + (faster / slower) ** overlap) ** (1.0 / overlap) if faster > 0 else slower


class Seconds(Struct, frozen=True):
    """Time of one pass by what it waits for."""

    memory: float = 0.0
    compute: float = 0.0
    launch: float = 0.0
    link: float = 0.0
    disk: float = 0.0
    other: float = 0.0
    """Card time that adds to both memory and compute."""
    streamed: float = 0.0
    """Copies over the link under the computation."""
    read: float = 0.0
    """Reads from disk under both."""
    alone: float = 0.0
    """Time in which nothing else runs: before the first launch, in an optimizer's step."""
    overlap: float = inf
    """How well card and host hide behind each other (`side_by_side`)."""
    parts: tuple[tuple[float, float], ...] = ()
    """Stretches of the pass: what card or host take, and copies of layers under it. Empty where the whole
    pass is one."""

    @property
    def card(self) -> float:
        """What the card alone would take."""
        return max(self.memory, self.compute) + self.other

    @property
    def busy(self) -> float:
        """What card and host take together."""
        return side_by_side(self.card, self.launch, self.overlap)

    @property
    def stretches(self) -> tuple[tuple[float, float], ...]:
        """Busy time of each stretch, and the transfers that run beside it."""
        copied = self.parts or ((self.busy, self.streamed),)
        return (*copied, (self.busy, self.read))

    @property
    def total(self) -> float:
        """The pass: card, host, streamed copies and reads side by side; what is alone and other transfers in
        turn with all."""
        copied = self.parts or ((self.busy, self.streamed),)
        beside = sum(max(busy, copies) for busy, copies in copied)
        return max(beside, self.busy, self.read) + self.link + self.disk + self.alone

    @property
    def bound(self) -> str:
        """The largest part; what adds to memory and compute belongs to the larger of them."""
        parts = {
            "memory bandwidth": self.memory + self.other,
            "compute": self.compute + self.other,
            "launch": self.launch,
            "link": max(self.link, self.streamed),
            "disk": max(self.disk, self.read),
        }
        return max(parts, key=lambda name: parts[name])
