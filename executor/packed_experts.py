"""Routed experts in NF4: the fused stacks of a layer packed expert by expert, and the product with them.

transformers keeps the experts of a layer as 3-D parameters, which bitsandbytes leaves in 16 bits. Here every
expert of a stack is quantized for itself, as bitsandbytes quantizes a linear (blocks of 64 along the inputs,
double quantization), and the stack's parameter holds the packed bytes of all of them. A pass multiplies by
the experts that tokens chose and by no other, and at most one is dequantized at a time.

Shapes: E experts, N outputs and K inputs of one expert's weight, S = tokens x experts a token rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

STACKS = ("gate_up_proj", "up_proj", "down_proj")
"""The fused parameters of experts whose class carries transformers' `use_experts_implementation`."""
_BLOCK = 64


def is_stack(model: nn.Module, name: str) -> bool:
    """Is the parameter called `name` a stack of experts of `model` that is, or will be, packed?"""
    path, _, leaf = name.rpartition(".")
    return leaf in STACKS and isinstance(model.get_submodule(path), PackedExperts)


def adopt_experts(model: nn.Module) -> int:
    """Make every fused experts module of `model` one that multiplies by packed stacks; how many there are.

    The weights are left to the loader. Modules whose class computes its experts in its own way stay as they
    are.
    """
    found = [module for module in model.modules() if _follows_interface(module)]
    for module in found:
        module.__class__ = _packed_kind(type(module))
    return len(found)


def _follows_interface(module: nn.Module) -> bool:
    stacks = [getattr(module, name, None) for name in STACKS]
    fused = any(isinstance(stack, nn.Parameter) and stack.dim() == 3 for stack in stacks)
    return fused and hasattr(module, "is_transposed")


# --------------------------------------------------------------------------- packing


class Packing:
    """A stack in the making: experts are added in their order, each quantized on the device it comes on."""

    def __init__(self, experts: int, transposed: bool) -> None:
        self._experts, self._transposed, self._next = experts, transposed, 0
        self._parts: tuple[torch.Tensor, ...] = ()
        self._state: Any = None

    def add(self, weight: torch.Tensor) -> None:
        """The next expert: N x K, or K x N where the model keeps its experts transposed."""
        from bitsandbytes.functional import quantize_4bit

        rows = (weight.t() if self._transposed else weight).contiguous()
        packed, state = quantize_4bit(rows, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
        tensors = (packed, state.absmax, state.state2.absmax, state.offset)
        if not self._parts:
            self._parts = tuple(t.new_empty((self._experts, *t.shape)) for t in tensors)
            self._state = state
        for part, tensor in zip(self._parts, tensors, strict=True):
            part[self._next] = tensor
        self._next += 1

    def parameter(self) -> nn.Parameter:
        """The packed stack, E x N K / 2 x 1 bytes. Its `quant_state` holds the scales of all experts."""
        from bitsandbytes.functional import QuantState

        assert self._next == self._experts, f"{self._next} of {self._experts} experts"
        packed, absmax, nested, offset = self._parts
        first = self._state
        parameter = nn.Parameter(packed, requires_grad=False)
        inner = QuantState(nested, code=first.state2.code, blocksize=256, dtype=first.state2.dtype)
        parameter.quant_state = QuantState(  # type: ignore[attr-defined]
            absmax, first.shape, first.code, _BLOCK, "nf4", first.dtype, offset, inner
        )
        return parameter


def pack(weights: Iterable[torch.Tensor], experts: int, transposed: bool) -> nn.Parameter:
    """The packed stack of `experts` weights, a whole stack or one weight after the other."""
    packing = Packing(experts, transposed)
    for weight in weights:
        packing.add(weight)
        del weight  # before the next one is made
    return packing.parameter()


def state_of(state: Any, at: Any) -> Any:
    """The quantization state of the expert `at` of a stack's `state`, of views into it; of copies for the
    experts of an index tensor."""
    from bitsandbytes.functional import QuantState

    inner = state.state2
    nested = QuantState(inner.absmax[at], code=inner.code, blocksize=256, dtype=inner.dtype)
    return QuantState(
        state.absmax[at], state.shape, state.code, _BLOCK, "nf4", state.dtype, state.offset[at], nested
    )


def dequantized(stack: nn.Parameter, expert: int) -> torch.Tensor:
    """The weight of one expert, N x K."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(stack.data[expert], state_of(stack.quant_state, expert))  # type: ignore[attr-defined]


# --------------------------------------------------------------------------- computing

Groups = Sequence[tuple[int, int, int]]
"""Expert, first row and the row after its last, for every expert that has rows."""


class _Product(torch.autograd.Function):
    """Rows times the weights of their experts; the weights are frozen.

    It keeps the module and the stack's name, no weight: a streamed layer's memory holds another layer's bytes
    by the time of backward, which acquires the layer and dequantizes again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, experts: PackedExperts, name: str, groups: Groups) -> torch.Tensor:
        from bitsandbytes import matmul_4bit

        ctx.experts, ctx.name, ctx.groups = experts, name, groups
        stack = getattr(experts, name)
        packed, state = stack.data, stack.quant_state
        out = x.new_empty((len(x), state.shape[0]))
        with torch.autocast(x.device.type, enabled=False):
            for expert, first, end in groups:
                # bitsandbytes takes its fused kernel for few rows and dequantizes for many
                out[first:end] = matmul_4bit(x[first:end], packed[expert], state_of(state, expert))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.experts.acquire()
        stack = getattr(ctx.experts, ctx.name)
        back = gradient.new_empty((len(gradient), stack.quant_state.shape[1]))
        with torch.autocast(gradient.device.type, enabled=False):
            for expert, first, end in ctx.groups:
                weight = dequantized(stack, expert).to(gradient.dtype)
                torch.mm(gradient[first:end], weight, out=back[first:end])
        return back, None, None, None


def _few_rows(x: torch.Tensor, stack: Any, ids: torch.Tensor) -> torch.Tensor:
    from bitsandbytes import matmul_4bit

    packed, state = stack.data[ids], state_of(stack.quant_state, ids)
    with torch.autocast(x.device.type, enabled=False):
        rows = [matmul_4bit(x[n : n + 1], packed[n], state_of(state, n)) for n in range(len(x))]
    return torch.cat(rows)


class PackedExperts(nn.Module):
    """What an experts module does with packed stacks. Its class is made by `adopt_experts`."""

    acquire: Callable[[], None] = staticmethod(lambda: None)
    """Have the stacks in memory; set by the engine that moves them."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As transformers' `grouped_mm_experts_forward`: rows in the order of their experts, summed up in
        the order of a token's choice. hidden_states: T x D; index and weights: T x experts a token."""
        tokens, chosen = top_k_index.shape
        ids = top_k_index.reshape(-1)
        if 2 * len(ids) <= len(self.down_proj) and not torch.is_grad_enabled():
            rows = self._experts(hidden_states.repeat_interleave(chosen, 0), ids, None)
            rows = rows * top_k_weights.reshape(-1, 1)
        else:
            ids, order = torch.sort(ids, stable=True)
            rows = self._experts(hidden_states[order // chosen], ids, self._groups(ids))
            rows = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
            rows = rows[back]
        return rows.view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)

    def _experts(self, rows: torch.Tensor, ids: torch.Tensor, groups: Groups | None) -> torch.Tensor:
        """Each row through its expert; `groups` as `_linear` takes them."""
        up = "gate_up_proj" if self._has("gate") else "up_proj"
        rows = self._linear(rows, up, ids, groups)
        rows = self._apply_gate(rows) if self._has("gate") else self.act_fn(rows)
        rows = self._linear(rows, "down_proj", ids, groups)
        return self.post_expert_norm(rows) if getattr(self, "has_post_expert_norm", False) else rows

    def _linear(self, x: torch.Tensor, name: str, ids: torch.Tensor, groups: Groups | None) -> torch.Tensor:
        """A few rows (`groups` None) are multiplied one by one by gathered copies of their packed experts:
        then the host need not know which they are, and a decode step can be recorded in a CUDA graph."""
        stack = getattr(self, name)
        x = x.to(stack.quant_state.dtype)
        out = _few_rows(x, stack, ids) if groups is None else _Product.apply(x, self, name, groups)
        bias = getattr(self, f"{name}_bias", None) if getattr(self, "has_bias", False) else None
        return out if bias is None else out.add_(bias[ids])

    def _groups(self, ids: torch.Tensor) -> list[tuple[int, int, int]]:
        """The one read on the host: how many rows each expert has. `ids`: in their order."""
        groups, first = [], 0
        for expert, count in enumerate(torch.bincount(ids, minlength=len(self.down_proj)).tolist()):
            if count:
                groups.append((expert, first, first + count))
                first += count
        return groups

    def _has(self, what: str) -> bool:
        return bool(getattr(self, f"has_{what}", True))


@cache
def _packed_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name, so that whatever goes by names finds what it knows."""
    return type(kind.__name__, (PackedExperts, kind), {"__module__": kind.__module__})
