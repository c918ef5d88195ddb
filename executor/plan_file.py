"""Reading plan.json and choosing what of it to carry out."""

from __future__ import annotations

from pathlib import Path

from executor.errors import BadOption, BadPlan
from planner.memory.optimizer import OPTIMIZERS
from planner.options import MOST_SEQUENCES, MOST_TOKENS
from planner.plan import read_plan
from planner.types import Candidate, Plan


def load_plan(path: Path) -> Plan:
    """The plan in `path`, checked by the planner that wrote it.

    Errors: `BadPlan` for a file that is missing, truncated, edited, of another version, or without
    candidates.
    """
    plan = read_plan(path)
    if not plan.candidates:
        raise BadPlan(
            f"{path} has no candidate to run", "its rejected entries say what would make the job fit"
        )
    _refuse_impossible(path, plan)
    return plan


def _refuse_impossible(path: Path, plan: Plan) -> None:
    """Values that `planner plan` never writes: the plan was edited, and its digest made to match."""
    work = plan.workload
    bounds = {
        "prompt_tokens": MOST_TOKENS,
        "new_tokens": MOST_TOKENS,
        "seq_len": MOST_TOKENS,
        "batch_size": MOST_SEQUENCES,
        "concurrency": MOST_SEQUENCES,
        "gradient_accumulation_steps": MOST_SEQUENCES,
        "lora_rank": MOST_SEQUENCES,
        "lora_alpha": MOST_SEQUENCES,
    }
    for name, most in bounds.items():
        if not 1 <= getattr(work, name) <= most:
            raise _impossible(path, f"{name} is {getattr(work, name)}")
    if not 0 <= work.lora_dropout < 1:
        raise _impossible(path, f"lora_dropout is {work.lora_dropout:g}")
    for optimizer in (candidate.strategy.optimizer for candidate in plan.candidates):
        if optimizer not in OPTIMIZERS:
            raise _impossible(path, f"its optimizer is {optimizer[:60]!a}")
    ranks = [candidate.rank for candidate in plan.candidates]
    if ranks != list(range(1, len(ranks) + 1)):
        raise _impossible(path, f"its candidates are ranked {', '.join(map(str, ranks[:8]))}")
    if not plan.model.id.isprintable():  # it goes to the terminal, which obeys some of what is not
        raise _impossible(path, f"the model is called {plan.model.id[:60]!a}")


def _impossible(path: Path, what: str) -> BadPlan:
    return BadPlan(f"{path} cannot be carried out: {what}", "make it again with `planner plan`")


def candidates_to_try(plan: Plan, rank: int | None) -> tuple[Candidate, ...]:
    """All candidates in rank order, or the one that `--candidate` names (counted from 1, as printed)."""
    if rank is None:
        return plan.candidates
    for candidate in plan.candidates:
        if candidate.rank == rank:
            return (candidate,)
    ranks = ", ".join(str(c.rank) for c in plan.candidates)
    raise BadOption(f"the plan has no candidate {rank}", f"its candidates are {ranks}")
