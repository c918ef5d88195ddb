"""Generation: prompts answered, or random ones for a rehearsal, and both measured."""

from __future__ import annotations

from executor import ui
from executor.answering import answer_all
from executor.measure import watch_generation
from executor.pass_clock import PassClock
from executor.passes import Generated, Generation, Passes


def generate(job: Generation) -> Generated:
    """Answer every prompt, leaving `outputs.jsonl`; answers of an earlier, interrupted run are kept.

    Errors: `BadOption`, `CannotHonour`, `Interrupted` after ctrl-C; torch's out-of-memory error passes
    through.
    """
    clock = PassClock(job.loaded.model)
    unwatch = watch_generation(job.loaded.model, job.meter, lambda: clock.in_prompt)
    try:
        return _rehearse(job, clock) if job.options.rehearse else answer_all(job, clock)
    finally:
        unwatch()
        clock.remove()
        job.meter.leave()


def _rehearse(job: Generation, clock: PassClock) -> Generated:
    import torch

    vocabulary = job.loaded.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(job.options.seed)
    shape = (job.batch_size, job.workload.prompt_tokens)
    ids = torch.randint(0, vocabulary, shape, generator=generator).to(job.device)
    passes = Passes(job, clock, shape[1], pad=0)
    what = f"generating {job.new_tokens} tokens after {shape[1]} random ones"
    with ui.Steps(what, shape[0], now=passes.now):
        passes.run(ids, torch.ones_like(ids))
    return passes.result
