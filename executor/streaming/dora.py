"""DoRA (arXiv:2402.09353) over weights that move.

peft reads a linear's whole weight twice over: once when the adapter is made, for the norms that magnitudes
begin with, and in every pass, for the norms of the adapted weight. Both go through one function, which here
has the layer brought to a slot first; making the adapters, peft goes through the layers in their order, so
each is copied once. Backward needs nothing of it: norms are constants to peft, and what autograd keeps of a
weight beside them is a dequantized copy or a handle (`executor.streaming.saved`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from executor.streaming.streamer import Streamer


def acquire_for_norms(streamer: Streamer) -> Callable[[], None]:
    """Let peft's DoRA find the weights of streamed layers; call the result to undo it."""
    from peft.tuners.lora import dora
    from peft.utils.integrations import dequantize_bnb_weight

    stock = dora.dequantize_module_weight
    layers = {module: layer for layer in streamer.layers for module in layer.readers}

    def whole_weight(module: nn.Module) -> Any:
        if module not in layers:
            return stock(module)
        streamer.acquire(layers[module])
        weight: Any = module.weight
        if type(weight).__name__ not in ("Params4bit", "Int8Params"):
            return weight
        # peft's own function also sets a new parameter on the CPU, which would stay behind in its slot
        return dequantize_bnb_weight(weight, getattr(module, "state", None))

    def undo() -> None:
        dora.dequantize_module_weight = stock

    dora.dequantize_module_weight = whole_weight
    return undo
