"""A cell as the executor takes it: a plan with one candidate, options, and the rows or prompts to work on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from benchmarks.accuracy.cells import Cell, model_of, predict
from executor.inputs import Inputs
from executor.options import RunOptions
from executor.rows import Row
from planner.types import Candidate, Machine, Plan, PlanModel

STEPS = 2
"""Optimizer steps of a training run: the second has the optimizer's state around it."""
TIMED_STEPS = 8
WORDS = 1000
"""Vocabulary of the made-up texts of ragged and packed cells."""


def plan_of(cell: Cell, device: str) -> Plan:
    """The plan of a cell, for the card or (for trying the bench out) for the CPU."""
    model = model_of(cell.model)
    found = predict(cell)
    how, places = cell.strategy, dict(found.placement.device_map)
    if device == "cpu":
        how, places = replace(how, placement="cpu", engine="resident"), {"": "cpu"}
    candidate = Candidate(
        rank=1, strategy=how, engine=how.engine, device_map=places, estimate=found, speed=found.speed
    )
    facts = PlanModel(id=cell.model, parameters=model.parameters, config=model.config)
    return Plan(
        model=facts,
        stack=found.stack,
        machine=Machine(),
        workload=cell.workload,
        candidates=(candidate,),
        digest=cell.id,
    )


def options_of(cell: Cell) -> RunOptions:
    """A rehearsal; a run on made-up texts where their lengths are the point."""
    made_up = cell.data != "random"
    return RunOptions(
        plan=Path(cell.id),
        rehearse=not made_up,
        max_steps=TIMED_STEPS if cell.timed else STEPS,
        save_steps=10**6,  # no checkpoints
        preflight=False,
        greedy=made_up,
        dataset=Path("made-up-texts.jsonl") if made_up else None,
        packing=cell.data == "packed",
    )


def inputs_of(cell: Cell) -> Inputs:
    """Made-up texts: half of a batch's worth as long as the job allows, or one to be packed with others; the
    rest down to a quarter."""
    if cell.data == "random":
        return Inputs()
    work, rng = cell.workload, random.Random(cell.id)
    if work.task == "infer":
        lengths = [work.prompt_tokens, *_shorter(rng, work.prompt_tokens, work.batch_size - 1)]
        return Inputs(prompts=tuple(_text(rng, n) for n in lengths))
    rows = STEPS * work.batch_size
    if cell.data == "packed":
        lengths = [work.seq_len, *_shorter(rng, work.seq_len, 4 * rows - 1)]
    else:
        lengths = [work.seq_len] * (rows - rows // 2) + _shorter(rng, work.seq_len, rows // 2)
    return Inputs(rows=tuple(Row(line=i, text=_text(rng, n)) for i, n in enumerate(lengths, 1)))


def _shorter(rng: random.Random, most: int, count: int) -> list[int]:
    return [rng.randint(max(1, most // 4), max(1, 3 * most // 4)) for _ in range(count)]


def _text(rng: random.Random, words: int) -> str:
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(words))


def word_tokenizer() -> Any:
    """A tokenizer of one token a word, so that a text has exactly as many tokens as asked for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
