"""Generation: prompts in batches through transformers' `generate`, measured as prefill and decode."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from executor import ui
from executor.engines import Loaded
from executor.errors import BadOption, CannotHonour, Interrupted
from executor.files import write_atomically
from executor.measure import MomentMeter, watch_generation
from executor.options import RunOptions
from executor.output import OutputDirectory
from executor.pass_clock import PassClock
from executor.rows import Message, read_prompts
from executor.stopping import StopRequest
from planner.types import Strategy, Workload

if TYPE_CHECKING:
    import torch

Prompt = str | tuple[Message, ...]


@dataclass(kw_only=True)
class Generation:
    """What is needed to generate with one loaded candidate."""

    loaded: Loaded
    workload: Workload
    strategy: Strategy
    options: RunOptions
    output: OutputDirectory
    device: torch.device
    meter: MomentMeter
    stop: StopRequest
    prompts: Sequence[Prompt] = ()
    after_first_batch: Any = None


@dataclass
class Generated:
    """What was generated, and how fast: the rates of the last batch."""

    prompts: int = 0
    new_tokens: int = 0
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    cache_bytes: int = 0
    notes: list[str] = field(default_factory=list)


def prompts_of(options: RunOptions) -> list[Prompt]:
    """Prompts from the command line, then from the file.

    Errors: `BadOption` when there are none, `BadDataset` for a bad row.
    """
    prompts: list[Prompt] = list(options.prompts)
    if options.prompts_file is not None:
        prompts += read_prompts(options.prompts_file)
    if not prompts:
        raise BadOption("generation needs a prompt", "give --prompt TEXT or --prompts FILE.jsonl")
    return prompts


def generate(job: Generation) -> Generated:
    """Answer every prompt, leaving `outputs.jsonl`; answers of an earlier, interrupted run are kept.

    Errors: `BadOption`, `CannotHonour`, `Interrupted` after ctrl-C; torch's out-of-memory error passes
    through.
    """
    result = Generated()
    clock = PassClock(job.loaded.model)
    unwatch = watch_generation(job.loaded.model, job.meter)
    try:
        if job.options.rehearse:
            _rehearse(job, result, clock)
        else:
            _answer_all(job, result, clock)
    finally:
        unwatch()
        clock.remove()
        job.meter.leave()
    return result


def _rehearse(job: Generation, result: Generated, clock: PassClock) -> None:
    import torch

    vocabulary = job.loaded.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(job.options.seed)
    shape = (job.workload.sequences, job.workload.prompt_tokens)
    ids = torch.randint(0, vocabulary, shape, generator=generator).to(job.device)
    settings = _settings(job, pad=0)
    settings["min_new_tokens"] = settings["max_new_tokens"]
    with ui.stage(
        f"generating {settings['max_new_tokens']} tokens after {shape[0]} x {shape[1]} random ones"
    ):
        _warm_up(job, ids, settings)
        _pass(job, ids, torch.ones_like(ids), settings, result, clock)


def _warm_up(job: Generation, ids: Any, settings: dict[str, Any]) -> None:
    """Two tokens that count for nothing: kernels are loaded at their first use."""
    import torch

    if job.device.type == "cuda":
        short = {**settings, "max_new_tokens": 2, "min_new_tokens": 2}
        with torch.no_grad():
            job.loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **short)


def _answer_all(job: Generation, result: Generated, clock: PassClock) -> None:
    tokenizer, prompts = job.loaded.tokenizer, job.prompts
    tokenizer.padding_side = "left"
    texts = [_render(prompt, tokenizer) for prompt in prompts]
    partial = job.output.path / "outputs.partial.jsonl"
    rows = _earlier_rows(partial)
    settings = _settings(job, pad=tokenizer.pad_token_id)
    size = job.workload.sequences
    job.stop.graceful = True
    with ui.Steps("generating", len(texts), len(rows)) as steps:
        for start in range(len(rows), len(texts), size):
            new = _answer(job, start, texts[start : start + size], settings, result, clock)
            shown = [_shown(prompt) for prompt in prompts[start : start + size]]
            rows += [
                {"index": start + i, "prompt": p, **row}
                for i, (p, row) in enumerate(zip(shown, new, strict=True))
            ]
            write_atomically(partial, _lines(rows))
            steps.update(len(rows), f"{result.decode_tokens_per_s or 0:,.1f} tokens/s")
            if job.stop.requested and len(rows) < len(texts):
                raise Interrupted("interrupted", "the same command goes on from here")
    job.stop.graceful = False
    result.prompts, result.new_tokens = len(rows), sum(row["tokens"] for row in rows)
    write_atomically(job.output.path / "outputs.jsonl", _lines(rows))
    partial.unlink(missing_ok=True)


def _answer(
    job: Generation,
    first: int,
    texts: Sequence[str],
    settings: dict[str, Any],
    result: Generated,
    clock: PassClock,
) -> list[dict[str, Any]]:
    import torch

    tokenizer = job.loaded.tokenizer
    batch = tokenizer(
        list(texts), return_tensors="pt", padding=True, add_special_tokens=not tokenizer.chat_template
    ).to(job.device)
    width = batch["input_ids"].shape[1]
    if width > job.workload.prompt_tokens:
        note = f"a prompt of {width} tokens is longer than the {job.workload.prompt_tokens} planned for"
        result.notes = [n for n in result.notes if not n.startswith("a prompt of")] + [note]
    if result.prefill_tokens_per_s is None:
        _warm_up(job, batch["input_ids"], settings)
    torch.manual_seed(job.options.seed + first)  # a resumed run draws what an unbroken one would
    sequences = _pass(job, batch["input_ids"], batch["attention_mask"], settings, result, clock)
    ends = _end_tokens(job.loaded.model, tokenizer)
    rows = []
    for sequence in sequences[:, width:].tolist():
        stop = next((i for i, token in enumerate(sequence) if token in ends), None)
        tokens = sequence if stop is None else sequence[: stop + 1]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        rows.append(
            {"text": text, "tokens": len(tokens), "finish_reason": "length" if stop is None else "stop"}
        )
    return rows


def _pass(
    job: Generation, ids: Any, mask: Any, settings: dict[str, Any], result: Generated, clock: PassClock
) -> Any:
    import torch

    clock.start()
    with torch.no_grad():
        done = job.loaded.model.generate(
            input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **settings
        )
    clock.stop(job.device)
    new = done.sequences.shape[1] - ids.shape[1]
    result.prompts += ids.shape[0]
    result.new_tokens += ids.shape[0] * new
    result.prefill_tokens_per_s = ids.numel() / max(clock.prefill_seconds, 1e-9)
    if new > 1:
        result.decode_tokens_per_s = ids.shape[0] * (new - 1) / max(clock.decode_seconds, 1e-9)
    result.cache_bytes = max(result.cache_bytes, _cache_bytes(done.past_key_values))
    if job.after_first_batch is not None:
        job.after_first_batch()
        job.after_first_batch = None
    return done.sequences


def _settings(job: Generation, pad: int) -> dict[str, Any]:
    options, cache = job.options, job.strategy.cache
    if cache in ("offloaded", "quantized") and job.device.type != "cuda":
        raise CannotHonour(f"the {cache} cache needs a CUDA card", "plan with `--cache dynamic`")
    settings: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens or job.workload.new_tokens,
        "pad_token_id": pad,
        "use_cache": True,
    }
    if cache != "dynamic":
        settings["cache_implementation"] = cache
    if options.greedy or options.rehearse:
        settings |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    elif options.temperature is not None or options.top_p is not None:
        if options.temperature == 0:
            raise BadOption("--temperature 0 is greedy decoding", "give --greedy")
        settings |= {
            "do_sample": True,
            "temperature": options.temperature or 1.0,
            "top_p": options.top_p or 1.0,
        }
    return settings


def _render(prompt: Prompt, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        if isinstance(prompt, str):
            return prompt
        raise BadOption("the tokenizer has no chat template for messages", 'use {"prompt": ...} rows')
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _shown(prompt: Prompt) -> str | list[Message]:
    return prompt if isinstance(prompt, str) else list(prompt)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    known = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return {token for token in known if token is not None}


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _earlier_rows(partial: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in partial.read_text().splitlines()] if partial.exists() else []


def _cache_bytes(cache: Any) -> int:
    total = 0
    for layer in getattr(cache, "layers", ()):
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if tensor is not None:
                total += tensor.numel() * tensor.element_size()
    return total
