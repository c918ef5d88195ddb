"""Run one training step or one prompt and one token, cut into segments at the borders of decoder layers.

The loop around the model is that of transformers' Trainer with accelerate's mixed precision (autocast around
forward, outputs as float32), or of `generate` (prompt with the last position's logits, then token by token).
Names live as long as they do there.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from planner.exact.build import DTYPES, META
from planner.exact.card import CudaCard
from planner.exact.layers import find_layers
from planner.exact.storages import Storages
from planner.types import Strategy, Workload

Hook = Callable[..., None]


class Borders:
    """Hooks on the decoder layers that begin a segment where a layer begins, forward and backward."""

    def __init__(self, card: Storages, layers: Any, phase: str, after: str) -> None:
        self._card, self._layers, self._phase, self._after = card, layers, phase, after
        self._running_forward = True

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within, layers report."""
        handles = []
        for index, layer in enumerate(self._layers):
            handles.append(layer.register_forward_pre_hook(self._enter(index), with_kwargs=True))
        last = len(self._layers) - 1
        handles.append(self._layers[last].register_forward_hook(self._leave(last)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward_begins(self) -> None:
        """Layers that run again from here on are recomputed, not entered."""
        self._running_forward = False

    def _enter(self, index: int) -> Hook:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            if not self._running_forward:
                return
            stream = _stream(args, kwargs)
            if stream is not None:
                self._card.reassign(stream, "stream" if not torch.is_grad_enabled() else "activations")
                if index > 0:
                    self._report_gradient(stream, index - 1)
            self._card.begin(self._phase, index)

        return hook

    def _leave(self, index: int) -> Hook:
        def hook(module: Any, args: Any, out: Any) -> None:
            if not self._running_forward:
                return
            stream = out if isinstance(out, torch.Tensor) else _stream(out, {})
            if stream is not None:
                self._report_gradient(stream, index)
            self._card.begin(self._after, None, "logits")

        return hook

    def _report_gradient(self, stream: torch.Tensor, index: int) -> None:
        """When the gradient of layer `index`'s output is there, its backward pass begins."""
        if stream.requires_grad:
            card = self._card

            def arrived(_: Any) -> None:
                card.begin("backward", index, "gradients")

            stream.register_hook(arrived)


def _stream(args: Any, kwargs: Any) -> torch.Tensor | None:
    """The hidden states among a layer's arguments."""
    for value in (kwargs.get("hidden_states"), kwargs.get("hidden_state"), kwargs.get("x"), *args):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    return None


def layers_of(model: Any) -> Any:
    """The decoder layers of a model, adapters or not."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = find_layers(inner)
    return found[1] if found is not None else []


# --------------------------------------------------------------------------- training


def training_step(model: Any, work: Workload, how: Strategy, card: Storages, cuda: CudaCard) -> None:
    """Forward, loss and backward of one micro-batch."""
    shape = (work.batch_size, work.seq_len)
    cuda.on_copy = lambda copy: card.reassign(copy, "autocast copies")
    with cuda.plugged_in(), card:
        ids = torch.empty(shape, dtype=torch.int64, device=META)
        labels = torch.empty(shape, dtype=torch.int64, device=META)
        mask = torch.empty(shape, dtype=torch.int64, device=META)  # all ones: nothing is built from it
        items = torch.empty((), dtype=torch.int64, device=META)
        card.adopt((ids, labels, mask, items), "inputs")
        card.begin("forward", None, "inputs")
        borders = Borders(card, layers_of(model), "forward", "loss")
        with borders.watched():
            loss = _loss(model, ids, labels, items, how)
            gc.collect(0)
            borders.backward_begins()
            card.begin("backward", None, "gradients")
            torch.autograd.backward(loss)
        card.end()


def _loss(
    model: Any, ids: torch.Tensor, labels: torch.Tensor, items: torch.Tensor, how: Strategy
) -> torch.Tensor:
    """What accelerate makes of `model.forward`, and what the Trainer keeps of its answer."""
    from accelerate.utils.operations import convert_to_fp32

    inputs = {"input_ids": ids, "labels": labels, "use_cache": False}
    if _takes_items(model):
        inputs["num_items_in_batch"] = items
    # the names of a frame hold tensors: this one ends where compute_loss does
    outputs = model(**inputs) if how.dtype == "fp32" else convert_to_fp32(_autocast(model, inputs, how))
    loss: torch.Tensor = outputs["loss"]
    return loss


def _autocast(model: Any, inputs: dict[str, Any], how: Strategy) -> Any:
    with torch.autocast("cuda", dtype=DTYPES[how.dtype]):
        return model(**inputs)


def _takes_items(model: Any) -> bool:
    """Does the model's loss take the number of learned tokens (Trainer's `model_accepts_loss_kwargs`)?"""
    import inspect

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(inner.forward).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


# --------------------------------------------------------------------------- generation


def generation(model: Any, work: Workload, how: Strategy, card: Storages, cuda: CudaCard) -> None:
    """The prompt's pass and the last token's."""
    batch = work.sequences
    with cuda.plugged_in(), card, torch.no_grad():
        cache = _cache(model, work, how)
        ids = torch.empty((batch, work.prompt_tokens), dtype=torch.int64, device=META)
        mask = torch.empty((batch, work.prompt_tokens + 1), dtype=torch.int64, device=META)
        card.adopt((ids, mask), "inputs")
        card.begin("prefill", None, "inputs")
        borders = Borders(card, layers_of(model), "prefill", "prefill")
        with borders.watched():
            outputs = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = outputs.logits[:, -1].to(dtype=torch.float32, copy=True)
        cache = outputs.past_key_values if outputs.get("past_key_values") is not None else cache
        del outputs, logits
        card.begin("decode", None, "inputs")
        grow(cache, work.new_tokens - 2, card, len(layers_of(model)))
        borders = Borders(card, layers_of(model), "decode", "decode")
        with borders.watched():
            card.begin("decode", None, "inputs")
            outputs = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = outputs.logits[:, -1].to(dtype=torch.float32, copy=True)
        del outputs, logits
        card.end()


def _cache(model: Any, work: Workload, how: Strategy) -> Any:
    """The cache `generate` makes for a model; None where the model makes its own."""
    from transformers import DynamicCache, StaticCache

    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        return None
    config = model.config.get_text_config()
    if how.cache == "static":
        return StaticCache(config=config, max_cache_len=work.prompt_tokens + work.new_tokens)
    return DynamicCache(config=config)


def grow(cache: Any, tokens: int, card: Storages, layers: int) -> None:
    """Give a dynamic cache `tokens` more, as decoding them one by one would have left it."""
    if tokens <= 0:
        return
    cached = getattr(cache, "layers", ())
    for index, layer in enumerate(cached):
        # a segment of its own, so that layers that are not run grow with those that are
        card.begin("decode", index if len(cached) == layers else None)
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor) or keys.dim() != 4:
            continue
        if "Static" in type(layer).__name__:
            continue
        more = [x.new_empty((*x.shape[:2], tokens, x.shape[3])) for x in (keys, values)]
        layer.update(*more)
        sparse = getattr(layer, "indexer_keys", None)
        if isinstance(sparse, torch.Tensor):  # sparse attention keeps one more key a token
            layer.update_indexer(sparse.new_empty((sparse.shape[0], tokens, sparse.shape[2])))
        for x in (layer.keys, layer.values, getattr(layer, "indexer_keys", None)):
            if isinstance(x, torch.Tensor):
                card.reassign(x, "activations")
        del keys, values, more, sparse


def checkpoint_layers(model: Any, cuda: CudaCard) -> None:
    """Gradient checkpointing as the Trainer asks for it; the card is there in recomputation too."""
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "determinism_check": "none",
            "context_fn": lambda: (contextlib.nullcontext(), cuda),
        }
    )
