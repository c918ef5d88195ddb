"""Generation: prompts in batches through transformers' `generate`, measured as prefill and decode."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor import ui
from executor.caches import Caches, bytes_of
from executor.chunked_prefill import chunked_prefill, parts
from executor.errors import BadOption, Interrupted
from executor.files import write_atomically
from executor.measure import watch_generation
from executor.pass_clock import PassClock
from executor.prompts import Prompt, encode, longest, render, shown
from executor.sampling import StopSoon, end_tokens, sampling
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
    """What was generated, and how fast: the rates of the last batch of the planned size, or of the first
    where all are smaller.

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


def generate(job: Generation) -> Generated:
    """Answer every prompt, leaving `outputs.jsonl`; answers of an earlier, interrupted run are kept.

    Errors: `BadOption`, `CannotHonour`, `Interrupted` after ctrl-C; torch's out-of-memory error passes
    through.
    """
    clock = PassClock(job.loaded.model)
    unwatch = watch_generation(job.loaded.model, job.meter, lambda: clock.in_prompt)
    try:
        return _rehearse(job, clock) if job.options.rehearse else _answer_all(job, clock)
    finally:
        unwatch()
        clock.remove()
        job.meter.leave()


class _Passes:
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
        result.largest_batch = max(result.largest_batch, ids.shape[0])
        result.new_tokens += ids.shape[0] * new
        result.cache_bytes = max(result.cache_bytes, bytes_of(done.past_key_values))
        result.notes = [*self._notes, *self._caches.notes]
        if self._speculation is not None:
            result.speculation = self._speculation.counts.report()
        if ids.shape[0] == self._job.batch_size or result.prefill_tokens_per_s is None:
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


def _rehearse(job: Generation, clock: PassClock) -> Generated:
    import torch

    vocabulary = job.loaded.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(job.options.seed)
    shape = (job.batch_size, job.workload.prompt_tokens)
    ids = torch.randint(0, vocabulary, shape, generator=generator).to(job.device)
    passes = _Passes(job, clock, shape[1], pad=0)
    what = f"generating {job.new_tokens} tokens after {shape[1]} random ones"
    with ui.Steps(what, shape[0], now=passes.now):
        passes.run(ids, torch.ones_like(ids))
    return passes.result


def _answer_all(job: Generation, clock: PassClock) -> Generated:
    tokenizer, prompts, size = job.loaded.tokenizer, job.prompts, job.batch_size
    texts = [render(prompt, tokenizer) for prompt in prompts]
    _refuse_empty(texts, tokenizer)
    width = longest(texts, tokenizer)
    too_long = _past_context(job, width)
    if too_long:
        ui.say(f"warning: {too_long}")
    passes = _Passes(job, clock, width, tokenizer.pad_token_id)
    partial = job.output.path / "outputs.partial.jsonl"
    rows = _earlier_rows(partial)
    if len(rows) < len(texts):
        # only whole batches are kept: the others begin where those of an unbroken run do
        del rows[len(rows) // size * size :]
    passes.result.prompts = len(rows)
    job.stop.graceful = True
    streamer = _streamer(job)
    with nullcontext() if streamer else ui.Steps("generating", len(texts), len(rows), passes.now) as steps:
        for start in range(len(rows), len(texts), size):
            answers = _answer(job, texts[start : start + size], passes, streamer)
            for index, answer in enumerate(answers, start):
                rows.append({"index": index, "prompt": shown(prompts[index]), **answer})
            write_atomically(partial, _lines(rows))
            if steps is not None:
                steps.update(len(rows), f"{passes.result.decode_tokens_per_s or 0:,.1f} tokens/s")
            if job.stop.requested and len(rows) < len(texts):
                raise Interrupted("interrupted", "the same command goes on from here")
    job.stop.graceful = False
    write_atomically(job.output.path / "outputs.jsonl", _lines(rows))
    partial.unlink(missing_ok=True)
    result = passes.result
    result.new_tokens = sum(row["tokens"] for row in rows)
    if width > job.workload.prompt_tokens:
        planned = job.workload.prompt_tokens
        result.notes.append(f"a prompt of {width} tokens is longer than the {planned} planned for")
    if too_long:
        result.notes.append(too_long)
    return result


def _refuse_empty(texts: Sequence[str], tokenizer: Any) -> None:
    """A model goes on from a token: nothing at all is no prompt, unless the tokenizer adds a beginning."""
    for number, text in enumerate(texts, 1):
        if not text and not tokenizer("")["input_ids"]:
            raise BadOption(f"prompt {number} is empty", "give it a text")


def _past_context(job: Generation, prompt_tokens: int) -> str | None:
    """What to say where the longest answer may leave the positions that the model was trained on."""
    made_for = getattr(job.loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(made_for, int) or prompt_tokens + job.new_tokens <= made_for:
        return None
    asked = f"{prompt_tokens} prompt and {job.new_tokens} new tokens"
    return f"{asked} are more than the {made_for} this model was made for"


def _streamer(job: Generation) -> Any:
    from executor.live_text import live_text

    return live_text(job.loaded.tokenizer, len(job.prompts), job.options.json)


def _answer(job: Generation, texts: Sequence[str], passes: _Passes, streamer: Any) -> list[dict[str, Any]]:
    """The rows of one batch, without index and prompt."""
    tokenizer = job.loaded.tokenizer
    batch = encode(texts, tokenizer).to(job.device)
    sequences = passes.run(batch["input_ids"], batch["attention_mask"], streamer)
    ends = end_tokens(job.loaded.model, tokenizer)
    rows = []
    for sequence in sequences[:, batch["input_ids"].shape[1] :].tolist():
        stop = next((i for i, token in enumerate(sequence) if token in ends), None)
        tokens = sequence if stop is None else sequence[: stop + 1]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        rows.append(
            {"text": text, "tokens": len(tokens), "finish_reason": "length" if stop is None else "stop"}
        )
    return rows


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _earlier_rows(partial: Path) -> list[dict[str, Any]]:
    """Answers of a run that was broken off, up to the first line that a failing disk has spoilt."""
    rows: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        for line in partial.read_text().splitlines():
            row = json.loads(line)
            if not isinstance(row, dict) or row.get("index") != len(rows):
                break
            rows.append(row)
    return rows
