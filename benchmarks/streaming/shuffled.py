"""A schedule that reuses slots in an order nobody foresees, for comparisons that have to see the trap of
weights kept by their place: bitsandbytes' own products then read another layer's bytes in backward."""

from __future__ import annotations

from executor.streaming.schedule import Copy, Schedule


class Shuffled(Schedule):
    """Looks ahead in no way, and puts layers into whatever slot comes next."""

    turn = 0

    def _fetch_ahead(self) -> list[Copy]:
        return []

    def _latest_needed(self) -> int | None:
        reading = self._slot.get(self._reading) if self._reading is not None else None
        free = [slot for slot in range(len(self._held)) if slot != reading]
        self.turn += 1
        return free[(self.turn // 3) % len(free)]
