"""What it takes, besides its tensors, to make a parameter again: plain, 4 and 8 bits, packed experts.

A form is a small dictionary that JSON can hold. The tensors are those of `residency.weights_of`, in its
order; lookup tables are kept apart, since all weights share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from executor.errors import CannotHonour


def form_of(parameter: torch.Tensor, number_of: Callable[[torch.Tensor], int]) -> dict[str, Any]:
    """The form of a parameter or buffer; `number_of` files a lookup table and gives its number.

    Errors: `CannotHonour` for a kind of parameter that is not known here.
    """
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return {
            "kind": "4bit",
            **_state(state, number_of),
            "shape": list(state.shape),
            "quant_type": state.quant_type,
            "storage": _name(parameter.dtype),
            "stack": type(parameter) is nn.Parameter,  # of experts (`executor.packed_experts`)
            "nested": _state(state.state2, number_of) if state.nested else None,
        }
    if type(parameter).__name__ == "Int8Params":
        return {"kind": "8bit"}
    if type(parameter) not in (nn.Parameter, torch.Tensor, nn.Buffer):
        raise CannotHonour(f"weights of the kind {type(parameter).__name__} cannot be packed")
    return {"kind": "plain", "grad": parameter.requires_grad}


def _state(state: Any, number_of: Callable[[torch.Tensor], int]) -> dict[str, Any]:
    return {"blocksize": state.blocksize, "dtype": _name(state.dtype), "code": number_of(state.code)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_parameter(
    form: dict[str, Any], tensors: Sequence[torch.Tensor], tables: Sequence[torch.Tensor], module: nn.Module
) -> torch.Tensor:
    """The parameter of `module` that has this form and these tensors; plain ones may become buffers."""
    if form["kind"] == "4bit":
        return _make_4bit(form, tensors, tables, module)
    if form["kind"] == "8bit":
        from bitsandbytes.nn import Int8Params

        data, scale = tensors
        return Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scale)
    (data,) = tensors
    return nn.Parameter(data, requires_grad=form["grad"])


def _make_4bit(
    form: dict[str, Any], tensors: Sequence[torch.Tensor], tables: Sequence[torch.Tensor], module: nn.Module
) -> torch.Tensor:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    data, absmax, *rest = tensors
    nested, offset, outer = form["nested"], None, None
    if nested is not None:
        outer_absmax, offset = rest
        outer = QuantState(
            absmax=outer_absmax,
            code=tables[nested["code"]],
            blocksize=nested["blocksize"],
            dtype=getattr(torch, nested["dtype"]),
        )
    state = QuantState(
        absmax=absmax,
        shape=torch.Size(form["shape"]),
        code=tables[form["code"]],
        blocksize=form["blocksize"],
        quant_type=form["quant_type"],
        dtype=getattr(torch, form["dtype"]),
        offset=offset,
        state2=outer,
    )
    if form["stack"]:
        stack = nn.Parameter(data, requires_grad=False)
        stack.quant_state = state  # type: ignore[attr-defined]
        return stack
    module.quant_state = state
    return Params4bit(
        data,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=outer is not None,
        quant_type=state.quant_type,
        quant_storage=getattr(torch, form["storage"]),
        module=module,
        bnb_quantized=True,
    )
