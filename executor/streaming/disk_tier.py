"""Layers that wait on disk: which they are, and the file they are written to where no slab file has them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from executor.errors import CannotHonour
from executor.streaming.direct_io import DirectFile, aligned_memory
from executor.streaming.ring import DiskBlock
from planner.memory.stream import RING_BUFFERS
from planner.placement import Tiers
from planner.units import format_bytes

_HINT = "free some space, or give another --output: the offload folder is made in it"


def layers_on_disk(
    total: int, resident: frozenset[int], device_map: Mapping[str, int | str]
) -> frozenset[int]:
    """Which of `total` layers are read from disk in every pass.

    Those that a plan's device map names, if its resident layers are `resident`. Else, with `resident` spread
    as the planner spreads them, as many layers stay in RAM as there, and the rest is on disk.

    >>> sorted(layers_on_disk(4, frozenset({1}), {"l.0": "cpu", "l.1": 0, "l.2": "disk", "l.3": "disk"}))
    [2, 3]
    >>> sorted(layers_on_disk(4, frozenset(), {"l.0": "cpu", "l.1": 0, "l.2": "disk", "l.3": "disk"}))
    [0, 2, 3]
    """
    numbered = ((name.rsplit(".", 1)[-1], place) for name, place in device_map.items())
    places = {int(number): place for number, place in numbered if number.isdigit()}
    named = frozenset(number for number, place in places.items() if place == "disk")
    on_card = {number for number, place in places.items() if isinstance(place, int)}
    if not named or on_card == resident:
        return named - resident
    in_ram = sum(place == "cpu" for place in places.values())
    again = Tiers(len(resident), max(0, total - len(resident) - in_ram)).places(total)
    return frozenset(layer for layer, place in enumerate(again) if place == "disk")


def ring_bytes(sizes: Iterable[int]) -> int:
    """RAM of the ring that layers of these sizes pass through."""
    known = list(sizes)
    return min(RING_BUFFERS, len(known)) * max(known, default=0)


class Spill:
    """A file without a name in `folder`, to which slabs are written once and read in every pass.

    It is gone with the process, however that ends. Nothing is made before the first slab.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: DirectFile | None = None
        self._memory: torch.Tensor | None = None
        self._end = 0

    def memory(self, nbytes: int) -> torch.Tensor:
        """Where to put a slab together; the same bytes again for the next one."""
        if self._memory is None or self._memory.numel() < nbytes:
            self._memory = aligned_memory(nbytes)
        return self._memory[:nbytes]

    def add(self, slab: torch.Tensor, to_come: int) -> DiskBlock:
        """Write `slab`; `to_come` bytes, itself included, will be written in all from here.

        Errors: `CannotHonour` where the file cannot be made or the disk takes no more.
        """
        try:
            if self._file is None:
                self._file = self._make(to_come)
            self._file.write(slab, self._end)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CannotHonour(f"cannot write the offload folder {self._folder}: {reason}", _HINT) from None
        block = DiskBlock(self._file, self._end, slab.numel())
        self._end += slab.numel()
        return block

    def _make(self, needed: int) -> DirectFile:
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            self._remove_folder()
            raise CannotHonour(
                f"the layers kept on disk take {format_bytes(needed)} and {self._folder.parent} has "
                f"{format_bytes(free)} free",
                _HINT,
            )
        path = self._folder / "layers.slab"
        path.unlink(missing_ok=True)
        file = DirectFile(path, writable=True)
        path.unlink()
        return file

    def finish(self) -> None:
        """All slabs are written: give back the memory they were put together in."""
        self._memory = None

    def close(self) -> None:
        """Give the disk's space back; nobody may be reading."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._remove_folder()

    def _remove_folder(self) -> None:
        with suppress(OSError):  # never made, or something else is in it
            self._folder.rmdir()
            self._folder.parent.rmdir()
