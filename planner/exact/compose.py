"""From the segments of a few layers to those of all: replay what each adds, in the model's order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planner.exact.layers import Layers
from planner.exact.storages import Bytes, Segment


@dataclass(frozen=True)
class Moment:
    """The fullest point of one segment of the whole run: bytes by origin, and what was made there."""

    phase: str
    layer: int | None
    live: Bytes
    fresh: int
    origin: str
    """Of what the segment made."""
    block: int

    @property
    def bytes(self) -> int:
        """All bytes alive."""
        return sum(self.live.values())


def replay(segments: Sequence[Segment], layers: Layers | None) -> list[Moment]:
    """The moments of the whole run. What is alive at the first segment's start is taken as it stands."""
    if not segments:
        return []
    live = segments[0].start.copy()
    moments = []
    for segment, layer in _in_order(segments, layers):
        shift = _minus(live, segment.start)
        full = _plus(segment.peak, shift)
        moments.append(Moment(segment.phase, layer, full, segment.fresh, segment.origin, segment.block))
        live = _plus(segment.end, shift)
        for origin, n in segment.start.items():
            if n and not segment.end[origin]:  # let go as a whole, however many layers had part in it
                live[origin] = 0
    return moments


def _in_order(segments: Sequence[Segment], layers: Layers | None) -> Iterator[tuple[Segment, int | None]]:
    """Segments as the whole model would run them: runs of layer segments unrolled to all layers."""
    if layers is None or layers.whole:
        yield from ((segment, segment.layer) for segment in segments)
        return
    i = 0
    while i < len(segments):
        if segments[i].layer is None:
            yield segments[i], None
            i += 1
            continue
        run: dict[int, list[Segment]] = {}
        phase = segments[i].phase
        backwards = phase == "backward"
        while i < len(segments) and segments[i].layer is not None and segments[i].phase == phase:
            run.setdefault(segments[i].layer, []).append(segments[i])  # type: ignore[arg-type]
            i += 1
        order = range(len(layers.kinds))
        for index in reversed(order) if backwards else order:
            yield from ((segment, index) for segment in run.get(layers.sample(index), ()))


def _plus(a: Bytes, b: Bytes) -> Bytes:
    out = Counter(a)
    for key, n in b.items():
        out[key] += n
    return out


def _minus(a: Bytes, b: Bytes) -> Bytes:
    out = Counter(a)
    for key, n in b.items():
        out[key] -= n
    return out
