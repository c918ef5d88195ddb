"""Answers to the prompts of a run: batch after batch, kept as they come, written in the order asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from executor import ui
from executor.errors import BadOption, Interrupted
from executor.files import write_atomically
from executor.pass_clock import PassClock
from executor.passes import Generated, Generation, Passes
from executor.prompt_batches import largest_batch, schedule
from executor.prompts import encode, lengths, render, shown
from executor.sampling import end_tokens


def answer_all(job: Generation, clock: PassClock) -> Generated:
    """Answer every prompt of the job, leaving `outputs.jsonl`.

    Errors: `BadOption` for an empty prompt, `Interrupted` once the user asked to stop.
    """
    tokenizer, prompts = job.loaded.tokenizer, job.prompts
    texts = [render(prompt, tokenizer) for prompt in prompts]
    _refuse_empty(texts, tokenizer)
    tokens = lengths(texts, tokenizer)
    width = max(tokens)
    too_long = _past_context(job, width)
    if too_long:
        ui.say(f"warning: {too_long}")
    passes = Passes(job, clock, width, tokenizer.pad_token_id)
    partial = job.output.path / "outputs.partial.jsonl"
    batches = _batches(job, tokens)
    rows, batches = _earlier_rows(partial, batches)
    passes.result.prompts = len(rows)
    job.stop.graceful = True
    streamer = _streamer(job)
    with nullcontext() if streamer else ui.Steps("generating", len(texts), len(rows), passes.now) as steps:
        for batch in batches:
            answers = _answer(job, [texts[index] for index in batch], passes, streamer)
            for index, answer in zip(batch, answers, strict=True):
                rows.append({"index": index, "prompt": shown(prompts[index]), **answer})
            write_atomically(partial, _lines(rows))
            if steps is not None:
                steps.update(len(rows), f"{passes.result.decode_tokens_per_s or 0:,.1f} tokens/s")
            if job.stop.requested and len(rows) < len(texts):
                raise Interrupted("interrupted", "the same command goes on from here")
    job.stop.graceful = False
    rows.sort(key=lambda row: row["index"])
    write_atomically(job.output.path / "outputs.jsonl", _lines(rows))
    partial.unlink(missing_ok=True)
    result = passes.result
    result.new_tokens = sum(row["tokens"] for row in rows)
    if width > job.workload.prompt_tokens:
        planned = job.workload.prompt_tokens
        result.notes.append(f"a prompt of {width} tokens is longer than the {planned} planned for")
    if too_long:
        result.notes.append(too_long)
    if result.largest_batch > job.workload.sequences:
        size = result.largest_batch
        result.notes.append(f"up to {size} prompts at once, shorter than planned: they need no more memory")
    return result


def _batches(job: Generation, tokens: Sequence[int]) -> list[list[int]]:
    """Prompts by their numbers, as they are answered together."""
    if job.batch_size == 1 == job.workload.sequences and len(tokens) == 1:
        return [[0]]
    width = max(tokens)

    def most(longest: int) -> int:
        # one static cache, made for the longest of all, serves every batch
        kept = width if job.strategy.cache == "static" else longest
        return largest_batch(job.facts, job.workload, job.strategy, kept, job.new_tokens)

    return schedule(tokens, most if job.strategy.speculate == "none" else lambda _: 1)


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


def _answer(job: Generation, texts: Sequence[str], passes: Passes, streamer: Any) -> list[dict[str, Any]]:
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


def _earlier_rows(partial: Path, batches: list[list[int]]) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Answers of a run that was broken off, up to the first line that a failing disk has spoilt, and the
    batches that are left. Only whole batches are kept: the others begin where those of an unbroken run do."""
    rows: list[dict[str, Any]] = []
    order = [index for batch in batches for index in batch]
    with suppress(OSError, ValueError):
        for line, index in zip(partial.read_text().splitlines(), order, strict=False):
            row = json.loads(line)
            if not isinstance(row, dict) or row.get("index") != index:
                break
            rows.append(row)
    done = 0
    for number, batch in enumerate(batches):
        if done + len(batch) > len(rows):
            return rows[:done], batches[number:]
        done += len(batch)
    return rows, []
