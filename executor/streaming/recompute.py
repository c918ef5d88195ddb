"""Gradient checkpointing of layers that stream: forward records nothing, backward computes a layer again
first and goes through it at once.

torch's checkpointing without reentrance (torch/utils/checkpoint.py) notes every saved tensor in Python, four
times a step; its reentrant kind does not, but keeps a layer's output through the layer's backward, and loses
gradients of whatever comes into a layer or leaves it past its arguments and its result. Here nothing holds
the output, and calls where that may be go to the checkpointing that was there: with keywords that have
gradients, with containers that layers share (Gemma 3n's keys and values), with losses of routers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction, detach_variable, set_device_states

from executor.streaming.layers import find_stack, put_checkpointing_back


class _Recomputed(CheckpointFunction):
    """torch's reentrant checkpoint whose backward lets go of the layer's output before it begins."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients of the arguments that have any."""
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("a layer that is computed again has no gradients for torch.autograd.grad")
        inputs, saved = list(ctx.inputs), ctx.saved_tensors
        for at, tensor in zip(ctx.tensor_indices, saved, strict=True):
            inputs[at] = tensor
        devices = ctx.fwd_devices if ctx.preserve_rng_state and ctx.had_device_in_fwd else []
        with torch.random.fork_rng(devices, enabled=ctx.preserve_rng_state, device_type=ctx.device_type):
            if ctx.preserve_rng_state:
                torch.set_rng_state(ctx.fwd_cpu_state)
                if ctx.had_device_in_fwd:
                    set_device_states(ctx.fwd_devices, ctx.fwd_device_states, device_type=ctx.device_type)
            detached = detach_variable(tuple(inputs))
            with (
                torch.enable_grad(),
                torch.amp.autocast(ctx.device_type, **ctx.device_autocast_kwargs),
                torch.amp.autocast("cpu", **ctx.cpu_autocast_kwargs),
            ):
                edges, given = _ends(ctx.run_function(*detached), gradients)
        torch.autograd.backward(edges, given)
        return None, None, *(each.grad if isinstance(each, torch.Tensor) else None for each in detached)


def _ends(outputs: Any, gradients: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Where backward through `outputs` begins, and with what."""
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    pairs = [
        (get_gradient_edge(output), gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if isinstance(output, torch.Tensor) and output.requires_grad
    ]
    return [edge for edge, _ in pairs], [gradient for _, gradient in pairs]


class _Recomputing:
    """A layer's checkpointing function, in place of `stock`."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        self.stock = stock

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        unseen = [value for value in args if not isinstance(value, torch.Tensor)]
        unseen += getattr(function, "keywords", {}).values()  # where transformers puts a layer's keywords
        if kwargs or not any(t.requires_grad for t in tensors) or any(map(_may_carry_gradients, unseen)):
            return self.stock(function, *args, **kwargs)
        return _Recomputed.apply(function, True, *args)


def _may_carry_gradients(value: Any) -> bool:
    """May gradients come into a layer by `value`, or leave it? Of what is no tensor that is known only where
    nothing can be put into it."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, (tuple, list)):
        return any(map(_may_carry_gradients, value))
    return not (value is None or isinstance(value, (bool, int, float, str, torch.dtype)))


def _routers_have_a_loss(model: nn.Module) -> bool:
    """Does the loss read what routers say within layers? transformers takes it there by hooks."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "output_router_logits", False))


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Within, checkpointing of the layers of `model` is that of this module; it may be turned on before or
    afterwards. Errors: `CannotHonour` for a model without layers."""
    stack = find_stack(model)

    def begin(*_: Any) -> None:
        if _routers_have_a_loss(model):
            return
        for layer in stack.layers:
            stock: Any = getattr(layer, "_gradient_checkpointing_func", None)
            if stock is not None and not hasattr(stock, "stock"):  # neither this nor offloading's
                layer._gradient_checkpointing_func = _Recomputing(stock)  # type: ignore[assignment]

    hook = stack.owner.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        hook.remove()
        put_checkpointing_back(stack.layers, _Recomputing)
