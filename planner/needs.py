"""What would make a job fit: how much is missing, and which change would help."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from planner.estimate import architecture_of
from planner.limits import MOST_BATCH, Ask, largest_that_fits, longest_context
from planner.machine import free_ram
from planner.rules import Case, broken_rule
from planner.strategies import default_optimizer
from planner.types import GOOD, Estimate, Machine, Strategy, Workload
from planner.units import GIB, format_gib
from profiles.schema import ModelProfile


def short_cards(estimate: Estimate) -> list[tuple[int, int, int]]:
    """Cards that hold too little: index, bytes needed at worst, bytes there."""
    return [
        (gpu.index, gpu.high_bytes, gpu.budget_bytes)
        for gpu in estimate.gpus
        if gpu.budget_bytes is not None and gpu.high_bytes > gpu.budget_bytes
    ]


def shortfall_text(estimate: Estimate, machine: Machine) -> str:
    """What is missing, as a clause: on the card, in RAM, or knowledge."""
    short = short_cards(estimate)
    if short:
        index, needed, there = max(short, key=lambda each: each[1] - each[2])
        return f"needs {format_gib(needed)} on card {index}, which has {format_gib(there)}"
    free, ram = free_ram(machine), estimate.host.ram_bytes
    if free is None:
        return f"needs {format_gib(ram)} of RAM, and how much there is was not said"
    if not estimate.gpus or ram > free:
        return f"needs {format_gib(ram)} of RAM, and {format_gib(free)} is free"
    return "; ".join(estimate.reasons) or "whether it fits is not known"


def need_text(estimate: Estimate, machine: Machine) -> str:
    """The hardware that would do, as a clause."""
    short = short_cards(estimate)
    if short:
        _, needed, there = max(short, key=lambda each: each[1] - each[2])
        held_back = max((gpu.reserve_bytes for gpu in machine.gpus), default=0)
        cards = f"each of {len(estimate.gpus)} cards" if len(estimate.gpus) > 1 else "a card"
        return f"{cards} with {whole_gib(needed + held_back)} GiB ({format_gib(needed - there)} more)"
    ram = f"{whole_gib(estimate.host.ram_bytes)} GiB of free RAM"
    return f"{ram}; --ram SIZE says how much there is" if free_ram(machine) is None else ram


def whole_gib(n: int) -> int:
    """GiB rounded up, as memory is sold."""
    return -(-n // GIB)


def what_would_fit(
    model: ModelProfile, machine: Machine, workload: Workload, strategy: Strategy, ask: Ask
) -> tuple[str, ...]:
    """Changes of the job under which a strategy fits here, as options; empty when none is enough alone."""
    changes = [*_other_precision(model, machine, workload, strategy, ask)]
    sequences = workload.sequences
    if sequences > 1:
        batch = largest_that_fits(model, machine, workload, strategy, ask, most=min(sequences, MOST_BATCH))
        if batch is not None:
            changes.append(f"--batch-size {batch}")
    tokens = longest_context(model, machine, workload, strategy, ask, most=_tokens(workload))
    if tokens is not None:
        if workload.task == "train":
            changes.append(f"--seq-len {tokens}")
        else:
            changes.append(f"--prompt-tokens {tokens - workload.new_tokens}")
    return tuple(changes)


def _other_precision(
    model: ModelProfile, machine: Machine, workload: Workload, strategy: Strategy, ask: Ask
) -> Iterator[str]:
    """Smaller weights that would fit, where the user asked for larger ones."""
    if strategy.quant == "nf4":
        return
    smaller = replace(strategy, quant="nf4")
    changed, text = workload, "--quant nf4"
    if workload.task == "train":
        changed, text = replace(workload, method="qlora"), "--method qlora"
        smaller = replace(smaller, optimizer=default_optimizer(machine, changed))
    arch = architecture_of(model)
    if broken_rule(Case(arch, machine, changed, smaller)) is not None:
        return
    if ask(model, machine, changed, smaller).verdict in GOOD:
        yield text


def _tokens(workload: Workload) -> int:
    infer = workload.prompt_tokens + workload.new_tokens
    return workload.seq_len if workload.task == "train" else infer
