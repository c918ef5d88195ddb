"""`planner check MODEL`: which jobs a model allows, here or on each card named."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from msgspec.structs import replace

from planner import request
from planner.estimate import architecture_of
from planner.ledger import Entry, with_measured
from planner.render.output import note, print_json
from planner.resolve import resolve
from planner.survey import Answer, Question, Survey, Target, smallest, smallest_streamed, survey, too_large
from planner.types import GOOD, Machine, Task, Workload
from profiles.hardware import all_gpus

SMALLEST_CARDS = 3


def run(args: Namespace) -> int:
    """Print the page. Exit 0 if any job fits or is tight on any target, or no GPU is in sight; else 1."""
    workloads = _workloads(args)
    wishes = request.wishes(args)
    targets = _targets(args)
    model = resolve(args.model, offline=args.offline).profile
    question = Question(model, architecture_of(model), workloads, wishes, args.method)
    found = survey(question, targets)
    found = tuple(
        _with_ledger(target, request.remembered(args, model.config, target.machine)) for target in found
    )
    page = Survey(
        model=model,
        workloads=workloads,
        targets=found,
        smallest_cards=smallest(question, all_gpus(), SMALLEST_CARDS),
        streamed=smallest_streamed(question, all_gpus(), too_large(found), SMALLEST_CARDS),
    )
    if args.json:
        print_json(as_json(page))
    else:
        from planner.render.check import print_check
        from planner.render.console import make_console
        from planner.render.describe import architecture

        print_check(make_console(), page, architecture(question.arch))
    for remark in dict.fromkeys(remark for _, machine in targets for remark in machine.notes):
        note(remark)
    return 0 if _any_good(found) else 1


def _workloads(args: Namespace) -> dict[Task, Workload]:
    """One job of each task, unless `--task` or an option of one task leaves only that."""
    tasks: tuple[Task, ...] = ("infer", "train")
    if args.task is not None:
        request.refuse_other_task(args, args.task)
        tasks = (args.task,)
    return {task: request.workload(args, task) for task in tasks}


def _targets(args: Namespace) -> list[tuple[str, Machine]]:
    names = list(dict.fromkeys(args.gpu or ()))
    if not names:
        return [("here" if args.vram is None and args.machine is None else "given", request.machine(args))]
    return [(name, request.machine(args, name)) for name in names]


def _with_ledger(target: Target, known: tuple[Entry, ...]) -> Target:
    """The target with what was measured on it beside each estimate."""
    if not known:
        return target

    def beside(answer: Answer) -> Answer:
        if answer.estimate is None or answer.strategy is None:
            return answer
        shown = with_measured(answer.estimate, known, target.machine, answer.workload, answer.strategy)
        return replace(answer, estimate=shown)

    return replace(target, answers=tuple(map(beside, target.answers)))


def _any_good(targets: tuple[Target, ...]) -> bool:
    if not any(target.machine.gpus for target in targets):
        return True
    return any(answer.verdict in GOOD for target in targets for answer in target.answers)


# --------------------------------------------------------------------------- JSON


def as_json(page: Survey) -> dict[str, Any]:
    """The page with one flat object for each job of each target."""
    model = page.model
    return {
        "schema": page.schema,
        "model": {
            "id": model.id,
            "name": model.name,
            "parameters": model.parameters,
            "active_parameters": model.active_parameters,
            "context_tokens": model.context_tokens,
        },
        "workloads": page.workloads,
        "targets": [_target_json(target) for target in page.targets],
        "smallest_cards": page.smallest_cards,
        "streamed": page.streamed,
    }


def _target_json(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "gpus": [
            {
                "id": gpu.profile.id,
                "name": gpu.profile.name,
                "total_bytes": gpu.total_bytes,
                "bandwidth_bytes_per_s": gpu.profile.bandwidth_bytes_per_s,
                "power_watts": gpu.profile.power_watts,
                "launch_price_usd": gpu.profile.launch_price_usd,
                "launch_date": gpu.profile.launch_date,
            }
            for gpu in target.machine.gpus
        ],
        "host": target.machine.host,
        "jobs": [_answer_json(answer) for answer in target.answers],
    }


def _answer_json(answer: Answer) -> dict[str, Any]:
    """An answer; `gpus` are those of the way shown or, without a card, of what one would need."""
    shown = answer.estimate
    needed = answer.need or shown
    return {
        "job": answer.job,
        "label": answer.label,
        "task": answer.workload.task,
        "verdict": answer.verdict,
        "reason": answer.reason,
        "strategy": answer.strategy,
        "gpus": needed.gpus if needed else [],
        "host": shown.host if shown else None,
        "disk_bytes": shown.disk.bytes if shown else None,
        "speed": shown.speed if shown else None,
        "measured_here": shown.measured_here if shown else None,
        "longest_context_tokens": answer.longest_context_tokens,
        "largest_batch_size": answer.largest_batch_size,
        "notes": answer.notes,
        "reasons": shown.reasons if shown else [],
    }
