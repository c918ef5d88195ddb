"""`planner inspect`: this machine as an estimate sees it."""

from __future__ import annotations

from argparse import Namespace

from planner.inspect import inspect_machine
from planner.render.output import print_json


def run(args: Namespace) -> int:
    """Print the machine; `--json` gives what `--machine FILE` reads back."""
    machine = inspect_machine()
    if args.json:
        print_json(machine)
        return 0
    from planner.render.console import make_console
    from planner.render.machine import print_machine

    print_machine(make_console(), machine)
    return 0
