"""Drafts by a smaller model of the same vocabulary, which stays on the device whole.

It is loaded in the dtype and the precision of the model it drafts for. Its guesses are its likeliest tokens:
also where the model samples, since a drafted token is kept exactly where the model drew the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from executor.errors import CannotHonour
from executor.load import load_model, load_tokenizer
from executor.options import RunOptions
from executor.source import ModelSource, find_weights, plan_model, without_weights
from planner.estimate import count
from planner.resolve import resolve
from planner.types import Strategy
from profiles.architecture import loaded_architecture

if TYPE_CHECKING:
    import torch


def find_draft(strategy: Strategy, options: RunOptions) -> ModelSource | None:
    """Where the draft model of a strategy is, None where it has none.

    Errors: those of `planner.resolve` for a name that is none; `BadWeights` as `find_weights` raises them.
    """
    if strategy.speculate != "draft":
        return None
    assert strategy.draft is not None
    model = plan_model(resolve(strategy.draft, offline=options.offline))
    if options.rehearse:
        return without_weights(model)
    return find_weights(model, options.offline, options.trust_remote_code)


@dataclass(frozen=True)
class Beside:
    """What is known of the model that is drafted for."""

    config: dict[str, Any]
    """Its config facts."""
    tokenizer: Any
    """None in a rehearsal."""


@dataclass(frozen=True)
class Draft:
    """A loaded draft model and the cost of one of its tokens."""

    model: Any
    cost: float
    """Its parameters over those of the model it drafts for: what a pass reads, of both."""


def load_draft(
    source: ModelSource, strategy: Strategy, device: torch.device, options: RunOptions, beside: Beside
) -> Draft:
    """The draft model on `device`, for a model that is loaded.

    Errors: `CannotHonour` where the two have other vocabularies; `BadWeights` as the loader finds them.
    """
    own = load_tokenizer(source, options.trust_remote_code)
    if beside.tokenizer is not None and _words(own) != _words(beside.tokenizer):
        raise CannotHonour(
            f"the draft model {strategy.draft} has another vocabulary than the model, so its tokens mean "
            "other text",
            "name a smaller model of the same family with --draft, or plan with `--speculate lookup`",
        )
    alone = replace(strategy, speculate="none", draft=None, engine="resident", placement="full_gpu")
    places = {"": str(device)}
    model = load_model(source, alone, places, device, options.seed, options.trust_remote_code)
    if getattr(model, "_is_stateful", False):
        raise CannotHonour(
            f"the draft model {strategy.draft} keeps a state that cannot give rejected drafts back",
            "name one with attention in all layers, or plan with `--speculate lookup`",
        )
    parts = (count(loaded_architecture(config)) for config in (source.config, beside.config))
    mine, its = parts
    return Draft(model, mine / its)


def _words(tokenizer: Any) -> dict[str, int]:
    """Tokens of text and their numbers. Added ones (ends of turns, tools) differ within a family of models:
    where the draft model means another one by a number, the draft is wrong there and nothing else."""
    added = tokenizer.get_added_vocab()
    return {word: number for word, number in tokenizer.get_vocab().items() if word not in added}


def _cache_of(model: Any) -> Any:
    """A cache that can take tokens back. Layers with a window keep what it has left behind, too: those of
    transformers that can bring it back take one pass at a time, and a draft is several."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [
        DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers
    ]
    cache.activate_past_recording()
    return cache


class ModelDrafter:
    """Drafts for one growing text; keeps what the draft model knows of it in a cache of its own.

    `chunk`: most tokens of one of its passes, 0 for any number.
    """

    def __init__(self, draft: Draft, chunk: int = 0) -> None:
        self._model, self._chunk = draft.model, chunk
        self._rows = draft.model.get_input_embeddings().num_embeddings
        self._cache = _cache_of(draft.model)
        self._cached: list[int] = []
        self._kept = 0
        """How many of the cached tokens are known to be the text's."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """The `most` tokens that the draft model would go on with."""
        import torch

        self._forget(tokens)
        # two vocabularies of one tokenizer may be padded differently, and a rehearsal draws padding, too
        unread = [min(token, self._rows - 1) for token in tokens[len(self._cached) :]]
        drafted: list[torch.Tensor] = []
        with torch.no_grad():
            token = self._read(torch.tensor([unread], device=self._model.device))
            for _ in range(most - 1):
                drafted.append(token)
                token = self._pass(token)
        drafted.append(token)
        found: list[int] = torch.cat(drafted, dim=1)[0].tolist()
        self._cached, self._kept = [*tokens, *found[:-1]], len(tokens)
        return found

    def _forget(self, tokens: Sequence[int]) -> None:
        """Take back what the cache holds beyond what became of the text; one token is left to read."""
        same = min(self._kept, len(tokens) - 1)
        while same < min(len(self._cached), len(tokens) - 1) and self._cached[same] == tokens[same]:
            same += 1
        if same < len(self._cached):
            self._cache.crop(same - len(self._cached))
            del self._cached[same:]

    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        """A pass over tokens, 1 x T; the likeliest next one, 1 x 1."""
        for part in tokens.split(self._chunk or tokens.shape[1], dim=1):
            token = self._pass(part)
        return token

    def _pass(self, tokens: torch.Tensor) -> torch.Tensor:
        output = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        next_token: torch.Tensor = output.logits[:, -1:].argmax(dim=-1)
        return next_token
