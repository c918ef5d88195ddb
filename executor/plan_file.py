"""Reading plan.json and choosing what of it to carry out."""

from __future__ import annotations

from pathlib import Path

from executor.errors import BadOption, BadPlan
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
    return plan


def candidates_to_try(plan: Plan, rank: int | None) -> tuple[Candidate, ...]:
    """All candidates in rank order, or the one that `--candidate` names (counted from 1, as printed)."""
    if rank is None:
        return plan.candidates
    for candidate in plan.candidates:
        if candidate.rank == rank:
            return (candidate,)
    ranks = ", ".join(str(c.rank) for c in plan.candidates)
    raise BadOption(f"the plan has no candidate {rank}", f"its candidates are {ranks}")
