"""`planner explain MODEL`: the estimate of one way to do a job, as arithmetic a person can follow."""

from __future__ import annotations

from argparse import Namespace

from planner.commands.estimate import asked
from planner.explain import explain
from planner.render.output import print_json
from planner.types import GOOD


def run(args: Namespace) -> int:
    """Print the explanation. Exit codes as `planner estimate`."""
    found = asked(args)
    shown = explain(found.answer, found.arch, found.target, found.job, found.how)
    if args.json:
        print_json(shown)
    else:
        from planner.render.console import make_console
        from planner.render.explain import print_explanation

        print_explanation(make_console(), shown, found.target, found.job, found.how, found.arch)
    return 0 if found.answer.verdict in GOOD else 1
