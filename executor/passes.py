"""Calls of transformers' `generate` for one job, each measured as prefill and decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from executor.caches import Caches, bytes_of
from executor.chunked_prefill import chunked_prefill, parts
from executor.pass_clock import PassClock
from executor.prompts import Prompt
from executor.sampling import StopSoon, sampling
from executor.speculation.draft_model import Draft
from executor.task import Look, Task
from planner.types import Speculated

if TYPE_CHECKING:
    from executor.speculation.assisted import Speculation

NOT_IN_BATCHES = "speculation generates one sequence at a time, so the planned batch was not made"
UNCHECKED_DRAFT = "without tokenizers nothing told whether model and draft model share their vocabulary"
_WARM_UP_TOKENS = 4
"""Prefill, a step that loads kernels, one that is recorded where there is a graph, one like all others."""


@dataclass(kw_only=True)
class Generation(Task):
    """What is needed to generate with one loaded candidate."""

    prompts: Sequence[Prompt] = ()
    draft: Draft | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The model's config facts, as the plan has them."""
    after_first_batch: Look | None = None

    @property
    def new_tokens(self) -> int:
        """Most tokens of an answer."""
        return self.options.max_new_tokens or self.workload.new_tokens

    @property
    def batch_size(self) -> int:
        """Sequences generated at once. Speculation is about one: each accepts another number of tokens."""
        return 1 if self.strategy.speculate != "none" else self.workload.sequences


@dataclass
class Generated:
    """What was generated, and how fast: the rates of the last of the largest batches.

    Rates count what the card computes, as the planner's do: padding of shorter prompts, and the positions
    of answers that ended before the longest of their batch.
    """

    prompts: int = 0
    largest_batch: int = 0
    """Most sequences that were generated at once."""
    most_new_tokens: int = 0
    """The longest that an answer could get."""
    new_tokens: int = 0
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    cache_bytes: int = 0
    speculation: Speculated | None = None
    notes: list[str] = field(default_factory=list)


class Passes:
    """Calls of `generate` with the settings and the cache of one job."""

    def __init__(self, job: Generation, clock: PassClock, longest_prompt: int, pad: int) -> None:
        self.result = Generated(most_new_tokens=job.new_tokens)
        self._job, self._clock, self._warm = job, clock, job.device.type != "cuda"
        self._settings: dict[str, Any] = {
            "max_new_tokens": job.new_tokens,
            "pad_token_id": pad,
            "use_cache": True,
            "return_dict_in_generate": True,
            **sampling(job.options, job.loaded.model.generation_config),
        }
        if job.options.rehearse:
            self._settings["min_new_tokens"] = job.new_tokens
        told = (lambda: job.meter.enter("decode"), clock.count)  # the model's hooks see no replayed step
        tokens = longest_prompt + job.new_tokens
        streamed = job.loaded.layers_streamed > 0 or bool(job.loaded.outside_on_host)
        self._caches = Caches(job.loaded.model, job.strategy, job.device, tokens, told, streamed)
        self._notes: list[str] = []
        self._speculation = self._speculate()

    def _speculate(self) -> Speculation | None:
        from executor.speculation.assisted import SETTINGS, speculation_of  # imports torch

        job = self._job
        found = speculation_of(job.loaded.model, job.strategy, job.draft)
        if found is not None:
            self._settings |= SETTINGS
            self._notes += [NOT_IN_BATCHES] if job.workload.sequences > 1 else []
            self._notes += [UNCHECKED_DRAFT] if job.draft and job.loaded.tokenizer is None else []
        return found

    def run(self, ids: Any, mask: Any, streamer: Any = None) -> Any:
        """One batch, B x T, measured; the ids of prompts and answers, B x (T + new)."""
        if not self._warm:
            self._warm_up(ids, mask)
        _seed(self._job.options.seed, self.result.prompts)
        stop = [StopSoon(self._job.stop)]
        done = self._generate(ids, mask, streamer=streamer, stopping_criteria=stop)
        self._clock.stop(self._job.device)
        self._measure(ids, done)
        return done.sequences

    def now(self) -> tuple[float, str]:
        """Answers so far, in parts of one too, and the speed, for the live view."""
        batch, (passes, seconds) = self._job.batch_size, self._clock.so_far()
        each = self._speculation.counts.tokens_per_pass if self._speculation else 1.0
        done = max(0, passes - 1) * each
        rate = batch * done / seconds if done else self.result.decode_tokens_per_s
        part = batch * min(1.0, (1 + done) / self._job.new_tokens) if passes else 0.0
        return self.result.prompts + part, f"{rate:,.1f} tokens/s" if rate else ""

    def _generate(self, ids: Any, mask: Any, **more: Any) -> Any:
        import torch

        model, chunk = self._job.loaded.model, self._job.strategy.prefill_chunk_tokens
        guesses = self._speculation.attached() if self._speculation else nullcontext()
        self._clock.start(over_prompt=parts(ids.shape[1], chunk))
        with torch.no_grad(), chunked_prefill(model, chunk), guesses, self._caches.open(mask) as cache:
            return model.generate(input_ids=ids, attention_mask=mask, **cache, **{**self._settings, **more})

    def _warm_up(self, ids: Any, mask: Any) -> None:
        """A few tokens that count for nothing: kernels are loaded at their first use."""
        few = min(_WARM_UP_TOKENS, self._job.new_tokens)
        self._generate(ids, mask, max_new_tokens=few, min_new_tokens=few)
        if self._speculation is not None:
            self._speculation.counts.clear()
        self._warm = True

    def _measure(self, ids: Any, done: Any) -> None:
        result, clock, new = self.result, self._clock, done.sequences.shape[1] - ids.shape[1]
        result.prompts += ids.shape[0]
        largest = ids.shape[0] >= result.largest_batch
        result.largest_batch = max(result.largest_batch, ids.shape[0])
        result.new_tokens += ids.shape[0] * new
        result.cache_bytes = max(result.cache_bytes, bytes_of(done.past_key_values))
        result.notes = [*self._notes, *self._caches.notes]
        if self._speculation is not None:
            result.speculation = self._speculation.counts.report()
        if largest:
            result.prefill_tokens_per_s = ids.numel() / max(clock.prefill_seconds, 1e-9)
            if new > 1:
                result.decode_tokens_per_s = ids.shape[0] * (new - 1) / max(clock.decode_seconds, 1e-9)
        if self._job.after_first_batch is not None:
            self._job.after_first_batch()
            self._job.after_first_batch = None


def _seed(seed: int, first: int) -> None:
    """Seed the draws of the batch that begins with prompt `first`: a resumed run draws what an unbroken one
    would."""
    import torch

    torch.manual_seed(seed + first)
