"""Weights outside the layers that wait in host memory: embeddings, and the output projection.

The plan's device map names their modules with "cpu". Each leaves the device as soon as the loader has set it;
tied ones are one block of host memory, also where the checkpoint has them twice. On the device their
parameters keep shape and dtype but hold a single NaN, so that whatever would read them past the modules made
here shows at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from executor.errors import CannotHonour
from executor.streaming.arena import Arena
from executor.streaming.embeddings import Gather, HostRows, read_from_host
from executor.streaming.head import blocks_of_table, read_in_blocks
from executor.streaming.loader_hooks import StandIn
from executor.streaming.loading import replaced
from executor.streaming.streamer import StreamedLayer, Streamer
from planner.units import MIB, format_bytes

_COMPARED = 64 * MIB


class Outside:
    """The modules `names` of a model, with their weights in host memory."""

    def __init__(self, names: Collection[str], arena: Arena) -> None:
        self.names = tuple(names)
        self._arena = arena
        self._tables: dict[int, torch.Tensor] = {}
        self._by_name: dict[str, torch.Tensor] = {}
        self._kept: list[nn.Parameter] = []
        """Whose identities are the keys of the tables."""

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Within, transformers' loader hands over these modules' weights as it sets them."""
        from transformers import core_model_loading

        def around(stock: Any) -> Any:
            def set_and_take(model: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
                result = stock(model, name, value, *args, **kwargs)
                path, _, leaf = name.rpartition(".")
                # what stands in for a slab file's weight is handed to `hold` once it is read
                if path in self.names and leaf == "weight" and not isinstance(value, StandIn):
                    self._take(model, path)
                return result

            return set_and_take

        with replaced(core_model_loading, "set_param_for_module", around):
            yield

    def _take(self, model: Any, path: str) -> None:
        """Take the weight of the module at `path`, unless it is what one that it is tied to has been already.

        By now the loader has not tied them, and it will not: it would compare what `hold` leaves of them.
        """
        weight, name = model.get_submodule(path).weight, f"{path}.weight"
        for twin in _tied_to(model, name):
            table = self._by_name.get(twin)
            if table is not None and _equal(table, weight.data):
                values = weight.data
                self.hold(weight, table)
                _free(values)
                return
        self._by_name[name] = self._table(path, weight)

    def _table(self, name: str, weight: nn.Parameter) -> torch.Tensor:
        """The weight's place in host memory, V x D, to which it goes now if it has not yet."""
        found = self._tables.get(id(weight))
        if found is not None:
            return found
        values = weight.data
        _require_room(name, values.nbytes)
        table = self._arena.take(values.nbytes).view(values.dtype).view(values.shape)
        table.copy_(values)
        self.hold(weight, table)
        _free(values)
        return table

    def hold(self, weight: nn.Parameter, table: torch.Tensor) -> None:
        """`table`, in host memory, has the values of `weight`."""
        nothing = torch.full((), float("nan"), dtype=weight.dtype, device=weight.device)
        weight.data = nothing.expand(weight.shape)
        self._tables[id(weight)] = table
        self._kept.append(weight)

    def serve(self, model: Any, layers: list[StreamedLayer], device: torch.device) -> list[StreamedLayer]:
        """Have embeddings read from host memory; returns what of the output projection is to be streamed
        after `layers`, nothing if it stays.

        Errors: `CannotHonour` for names the model lacks, modules of other kinds, and tied weights of which
        one is to stay.
        """
        blocks: list[StreamedLayer] = []
        gather: Gather | None = None
        for name in self.names:
            module = _find(model, name)
            table = self._table(name, module.weight)
            if module is model.get_output_embeddings():
                blocks = blocks_of_table(module, table, len(layers))
            else:
                gather = gather or Gather(device, self._arena)
                read_from_host(name, module, HostRows(table, device, self._arena, gather))
        self._refuse_half_of_a_tie(model)
        return blocks

    def notes(self, blocks: list[StreamedLayer]) -> list[str]:
        """What the report says of it."""
        if not self.names:
            return []
        text = f"kept in RAM: {', '.join(self.names)}"
        return [f"{text}; the output projection comes in {len(blocks)} blocks" if blocks else text]

    def _refuse_half_of_a_tie(self, model: Any) -> None:
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if id(weight) in self._tables and name not in self.names:
                raise CannotHonour(
                    f"{name} shares its weights with {' and '.join(self.names)}, which the plan keeps in RAM",
                    "place both there, or neither",
                )


def start_head(model: Any, blocks: list[StreamedLayer], streamer: Streamer) -> None:
    """Have the output projection read `blocks` as `streamer` brings them."""
    if blocks:
        read_in_blocks(model.get_output_embeddings(), blocks, streamer)


def _find(model: Any, name: str) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CannotHonour(f"the plan places {name} in RAM and the model has no such module") from None
    if isinstance(module, nn.Embedding) or (
        module is model.get_output_embeddings() and type(module) is nn.Linear
    ):
        return module
    raise CannotHonour(
        f"engine stream keeps {name} ({type(module).__name__}) on the card, and the plan places it in RAM",
        "beside layers, embeddings and plain output projections can be there",
    )


def _tied_to(model: Any, name: str) -> list[str]:
    """Weights that the model's class ties to the weight `name`."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    source = tied.get(name, name)
    return [other for other in (source, *(k for k, v in tied.items() if v == source)) if other != name]


def _equal(table: torch.Tensor, values: torch.Tensor) -> bool:
    """Are they the same, bit by bit? Piece by piece, for another table has no room."""
    if table.shape != values.shape or table.dtype != values.dtype:
        return False
    ours, theirs = table.view(-1).view(torch.uint8), values.reshape(-1).view(torch.uint8)
    pieces = zip(ours.split(_COMPARED), theirs.split(_COMPARED), strict=True)
    return all(torch.equal(a, b.to(a.device)) for a, b in pieces)


def _free(values: torch.Tensor) -> None:
    """Give the memory back at once: the loader names a tensor until it has made the next, and two tables
    would be on the card together."""
    storage = values.untyped_storage()
    if values.is_cuda and storage.nbytes() == values.nbytes:
        storage.resize_(0)
        torch.cuda.empty_cache()  # else layers that stay would settle in the block and keep it


def _require_room(name: str, needed: int) -> None:
    from executor.engines.accelerate import available_ram

    available = available_ram()
    if available is not None and needed > available:
        raise CannotHonour(
            f"{name} takes {format_bytes(needed)} of RAM and {format_bytes(available)} are available",
            "close other programs, or keep it on the card",
        )
