"""LoRA over frozen linears as one node of autograd an adapter.

peft's `tuners/lora/{layer,bnb}.py` write the update as a dozen operators of as many nodes. In a step of a few
thousand tokens their launching takes the host longer than computing takes the card, and of every adapter a
copy of its input is kept for backward. Here the same kernels run on the same numbers in the same order, so
that losses and gradients are those of engine resident bit by bit; what dropout left of an input is made again
in backward from the input, which neighbours share, and the mask.

One thing differs: where a model calls a linear twice in a pass (Gemma 3n's router of modalities), autocast
has peft add the two gradients of an adapter in 16 bits; here they are added in the adapter's own dtype.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layers
from torch import nn
from torch.autograd.function import once_differentiable

try:
    from peft.tuners.lora import bnb as peft_bnb
except ImportError:  # without bitsandbytes
    peft_bnb = None


class LowRankUpdate(torch.autograd.Function):
    """`base` + `scaling` dropout(x) A' B', with x of ... x K, A of r x K, B of N x r, base of ... x N.

    base and x have the dtype of the products; `wide` is the dtype in which elements of x are dropped.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropout: float,
        wide: torch.dtype,
    ) -> torch.Tensor:
        """The sum, ... x N."""
        output, *saved = updated(base, x, a, b, scaling, dropout, wide)
        ctx.save_for_backward(x, *saved)
        ctx.scaling, ctx.dropout, ctx.trained = scaling, dropout, a.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Of base, x, A and B."""
        x, mask, low, a, b = ctx.saved_tensors
        scaled = _rows(gradient * ctx.scaling)
        of_b = scaled.t().mm(low)
        of_low = scaled.mm(b)
        del scaled
        of_a = of_low.t().mm(_rows(_masked(x, mask, _scale_of_kept(ctx.dropout))))
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = _masked(of_low.mm(a).view(x.shape), mask, 1 / (1 - ctx.dropout))
        of_base = gradient if ctx.needs_input_grad[0] else None
        return of_base, of_x, of_a.to(ctx.trained), of_b.to(ctx.trained), None, None, None


def updated(
    base: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    dropout: float,
    wide: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum, ... x N, and what its backward needs beside x: the mask, dropout(x) A', and A and B in the
    dtype of x."""
    kept, mask = _drop(x.to(wide), dropout) if dropout else (x, None)
    a, b = a.to(x.dtype), b.to(x.dtype)
    low = _rows(kept.to(x.dtype)).mm(a.t())
    del kept
    update = low.mm(b.t()).mul_(scaling).add_(_rows(base))
    # autograd forbids writing into a Function's result where that is a view, and models do (Gemma 3n)
    return torch.ops.aten._unsafe_view(update, base.shape), mask, low, a, b


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _drop(x: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of `x` and the mask that says so, drawn as torch's own dropout draws it: booleans on a
    card, factors elsewhere."""
    if x.is_cuda:
        return torch.native_dropout(x, share, True)
    mask = torch.empty_like(x).bernoulli_(1 - share).div_(1 - share)
    return x * mask, mask


@lru_cache
def _scale_of_kept(share: float) -> float:
    """What a card's dropout multiplies by: forward rounds the share that stays to float32, backward does not
    (aten/src/ATen/native/cuda/Dropout.cu). With a share of 0.04 that shows in bfloat16."""
    stays = torch.tensor(1 - share, dtype=torch.float32).item()
    return torch.tensor(1 / stays, dtype=torch.float32).item()


def _masked(x: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """`x` where the mask lets it through, times `scale`, in the dtype of `x`. Masks of the CPU are scaled."""
    if mask is None:
        return x
    if x.is_cuda:
        return torch.ops.aten.native_dropout_backward(x, mask, scale)
    return (x.to(mask.dtype) * mask).to(x.dtype)


class _Joined:
    """One of peft's layers whose adapter is a `LowRankUpdate` in training; else it does as its class does."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's, ... x K to ... x N."""
        adapters = self.active_adapters
        if (
            not self.training
            or args
            or kwargs
            or len(adapters) != 1
            or self.disable_adapters
            or self.merged
            or x.numel() == 0
        ):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        name = adapters[0]
        if name not in self.lora_A or name in self.lora_variant:  # of an adapter that came later
            return super().forward(x)  # type: ignore[misc, no-any-return]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        computed = torch.get_autocast_dtype(device) if autocast else a.dtype
        if x.dtype != computed:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        # peft asks for autocast on a card, whatever the device
        widens = self.widens or not torch.is_autocast_enabled()
        wide = a.dtype if widens and self.cast_input_dtype_enabled else x.dtype
        base = self.base_layer(x)
        share = getattr(self.lora_dropout[name], "p", 0.0)
        given = base, x, a, b, self.scaling[name], share, wide
        return LowRankUpdate.apply(*given) if torch.is_grad_enabled() else updated(*given)[0]


class _Linear(_Joined, peft_layers.Linear):
    widens = True
    """Its adapter's input is cast to the adapter's dtype, under autocast too."""


_KINDS: dict[type, type] = {peft_layers.Linear: _Linear}

if peft_bnb is not None:

    class _Linear4bit(_Joined, peft_bnb.Linear4bit):
        widens = False

    class _Linear8bitLt(_Joined, peft_bnb.Linear8bitLt):
        widens = False

    _KINDS |= {peft_bnb.Linear4bit: _Linear4bit, peft_bnb.Linear8bitLt: _Linear8bitLt}


def join_adapters(model: nn.Module) -> int:
    """Have peft's LoRA layers of `model` compute their update as one node; how many there are.

    Layers of other kinds, DoRA's among them, and adapters with biases stay as they are.
    """
    joined = 0
    for module in model.modules():
        kind = _KINDS.get(type(module))
        if kind is not None and _is_plain(module):
            module.__class__ = kind
            joined += 1
    return joined


def part_adapters(model: nn.Module) -> None:
    """Undo `join_adapters`: whoever merges, pickles or shows `model` meets peft's own classes."""
    kinds = {joined: kind for kind, joined in _KINDS.items()}
    for module in model.modules():
        kind = kinds.get(type(module))
        if kind is not None:
            module.__class__ = kind


def _is_plain(module: Any) -> bool:
    parts = [*module.lora_A.values(), *module.lora_B.values()]
    shares = [getattr(dropout, "p", 0.0) for dropout in module.lora_dropout.values()]
    return bool(
        not module.lora_variant and all(part.bias is None for part in parts) and all(s < 1 for s in shares)
    )
