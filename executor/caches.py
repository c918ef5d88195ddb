"""The key-value cache of each `generate` call, as the strategy says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from executor.errors import CannotHonour
from planner.types import Strategy

if TYPE_CHECKING:
    import torch

    from executor.decode_graph import DecodeGraph, Recorder

_MULTIPLE = 8
"""Attention kernels read a mask in rows of 16 bytes; other lengths make them copy it for every layer."""


class Caches:
    """Makes the cache of one call after the other, and keeps a static one, with its recorded decode step, for
    all calls of the same batch size.

    `tokens`: the longest prompt and its new tokens. `on_replay`: see `DecodeGraph`. `streamed`: weights come
    to the card in each pass, which a recorded pass would not make them do.
    """

    def __init__(
        self,
        model: Any,
        strategy: Strategy,
        device: torch.device,
        tokens: int,
        on_replay: Sequence[Callable[[], None]] = (),
        streamed: bool = False,
    ) -> None:
        if strategy.cache == "offloaded" and device.type != "cuda":
            raise CannotHonour(
                "the offloaded cache moves between card and RAM, and there is no card",
                "plan with `--cache dynamic` or `--cache quantized`",
            )
        self._model, self._strategy, self._device = model, strategy, device
        self._tokens = -(-tokens // _MULTIPLE) * _MULTIPLE
        self._on_replay, self._streamed = on_replay, streamed
        self._static: tuple[int, Any, DecodeGraph | None] | None = None
        self._why_not: str | None = None

    @property
    def notes(self) -> list[str]:
        """What the report should say about the cache."""
        if self._static is None:
            return []
        graph = self._static[2]
        plain = f"decode steps ran eagerly over the static cache: {self._why_not}"
        return [graph.note if graph is not None else plain]

    @contextmanager
    def open(self, mask: torch.Tensor) -> Iterator[dict[str, Any]]:
        """The arguments of one call of `generate` about its cache; `mask` is the padding mask, B x T."""
        kind = self._strategy.cache
        if kind == "static":
            yield from self._open_static(mask)
        elif kind == "quantized":
            from executor.quantized_cache import quantized_cache

            yield {"past_key_values": quantized_cache(self._model.config)}
        elif kind == "offloaded":
            from executor.offloaded_cache import OffloadedCache

            yield {"past_key_values": OffloadedCache(self._model.config)}
        else:
            yield {}

    def _open_static(self, mask: torch.Tensor) -> Iterator[dict[str, Any]]:
        if self._static is None or self._static[0] != mask.shape[0]:
            self._static = None  # first free the old one
            self._static = (mask.shape[0], *self._make_static())
        _, cache, graph = self._static
        arguments = {"past_key_values": cache, "disable_compile": True}
        if graph is None:
            if any(layer.is_initialized for layer in cache.layers):
                cache.reset()
            yield arguments
        else:
            with graph.attached(mask):
                yield arguments

    def _make_static(self) -> tuple[Any, DecodeGraph | None]:
        from transformers import StaticCache

        from executor.decode_graph import DecodeGraph, why_not

        text = self._model.config.get_text_config(decoder=True)
        cache = StaticCache(config=text, max_cache_len=self._tokens)
        self._why_not = why_not(self._model, self._strategy.quant, self._device)
        if self._streamed:
            self._why_not = "its weights come to the card in each pass"
        if self._why_not is not None:
            return cache, None
        return cache, DecodeGraph(self._model, cache, self._tokens, self._recorder(), self._on_replay)

    def _recorder(self) -> Recorder:
        from executor.decode_graph import CudaRecorder

        return CudaRecorder(self._device)


def bytes_of(cache: Any) -> int:
    """Bytes of every key and value a cache holds, wherever they are."""
    total = 0
    for layer in getattr(cache, "layers", ()):
        kept = getattr(layer, "kept", None)
        tensors = kept() if kept else [getattr(layer, "keys", None), getattr(layer, "values", None)]
        total += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return total
