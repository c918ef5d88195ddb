"""`planner estimate MODEL`: one exact way to do a job, line by line."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import msgspec
from msgspec import Struct

from planner import request
from planner.energy import Cost, training_cost
from planner.estimate import architecture_of, estimate
from planner.ledger import with_measured
from planner.render.output import print_json
from planner.resolve import resolve
from planner.strategies import resolve_strategy
from planner.types import GOOD, Estimate, Machine, Strategy, Workload
from profiles.schema import Architecture, ModelProfile


class Asked(Struct, frozen=True):
    """What the command line asks, and the answer."""

    model: ModelProfile
    arch: Architecture
    target: Machine
    job: Workload
    how: Strategy
    answer: Estimate


def asked(args: Namespace) -> Asked:
    """Resolve model, machine and strategy of the command line, and estimate."""
    job = request.workload(args)
    pinned = request.wishes(args)
    target = request.machine(args, args.gpu)
    if args.exact:
        from planner.exact.estimate import exact_estimate, resolve_exact

        model, arch = resolve_exact(args.model, offline=args.offline)
        how = resolve_strategy(arch, target, job, pinned)
        answer = exact_estimate(model.profile, arch, target, job, how)
    else:
        model = resolve(args.model, offline=args.offline)
        arch = architecture_of(model.profile)
        how = resolve_strategy(arch, target, job, pinned)
        answer = estimate(model.profile, target, job, how)
    return Asked(model.profile, arch, target, job, how, answer)


def run(args: Namespace) -> int:
    """Print the estimate. Exit 0 if it fits or is tight, else 1."""
    found = asked(args)
    target, job, how = found.target, found.job, found.how
    entries = request.remembered(args, found.model.config, target)
    answer = with_measured(found.answer, entries, target, job, how)
    if args.json:
        print_json(as_json(answer, training_cost(target, job, how, answer.speed)))
    else:
        from planner.render.console import make_console
        from planner.render.estimate import print_estimate

        print_estimate(make_console(), answer, target, job, how, found.arch)
    return 0 if answer.verdict in GOOD else 1


def as_json(answer: Estimate, cost: Cost | None) -> dict[str, Any]:
    """The estimate as the contract prints it: disk as one figure beside its lines."""
    fields: dict[str, Any] = {}
    for name, value in msgspec.to_builtins(answer).items():
        if name == "disk":
            fields.update(disk_bytes=answer.disk.bytes, disk_components=value["components"])
        else:
            fields[name] = value
    return fields if cost is None else {**fields, "training_cost": msgspec.to_builtins(cost)}
