"""Write the grid of cells: which jobs are measured, drawn once from a fixed seed.

    python -m benchmarks.accuracy.grid [--output FILE] [--anew]

A draw that the planner's rules exclude, that would not fit the card, or that would take too long is drawn
again. Cells that are in the file stay as they are, whatever has become of the estimator since: only models
that it lacks are drawn, and of the listed cells those that it lacks are added. `--anew` draws everything.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from benchmarks.accuracy import axes
from benchmarks.accuracy.cells import GRID, Cell, identified, machine_of, model_of, predict, read_cells
from planner.errors import FitwrightError
from planner.estimate import architecture_of, count
from planner.files import write_atomically
from planner.memory.optimizer import OPTIMIZERS
from planner.strategies import resolve_strategy
from planner.types import Strategy, Workload
from planner.units import GIB

SEED = "fitwright accuracy grid 1"
MOST_PROCESS = 60 * GIB
MOST_SECONDS = 15.0
"""Of the card's own time in one cell."""
MATMUL_PER_S = 3.0e14
"""Rate assumed for the duration of a cell (one H200 that several cells share)."""
ATTEMPTS = 8
"""Runs a cell makes until its cap is found, about."""
BOTH_ALLOCATORS = 3
"""Every third cell is measured under both allocators."""
LIGER = frozenset(
    [
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    ]
)
"""Model types drawn for liger's kernels."""


class Refused(Exception):
    """A draw that is not measured."""


def cell(model: str, work: Workload, *, most: float = MOST_SECONDS, **settings: Any) -> Cell:
    """A cell with the planner's defaults for what is not set. Errors: `Refused`."""
    about = {name: settings.pop(name) for name in ("data", "vram_gib", "timed") if name in settings}
    profile = model_of(model)
    try:
        how = resolve_strategy(
            architecture_of(profile), machine_of(about.get("vram_gib")), work, {"quant": "none"} | settings
        )
        found = Cell(model=model, workload=work, strategy=how, **about)
        process = predict(found).gpus[0].process_bytes
    except FitwrightError as error:
        raise Refused(str(error)) from None
    load, card = durations(found)
    if process > MOST_PROCESS or card > most:
        raise Refused("too large or too long")
    if found.timed:  # as the executor runs by itself
        found = replace(found, allocators=("expandable",))
    found = identified(found)
    if int(found.id, 16) % BOTH_ALLOCATORS == 0 and not found.timed and how.placement == "full_gpu":
        found = replace(found, allocators=("stock", "expandable"))
        found, load, card = identified(found), 2 * load, 2 * card
    return replace(found, seconds=round(8 + load + card, 1))


def durations(item: Cell) -> tuple[float, float]:
    """(loading, the card's own time) of a cell in seconds, roughly."""
    work, how = item.workload, item.strategy
    profile = model_of(item.model)
    parameters = profile.parameters or count(architecture_of(profile))
    active = profile.active_parameters or parameters
    load = 2 + 0.6e-9 * parameters * (2 if how.quant != "none" else 1)
    slow = {"none": 1.0, "nf4": 1.3, "int8": 2.0}[how.quant] * (4 if how.dtype == "fp32" else 1)
    if work.task == "train":
        passes = 8 if how.gradient_checkpointing else 6
        tokens = work.batch_size * work.seq_len * work.gradient_accumulation_steps
        once = 2 * (passes * active * tokens / MATMUL_PER_S * slow + 0.3)
    else:
        prefill = 2 * active * work.batch_size * work.prompt_tokens / MATMUL_PER_S * slow
        once = prefill + work.new_tokens * 0.03 * (3 if how.quant == "int8" else 1)
        if how.placement != "full_gpu":
            once += (work.new_tokens + 1) * 2 * parameters / 9e9
    return load, once * (2 if item.timed else ATTEMPTS)


# --------------------------------------------------------------------------- draws


def drawn(rng: random.Random, make: Callable[[random.Random], Cell], taken: set[str]) -> Cell:
    """The first draw that is accepted and new. Errors: `Refused` after many."""
    for _ in range(400):
        try:
            found = make(rng)
        except Refused:
            continue
        if found.id not in taken:
            taken.add(found.id)
            return found
    raise Refused("no draw was accepted")


def training(model: str) -> Callable[[random.Random], Cell]:
    """Draws one fine-tuning of a model."""

    def make(rng: random.Random) -> Cell:
        pick = rng.choice
        method = pick(axes.METHODS)
        adapters = {
            "lora_rank": pick(axes.RANK),
            "lora_dropout": pick(axes.DROPOUT),
            "lora_targets": pick(axes.TARGETS),
            "lora_variant": pick(axes.VARIANT),
            "adapter_dtype": pick(axes.ADAPTER_DTYPE),
        }
        work = Workload(
            task="train",
            method=method,
            seq_len=pick(axes.SEQ_LEN),
            batch_size=pick(axes.BATCH),
            gradient_accumulation_steps=pick(axes.ACCUMULATION),
            **({} if method == "full" else adapters),
        )
        loss, kernels = pick(axes.ENDING)
        if kernels == "liger" and model_of(model).config["model_type"] not in LIGER:
            kernels = "torch"
        settings: dict[str, Any] = {
            "quant": pick(axes.QLORA_QUANT) if method == "qlora" else "none",
            "dtype": "bf16" if method == "qlora" else pick(axes.DTYPE),
            "gradient_checkpointing": pick(axes.CHECKPOINTING),
            "optimizer": pick(tuple(OPTIMIZERS) if method == "full" else axes.ADAPTER_OPTIMIZERS),
            "loss": loss,
            "kernels": kernels,
        }
        if method == "qlora" and pick(axes.UPCAST):
            settings["upcast_frozen"] = True
        return cell(model, work, **settings, **_attention(rng, work.seq_len))

    return make


def generating(model: str) -> Callable[[random.Random], Cell]:
    """Draws one generation with a model."""

    def make(rng: random.Random) -> Cell:
        pick = rng.choice
        work = Workload(
            task="infer",
            prompt_tokens=pick(axes.PROMPT),
            new_tokens=pick(axes.NEW),
            batch_size=pick(axes.BATCH),
        )
        settings = {"quant": pick(axes.INFER_QUANT), "cache": pick(axes.CACHE)}
        return cell(model, work, **settings, **_attention(rng, work.prompt_tokens))

    return make


def _attention(rng: random.Random, tokens: int) -> dict[str, Any]:
    """The planner's own choice, or eager for sequences short enough for its scores."""
    return {"attention": "eager"} if rng.choice(axes.ATTENTION) == "eager" and tokens <= 2048 else {}


def grid(there: Sequence[Cell] = ()) -> Iterator[Cell]:
    """Every cell of the grid, those that are there first."""
    yield from there
    taken = {item.id for item in there}
    known = {item.model for item in there}
    for model, (trainings, generations) in axes.MODELS.items():
        if model in known:
            continue
        for make, many in ((training(model), trainings), (generating(model), generations)):
            for i in range(many):
                rng = random.Random(f"{SEED}/{model}/{make.__qualname__}/{i}")
                yield drawn(rng, make, taken)
    for item in (*_every_optimizer(), *_elsewhere(), *_timed()):
        if item.id not in taken:
            taken.add(item.id)
            yield item


def _every_optimizer() -> Iterator[Cell]:
    for optimizer, model, (seq, batch) in zip(
        OPTIMIZERS, cycle(axes.FULL_MODELS), cycle(((1024, 1), (512, 4), (2048, 1))), strict=False
    ):
        # adapters in fp32 where bitsandbytes has no kernel for the gradients of bf16 weights
        method = "lora" if optimizer.startswith("rmsprop_bnb") else "full"
        work = Workload(task="train", method=method, seq_len=seq, batch_size=batch)
        yield cell(model, work, optimizer=optimizer)


def _elsewhere() -> Iterator[Cell]:
    """Offloaded layers, ragged batches, packed sequences."""
    for model, placement, vram_gib, prompt in axes.OFFLOADED:
        work = Workload(task="infer", prompt_tokens=prompt, new_tokens=4)
        yield cell(model, work, most=120, placement=placement, engine="accelerate", vram_gib=vram_gib)
    for model, method, data, tokens, batch in axes.DATA:
        if method == "infer":
            work = Workload(task="infer", prompt_tokens=tokens, new_tokens=32, batch_size=batch)
            yield cell(model, work, data=data)
        else:
            work = Workload(task="train", method=method, seq_len=tokens, batch_size=batch)
            yield cell(model, work, data=data, quant="nf4" if method == "qlora" else "none")


def _timed() -> Iterator[Cell]:
    for model, quant, batch, prompt in axes.TIMED_INFER:
        work = Workload(task="infer", prompt_tokens=prompt, new_tokens=128, batch_size=batch)
        yield cell(model, work, quant=quant, timed=True, most=40)
    for model, method, batch, seq in axes.TIMED_TRAIN:
        work = Workload(task="train", method=method, seq_len=seq, batch_size=batch)
        yield cell(model, work, quant="nf4" if method == "qlora" else "none", timed=True, most=40)


def line(item: Cell) -> bytes:
    """A cell as its line: of the job and the strategy only what differs from the defaults."""
    fields = msgspec.to_builtins(item)
    for name, plain in (("workload", Workload()), ("strategy", Strategy())):
        default = msgspec.to_builtins(plain)
        fields[name] = {k: v for k, v in fields[name].items() if v != default[k] or k == "task"}
    return msgspec.json.encode(fields)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=GRID)
    parser.add_argument("--anew", action="store_true", help="forget the cells that are there")
    args = parser.parse_args()
    there = read_cells(args.output) if args.output.exists() and not args.anew else []
    cells = list(grid(there))
    write_atomically(args.output, b"".join(line(c) + b"\n" for c in cells))
    kinds = {model_of(c.model).config["model_type"] for c in cells}
    halves = Counter(c.half for c in cells)
    timed = sum(c.timed for c in cells)
    hours = sum(c.seconds or 0 for c in cells) / 3600
    print(
        f"{len(cells)} cells ({timed} timed) of {len(axes.MODELS)} models, {len(kinds)} architectures; "
        f"fit {halves['fit']}, judge {halves['judge']}; about {hours:.1f} h one after the other"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
