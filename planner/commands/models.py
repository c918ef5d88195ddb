"""`planner models [TEXT]`: the catalogue; with hardware or a task, what that hardware can run or train."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from msgspec import structs

from planner import request
from planner.render.output import matches, note, print_json
from planner.types import Machine, Workload
from profiles.catalogue import all_models
from profiles.schema import ModelProfile


def run(args: Namespace) -> int:
    """List models; exit 0 also when none matches."""
    found = [model for model in all_models() if matches(args.text, (model.id, model.name, *model.repo_ids))]
    if not found:
        note(f"no model of the catalogue has {args.text!r} in its name")
    if any(value is not None for value in (args.gpu, args.vram, args.machine, args.task)):
        return _for_hardware(args, found)
    if args.json:
        print_json([_facts(model) for model in found])
    elif found:
        from planner.render.catalogue import MODELS_NOTE, models_table
        from planner.render.console import make_console

        make_console().print(models_table(found), "", MODELS_NOTE, sep="\n")
    return 0


def _for_hardware(args: Namespace, models: Sequence[ModelProfile]) -> int:
    from planner.reverse import models_for

    job, target = request.workload(args), request.machine(args, args.gpu)
    distinct = [model for model in models if model.same_as is None]
    fits = models_for(target, job, distinct)
    if args.json:
        print_json(
            [
                {
                    **_facts(fit.model),
                    "verdict": fit.estimate.verdict,
                    "usable": fit.usable,
                    "strategy": fit.strategy,
                    "gpus": fit.estimate.gpus,
                    "host": fit.estimate.host,
                    "speed": fit.estimate.speed,
                }
                for fit in fits
            ]
        )
    else:
        _print_fits(target, job, fits, len(distinct))
    return 0


def _print_fits(target: Machine, job: Workload, fits: Sequence[Any], asked: int) -> None:
    from planner.render import describe
    from planner.render.catalogue import fits_table
    from planner.render.console import make_console

    out = make_console()
    out.print(f"{describe.job(job)}, on {describe.machine(target)}:")
    out.print(f"{len(fits)} of {asked} models, best first")
    if fits:
        out.print()
        out.print(fits_table(fits))


def _facts(model: ModelProfile) -> dict[str, Any]:
    return structs.asdict(model)
