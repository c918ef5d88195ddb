"""A KV cache in RAM whose layers come to the card one ahead: transformers' own, with its copies in order.

transformers (5.17 to 5.23) brings keys and values of the next layer to the card on a stream of its own and
appends to them on the computing one. Memory belongs to the stream it was taken on: once the appended tensor
replaces it, the next copy may get it while the computing stream, which runs behind the host, still reads.
Decoding Qwen2.5-0.5B on an H200 gave other tokens that way (tests/gpu/test_gpu_speculation.py).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache


class OffloadedCache(DynamicCache):
    """Keys and values in RAM, B x K x T x E a layer, but for the layer in work and the next one."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config.get_text_config(decoder=True), offloading=True)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the states of new tokens of one layer; returns those of all its tokens, on the card."""
        if layer_idx < len(self.layers):
            for name in ("keys", "values"):
                kept = getattr(self.layers[layer_idx], name, None)
                if kept is not None and kept.is_cuda:
                    kept.record_stream(torch.cuda.current_stream(kept.device))
        added: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return added
