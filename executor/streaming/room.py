"""Whether what is still to be loaded fits RAM, told before it is taken: the system would end the process."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from executor.streaming.arena import require_room
from executor.streaming.disk_tier import ring_bytes
from executor.streaming.layers import Stack

Shapes = frozenset[tuple[str, tuple[int, ...]]]


class Room:
    """Sizes of the streamed layers `names` (number: names of their parameters) as far as they are known.

    A layer's slab has a size once it is packed, and with it have all layers of the same shapes. Others are
    taken for as large, in proportion to their parameters.
    """

    def __init__(
        self, model: Any, stack: Stack, names: Mapping[int, Collection[str]], on_disk: frozenset[int]
    ) -> None:
        self._on_disk = on_disk & names.keys()
        self._left = set(names)
        self._shapes: dict[int, Shapes] = {}
        self._elements: dict[int, int] = {}
        for index, full_names in names.items():
            prefix = f"{stack.name}.{index}."
            shapes = {name.removeprefix(prefix): model.get_parameter(name).shape for name in full_names}
            self._shapes[index] = frozenset((name, tuple(shape)) for name, shape in shapes.items())
            self._elements[index] = sum(shape.numel() for shape in shapes.values())
        self._sizes: dict[Shapes, int] = {}

    def packing(self, index: int, nbytes: int) -> None:
        """The slab of layer `index` has `nbytes` bytes and is about to be taken.

        Errors: `CannotHonour` where RAM is too small for it and all that follow.
        """
        if self._shapes[index] not in self._sizes:
            self._sizes[self._shapes[index]] = nbytes
            per_element = nbytes / self._elements[index]
            in_ram = sum(self._size(other, per_element) for other in self._left - self._on_disk)
            require_room(in_ram + ring_bytes(self._size(other, per_element) for other in self._on_disk))
        self._left.discard(index)

    def on_disk_to_come(self, index: int, nbytes: int) -> int:
        """Bytes to be written to disk from layer `index` on, of `nbytes` bytes, itself included."""
        per_element = nbytes / self._elements[index]
        return sum(self._size(other, per_element) for other in (self._left | {index}) & self._on_disk)

    def _size(self, index: int, per_element: float) -> int:
        return self._sizes.get(self._shapes[index]) or int(self._elements[index] * per_element)
