"""Where a layer keeps its weights, below the level of its parameters.

A weight is reached through attributes: `data` of a parameter, and for bitsandbytes' kinds those of their
quantization state. Setting these attributes moves a layer from one place to another; the parameter objects,
which modules, peft and optimizers know, stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Weight:
    """One tensor of a layer and every attribute that must name it."""

    tensor: torch.Tensor
    places: tuple[tuple[Any, str], ...]
    """Object and attribute."""


class Tables:
    """Lookup tables of quantized formats. They are the same for all weights: one copy stays on the device."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def shared(self, table: torch.Tensor) -> torch.Tensor:
        """The kept table with these values."""
        for kept in self._kept:
            if kept.device == table.device and torch.equal(kept, table):
                return kept
        self._kept.append(table)
        return table


def weights_of(owner: nn.Module, parameter: nn.Parameter, tables: Tables) -> Iterator[Weight]:
    """The tensors behind `parameter` of module `owner`.

    NF4 with double quantization has the packed weight (two values a byte), a uint8 absmax for 64 values, an
    fp32 absmax for 256 of those, and an offset; LLM.int8 the int8 weight and one fp32 scale a row.
    """
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        yield Weight(parameter.data, ((parameter, "data"),))
        yield from _scales(state, tables)
    elif getattr(parameter, "CB", None) is not None:
        owner.init_8bit_state()  # type: ignore[operator]  # what the module does at its first pass
        state = owner.state
        yield Weight(parameter.data, ((parameter, "data"), (state, "CB")))
        yield Weight(state.SCB, ((state, "SCB"),))  # type: ignore[arg-type]
    else:
        yield Weight(parameter.data, ((parameter, "data"),))


def _scales(state: Any, tables: Tables) -> Iterator[Weight]:
    state.code = tables.shared(state.code)
    yield Weight(state.absmax, ((state, "absmax"),))
    if state.nested:
        nested = state.state2
        nested.code = tables.shared(nested.code)
        yield Weight(nested.absmax, ((nested, "absmax"),))
        yield Weight(state.offset, ((state, "offset"),))


def nowhere(tensor: torch.Tensor) -> torch.Tensor:
    """A stand-in of the same shape, dtype and device that holds one element."""
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
