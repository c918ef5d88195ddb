"""`planner plan MODEL -o plan.json`: the ways to do a job, ranked, and why the others lost."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from planner import request
from planner.errors import FitwrightError
from planner.estimate import estimate
from planner.ledger import ledger_hash, remembering, same_job
from planner.plan import make_plan, plan_bytes, write_plan
from planner.render.output import note
from planner.render.text import short
from planner.resolve import resolve
from planner.types import Plan


def run(args: Namespace) -> int:
    """Make the plan, write it where `-o` says, print it. Exit 0 if anything fits or is tight, else 1."""
    job = request.workload(args)
    pinned = request.wishes(args)
    model = resolve(args.model, offline=args.offline)
    target = request.machine(args, args.gpu)
    known = same_job(request.remembered(args, model.profile.config, target), job)
    plan = make_plan(
        model.profile,
        target,
        job,
        pinned=pinned,
        prefer=args.prefer or "quality",
        repo_id=model.repo_id,
        revision=model.revision,
        path=model.path,
        ledger_hash=ledger_hash(known),
        estimator=remembering(estimate, known),
    )
    if args.output is not None:
        _write(plan, args.output)
    if args.json:
        sys.stdout.write(plan_bytes(plan).decode())
    else:
        from planner.render.console import make_console
        from planner.render.plan import print_plan

        print_plan(make_console(), plan)
    if args.output is not None:
        then = (
            f"; carry it out with: executor run {args.output}" if plan.candidates else ", without candidates"
        )
        note(f"plan written to {args.output}{then}")
    return 0 if plan.candidates else 1


def _write(plan: Plan, path: str) -> None:
    try:
        write_plan(plan, Path(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FitwrightError(
            f"cannot write {short(path)}: {reason}", "name a file in a folder you may write"
        ) from None
