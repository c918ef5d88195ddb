"""bitsandbytes' linears with exact gradients when their weights move between forward and backward.

bitsandbytes' 4-bit product keeps the packed weight on `ctx`, past autograd's saved tensors (bitsandbytes
issue 2034): after its slot was filled again, backward multiplies by another layer's bytes while the loss
looks healthy. Its 8-bit product keeps the module's state. Here both keep the module itself, acquire its
layer in backward, and let the stock code compute, so gradients are those of a resident model bit by bit.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.autograd._functions import MatMul4Bit, MatMul8bitFp, MatMul8bitLt
from bitsandbytes.functional import _convert_weight_packed_for_cpu

from executor.packed_experts import PackedExperts
from executor.streaming.streamer import StreamedLayer, Streamer


class _Product4bit(MatMul4Bit):
    """bitsandbytes' product with the module in place of its packed weight."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, out: Any, bias: Any, linear: Linear4bit) -> Any:
        output = MatMul4Bit.forward(ctx, x, weight, out, bias, linear.weight.quant_state)
        ctx.linear = linear
        if not ctx.is_empty:
            ctx.tensors = (None, None)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        if ctx.is_empty:
            return MatMul4Bit.backward(ctx, gradient)
        ctx.linear.acquire()
        ctx.tensors = (None, ctx.linear.weight.data.view(-1, 1))
        try:
            return MatMul4Bit.backward(ctx, gradient)
        finally:
            ctx.tensors = (None, None)


class _Acquiring8bit:
    """Makes an 8-bit product of bitsandbytes acquire the layer before its backward.

    Its context keeps the module's state, whose tensors move with the layer.
    """

    stock: type[torch.autograd.Function]

    @classmethod
    def forward(cls, ctx: Any, x: Any, weight: Any, out: Any, bias: Any, linear: Linear8bitLt) -> Any:
        ctx.linear = linear
        return cls.stock.forward(ctx, x, weight, out, bias, linear.state)

    @classmethod
    def backward(cls, ctx: Any, gradient: Any) -> Any:
        ctx.linear.acquire()
        return cls.stock.backward(ctx, gradient)


class _Product8bit(_Acquiring8bit, MatMul8bitLt):
    stock = MatMul8bitLt


class _Product8bitOnCpu(_Acquiring8bit, MatMul8bitFp):
    stock = MatMul8bitFp


class _Streamed:
    """A linear that knows its layer. Instances are made by `adopt`, from bitsandbytes' own.

    The kinds keep bitsandbytes' names: peft tells them by these.
    """

    streamer: Streamer
    layer: StreamedLayer

    def acquire(self) -> None:
        """Have the weights in a slot."""
        self.streamer.acquire(self.layer)

    def __deepcopy__(self, memo: Any) -> Any:
        """Itself: a weight that moves has no copy. peft asks for one to look at, making DoRA's norms."""
        return self


class Linear4bit(_Streamed, bnb.nn.Linear4bit):  # type: ignore[misc]
    """bitsandbytes' 4-bit linear whose packed weight may move between forward and backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `Linear4bit.forward`."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._forward_packed_for_cpu(x) if self._packs_for_cpu(x) else super().forward(x)
        given = x.dtype
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product4bit.apply(x, self.weight, None, bias, self).to(given)

    def _packs_for_cpu(self, x: torch.Tensor) -> bool:
        return x.device.type == "cpu" and bool(self.support_avx512bf16_for_cpu) and not self.training

    def _forward_packed_for_cpu(self, x: torch.Tensor) -> torch.Tensor:
        """On CPUs with AVX-512 BF16 the stock linear repacks its weight in place for a kernel that rounds
        otherwise; a slot's bytes must stay, so it is repacked beside them."""
        given = x.dtype
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        packed, state = _convert_weight_packed_for_cpu(self.weight.data, copy.copy(self.weight.quant_state))
        return bnb.matmul_4bit(x, packed, bias=bias, quant_state=state).to(given)


class Linear8bitLt(_Streamed, bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """bitsandbytes' 8-bit linear whose weight may move between forward and backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `Linear8bitLt.forward`."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        self.state.is_training = self.training
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product = _Product8bitOnCpu if self.training and x.device.type == "cpu" else _Product8bit
        return product.apply(x, self.weight, None, bias, self)


_KINDS = {bnb.nn.Linear4bit: Linear4bit, bnb.nn.Linear8bitLt: Linear8bitLt}


def adopt(streamer: Streamer) -> None:
    """Make the quantized linears and experts of all streamed layers ones that know their layer."""
    for layer in streamer.layers:
        for module in layer.readers:
            if isinstance(module, PackedExperts):
                module.acquire = partial(streamer.acquire, layer)
            kind = _KINDS.get(type(module))
            if kind is not None:
                module.__class__ = kind
                module.streamer, module.layer = streamer, layer  # type: ignore[assignment]
