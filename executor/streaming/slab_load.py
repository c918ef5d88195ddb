"""Making a model from a slab file, without its checkpoint's weights being read or quantized.

transformers builds the model as ever, but every weight is set to a stand-in that holds no values; meanwhile
the blocks of the file are read to where they will stay, and then the weights are pointed at them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn

from executor.streaming.arena import Arena, require_room
from executor.streaming.direct_io import DirectFile, switching_fast
from executor.streaming.disk_tier import layers_on_disk, ring_bytes
from executor.streaming.forms import make_parameter
from executor.streaming.layers import Stack, find_stack, tied_names
from executor.streaming.loader_hooks import StandIn, owner_of, reading_instead, set_weight, standing_in
from executor.streaming.loading import handing_over, refuse_too_many
from executor.streaming.outside import Outside
from executor.streaming.residency import Tables, Weight, weights_of
from executor.streaming.ring import DiskBlock
from executor.streaming.slab import Piece
from executor.streaming.slab_file import BlockEntry, SlabFile, SlabLayer, WeightEntry
from executor.streaming.slab_reader import SlabReader
from executor.streaming.streamer import StreamedLayer
from planner.placement import spread_evenly


class SlabLoad:
    """One load from `slab`, with `resident` layers on `device`, and the others and what `outside` names in
    `arena`. Layers that `device_map` places on disk stay in the file, and are checked when they are first
    read from it.

    Errors: `CannotHonour` for more layers than the model has.
    """

    def __init__(
        self,
        slab: SlabFile,
        resident: int,
        arena: Arena,
        outside: Outside,
        device: torch.device,
        device_map: Mapping[str, int | str],
    ) -> None:
        self._slab, self._arena, self._outside, self._device = slab, arena, outside, device
        refuse_too_many(resident, len(slab.layers))
        self._kept = spread_evenly(resident, len(slab.layers))
        self._on_disk = layers_on_disk(len(slab.layers), self._kept, device_map)
        self._file = DirectFile(slab.path) if self._on_disk else None
        self._tables = [_table(entry, device) for entry in slab.index.tables]
        self._shared = Tables()
        self._layouts = {block.offset: block.layout for block in slab.index.blocks}
        self._entries = dict(self._weights_in_file())
        self._elements: dict[tuple[torch.dtype, int], torch.Tensor] = {}
        self._made: dict[str, torch.Tensor] = {}
        self._tied: frozenset[str] = frozenset()
        self._blocks: dict[int, torch.Tensor] = {}
        self._model: Any = None
        self.stack: Stack | None = None

    def _weights_in_file(self) -> Iterator[tuple[str, tuple[WeightEntry, Sequence[Piece]]]]:
        """Every weight by name, and its pieces."""
        for block in self._slab.index.blocks:
            pieces = iter(self._layouts[block.offset].pieces)
            for weight in block.weights:
                yield weight.name, (weight, tuple(islice(pieces, weight.pieces)))

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within, transformers' loader makes the model of stand-ins; at the end they are the file's weights.

        Errors: `BadWeights` where the file is damaged, `CannotHonour` where RAM is too small.
        """
        stays = [block for block in self._slab.index.blocks if block.layer in self._on_disk]
        loaded = [block for block in self._slab.index.blocks if block.layer not in self._on_disk]
        ring = ring_bytes(block.nbytes for block in stays)
        require_room(ring + sum(block.nbytes for block in loaded if self._waits_on_host(block)))
        reader = SlabReader(self._slab, loaded, self._place, self._device)
        try:
            with switching_fast():
                with handing_over(self), reading_instead(self._stand_ins), standing_in(self._has, self._make):
                    yield
                self.stack = find_stack(self._model)
                self._blocks = reader.wait()
        finally:
            reader.close()
        for block in self._slab.index.blocks:
            if self._waits_on_host(block) and not self._streams(block):
                self._hand_over(block)
            elif not self._streams(block):
                self._point(block)

    def took(self, model: Any, name: str) -> None:
        """The loader has set a weight that is in no slab file: there is none."""

    def layers(self) -> list[StreamedLayer]:
        """The streamed layers in their order."""
        streamed = [layer.entry for layer in self._slab.layers if self._streams(layer.entry)]
        return [self._streamed(number, entry) for number, entry in enumerate(streamed)]

    def _streams(self, block: BlockEntry) -> bool:
        return block.layer is not None and block.layer not in self._kept

    def _waits_on_host(self, block: BlockEntry) -> bool:
        """In the arena: layers that are streamed, and what the plan places in RAM."""
        if block.layer is not None:
            return self._streams(block)
        path, _, leaf = block.weights[0].name.rpartition(".")
        return path in self._outside.names and leaf == "weight"

    def _place(self, block: BlockEntry) -> torch.Tensor:
        if self._waits_on_host(block):
            return self._arena.take(block.nbytes)
        return torch.empty(block.nbytes, dtype=torch.uint8, device=self._device)

    # ----------------------------------------------------------------- while transformers builds the model

    def _stand_ins(self, _unread: dict[str, Any]) -> dict[str, StandIn]:
        return {name: StandIn(self._make) for name in self._entries}

    def _has(self, _model: Any, name: str) -> bool:
        return name in self._entries

    def _make(self, model: Any, name: str) -> None:
        """Set the weight `name` to one of its form that holds no values."""
        if self._model is None:
            self._model, self._tied = model, tied_names(model)
        entry, pieces = self._entries[name]
        # transformers ties two weights that are in a checkpoint if they are equal; had they been, one of
        # them would not be in the file
        value = len(self._made) % 100 if name in self._tied else 0
        tensors = [self._stand_in(piece, value) for piece in pieces]
        module, leaf = owner_of(model, name)
        self._made[name] = make_parameter(entry.form, tensors, self._tables, module)
        set_weight(model, name, self._made[name])
        self._made[name] = getattr(module, leaf)

    def _stand_in(self, piece: Piece, value: int) -> torch.Tensor:
        """A tensor like `piece` that has one element."""
        key = (piece.dtype, value)
        if key not in self._elements:
            self._elements[key] = torch.full((), value, dtype=piece.dtype, device=self._device)
        return self._elements[key].expand(piece.shape)

    # ----------------------------------------------------------------- once the bytes are there

    def _weights(self, block: BlockEntry) -> list[Weight]:
        """Of all weights of a block, in the order of its pieces."""
        return [
            weight
            for entry in block.weights
            for weight in weights_of(self._owner(entry), self._made[entry.name], self._shared)
        ]

    def _owner(self, entry: WeightEntry) -> nn.Module:
        module: nn.Module = owner_of(self._model, entry.name)[0]
        return module

    def _point(self, block: BlockEntry) -> None:
        """Let the weights of a block that stays be its bytes."""
        views = self._layouts[block.offset].views(self._blocks[block.offset])
        for weight, view in zip(self._weights(block), views, strict=True):
            for owner, attribute in weight.places:
                setattr(owner, attribute, view)

    def _hand_over(self, block: BlockEntry) -> None:
        """Let a module outside the layers have its weight in host memory."""
        (table,) = self._layouts[block.offset].views(self._blocks[block.offset])
        weight = self._made[block.weights[0].name]
        assert isinstance(weight, nn.Parameter)
        self._outside.hold(weight, table)

    def _streamed(self, number: int, block: BlockEntry) -> StreamedLayer:
        assert self.stack is not None and block.layer is not None
        places = tuple(weight.places for weight in self._weights(block))
        readers = tuple(dict.fromkeys(map(self._owner, block.weights)))
        layer, slab = self.stack.layers[block.layer], self._home(block)
        return StreamedLayer(number, layer, readers, self._layouts[block.offset], places, slab)

    def _home(self, block: BlockEntry) -> torch.Tensor | DiskBlock:
        if self._file is None or block.layer not in self._on_disk:
            return self._blocks[block.offset]
        check = SlabLayer(self._slab.path, block).check
        return DiskBlock(self._file, block.offset, block.nbytes, check)

    def close(self) -> None:
        """Nothing is read from the file any more."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _table(entry: tuple[str, bytes], device: torch.device) -> torch.Tensor:
    dtype, data = entry
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).to(device)
