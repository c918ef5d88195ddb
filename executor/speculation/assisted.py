"""Our drafts in transformers' assisted generation, and the counts of what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from executor.errors import CannotHonour
from executor.speculation.draft_model import Draft, ModelDrafter
from executor.speculation.length import DraftLength
from executor.speculation.lookup import Lookup
from planner.types import Speculated, Strategy

SETTINGS = {"prompt_lookup_num_tokens": 1}
"""Arguments that send `generate` to assisted generation, which takes batches of one alone."""
_INSTEAD = "plan with `--speculate none`"


def speculation_of(model: Any, strategy: Strategy, draft: Draft | None) -> Speculation | None:
    """What a strategy asks for; `draft` is the loaded draft model of those that have one."""
    if strategy.speculate == "none":
        return None
    if strategy.speculate == "lookup":
        return Speculation(model, lambda: (Lookup(), DraftLength()))
    assert draft is not None
    chunk = strategy.prefill_chunk_tokens
    return Speculation(model, lambda: (ModelDrafter(draft, chunk), DraftLength(draft.cost)))


class Drafter(Protocol):
    """Guesses how one growing text goes on."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`, which goes on from those of the call before."""


@dataclass
class Counts:
    """What became of drafts. Passes over the prompt, which check none, do not count."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Each pass adds the tokens it accepts and one of its own."""
        return (self.passes + self.accepted) / self.passes if self.passes else 1.0

    def report(self) -> Speculated:
        """The counts as the report has them."""
        return Speculated(
            drafted=self.drafted,
            accepted=self.accepted,
            passes=self.passes,
            acceptance_rate=self.accepted / self.drafted if self.drafted else None,
            tokens_per_pass=self.tokens_per_pass if self.passes else None,
        )

    def clear(self) -> None:
        """Begin again."""
        self.passes = self.drafted = self.accepted = 0


class Speculation:
    """Makes every `generate` call within `attached` a speculative one.

    `start`: a drafter and the choice of its lengths for another text; no state passes from text to text, so
    that a run which was broken off goes on as an unbroken one.

    Errors: `CannotHonour` for a model that cannot take tokens back.
    """

    def __init__(self, model: Any, start: Callable[[], tuple[Drafter, DraftLength]]) -> None:
        if getattr(model, "_is_stateful", False):
            raise CannotHonour(
                f"{type(model).__name__} keeps a state that cannot give rejected drafts back", _INSTEAD
            )
        self.counts = Counts()
        self._model, self._start = model, start

    @contextmanager
    def attached(self) -> Iterator[None]:
        """`generate` asks us for candidates in here."""
        self._model._get_candidate_generator = self._generator
        try:
            yield
        finally:
            del self._model._get_candidate_generator

    def _generator(
        self, *, generation_config: Any, model_kwargs: dict[str, Any], **_: Any
    ) -> CandidateGenerator:
        cache = model_kwargs["past_key_values"]
        if not cache.is_croppable:
            raise CannotHonour("the model's cache cannot give rejected drafts back", _INSTEAD)
        drafter, length = self._start()
        ends = generation_config._eos_token_tensor
        stops = frozenset() if ends is None else frozenset(ends.flatten().tolist())
        vocabulary = self._model.config.get_text_config().vocab_size
        return _Candidates(drafter, length, self.counts, stops, vocabulary, generation_config.max_length)


class _Candidates(CandidateGenerator):
    """The candidates of one text."""

    def __init__(
        self,
        drafter: Drafter,
        length: DraftLength,
        counts: Counts,
        stops: frozenset[int],
        vocabulary: int,
        max_length: int,
    ) -> None:
        self._drafter, self._length, self._counts = drafter, length, counts
        self._stops, self._vocabulary, self._max_length = stops, vocabulary, max_length
        self._tokens: list[int] = []
        self._drafted = -1
        """Tokens of the draft in work; -1 for the pass over the prompt, which comes without one."""

    def get_candidates(
        self, input_ids: torch.LongTensor, **_: Any
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """The text so far, 1 x T, with the draft after it, 1 x (T + n). No logits: drafts are guesses."""
        prompt = not self._tokens
        self._tokens += input_ids[0, len(self._tokens) :].tolist()
        if prompt:
            return input_ids, None
        # the pass yields one token beyond the draft
        most = min(self._length.next(), self._max_length - len(self._tokens) - 1)
        draft = self._usable(self._drafter.propose(self._tokens, most)) if most > 0 else []
        self._drafted = len(draft)
        if not draft:
            return input_ids, None
        return torch.cat([input_ids, input_ids.new_tensor([draft])], dim=1), None  # type: ignore[return-value]

    def _usable(self, draft: Sequence[int]) -> list[int]:
        """Up to a token that would end the text, which only the model itself may do, or that it lacks."""
        bad = (i for i, token in enumerate(draft) if token in self._stops or token >= self._vocabulary)
        return list(draft[: next(bad, len(draft))])

    def update_candidate_strategy(
        self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: Any
    ) -> None:
        """The first `num_matches` tokens of the draft were right."""
        if self._drafted < 0:
            return
        accepted = int(num_matches)
        self._length.learn(self._drafted, accepted)
        self._counts.passes += 1
        self._counts.drafted += self._drafted
        self._counts.accepted += accepted
