"""A long prompt in several passes, so that what its tokens hold beside the cache fits a small card.

Part after part goes through the model over the same cache; each part's attention sees all before it, as
in one pass. Results are those of one pass up to rounding: matrix products over fewer rows may add up in
another order. Over a quantized cache they are less exact: later parts see earlier ones as they were packed.
With streamed layers every part brings the weights once more.

transformers' own (`GenerationConfig.prefill_chunk_size`) is left out by assisted generation; this one serves
any way of generating.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def chunked_prefill(model: Any, tokens: int) -> Iterator[None]:
    """Prompts of `model.generate` go through it in parts of at most `tokens` in here; 0: whole.

    `generate` begins with an empty cache, and prepares its inputs in one place: all parts but the last are
    read there, and the last is what `generate` gets to read itself.
    """
    if not tokens:
        yield
        return
    before = model.__dict__.get("prepare_inputs_for_generation")
    stock = model.prepare_inputs_for_generation

    @functools.wraps(stock)
    def prepare(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        length = input_ids.shape[1]
        if args or not kwargs.get("is_first_iteration") or length <= tokens:
            return stock(input_ids, *args, **kwargs)
        last = (length - 1) // tokens * tokens
        for start in range(0, last, tokens):
            model(**stock(input_ids[:, start : start + tokens], **_part(kwargs, start, start + tokens)))
            _settle(kwargs.get("past_key_values"))
        return stock(input_ids, **{**kwargs, "next_sequence_length": length - last})

    model.prepare_inputs_for_generation = prepare
    try:
        yield
    finally:
        if before is None:
            del model.prepare_inputs_for_generation
        else:
            model.prepare_inputs_for_generation = before


def parts(length: int, tokens: int) -> int:
    """Passes over a prompt of `length` tokens."""
    return -(-length // tokens) if tokens else 1


def _settle(cache: Any) -> None:
    """End a pass as assisted generation ends one: layers with a window keep more than it until they are told
    that nothing will be taken back."""
    if any(getattr(layer, "record_past", False) for layer in getattr(cache, "layers", ())):
        cache.crop(0)


def _part(kwargs: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """The arguments about tokens `start` to `end`: masks begin at the first token, positions at `start`."""
    part = {name: value for name, value in kwargs.items() if name != "next_sequence_length"}
    if part.get("attention_mask") is not None:
        part["attention_mask"] = part["attention_mask"][:, :end]
    if part.get("position_ids") is not None:
        part["position_ids"] = part["position_ids"][..., start:end]
    return part
