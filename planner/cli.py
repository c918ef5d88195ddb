"""The `planner` command: parser, dispatch, and the one place where errors become lines and exit codes.

Exit codes: 0 fits or tight, 1 does not fit, 2 bad usage or input, 130 interrupted. Nothing but argparse and
the option table is imported until a command is known; rich only when a table is drawn.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from planner import options
from planner.errors import BadOption, FitwrightError
from planner.streams import reopen_closed, settle, tell

INTERRUPTED = 130
BROKEN_PIPE = 141
DEFECT = "this is a defect of Fitwright"

_EPILOG = "MODEL and GPU names: `planner models`, `planner gpus`. Sizes carry a unit: 24GiB, 500GB."


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing usage: every error of a user is one line."""

    def error(self, message: str) -> NoReturn:
        raise BadOption(message, f"see `{self.prog} --help`")


class _Version(argparse.Action):
    """Reads the version only when asked: package metadata is slow to find."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from importlib.metadata import version

        print(f"planner {version('fitwright')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, one sub-parser for each command."""
    parser = _Parser(
        prog="planner",
        description="Will this model run, or train, on this hardware - how fast, with how much to spare?",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, epilog=_EPILOG, allow_abbrev=False)

    check = command(
        "check", "which jobs a model allows, on this machine or on any card: look here before buying"
    )
    options.add_model(check)
    options.add_job(check, task_help="only these jobs (default: both)")
    options.add_machine(check, several=True)
    options.add_strategy(check, searched=True)
    options.add_preference(check)

    plan = command("plan", "rank the ways to do a job and write the plan that `executor run` carries out")
    options.add_model(plan)
    plan.add_argument("-o", "--output", metavar="FILE", help="write the plan here")
    options.add_job(plan)
    options.add_machine(plan, several=False)
    options.add_strategy(plan, searched=True)
    options.add_preference(plan)

    estimate = command("estimate", "memory and speed of one exact way to do a job, line by line")
    options.add_model(estimate)
    options.add_job(estimate)
    options.add_machine(estimate, several=False)
    options.add_strategy(estimate, searched=False)

    explain = command(
        "explain", "an estimate as arithmetic to follow: which moment is the peak and why, line by line"
    )
    options.add_model(explain)
    options.add_job(explain)
    options.add_machine(explain, several=False)
    options.add_strategy(explain, searched=False)

    models = command("models", "the models of the catalogue; with --gpu, what that card can run or train")
    models.add_argument(
        "text", metavar="TEXT", nargs="?", default="", help="only models whose id or name has this"
    )
    options.add_job(models)
    options.add_machine(models, several=False)

    gpus = command("gpus", "the cards of the catalogue with memory, rates, power and launch price")
    gpus.add_argument(
        "text", metavar="TEXT", nargs="?", default="", help="only cards whose id or name has this"
    )

    command("inspect", "this machine: cards, memory, disks; --json gives the file that --machine reads")
    for each in commands.choices.values():
        options.add_common(each)
    return parser


def report(error: FitwrightError) -> None:
    """Print an error as `error: ...` and `hint: ...`, one line each, on stderr."""
    from planner.render.text import one_line

    hint = [f"hint: {one_line(error.hint)}"] if error.hint else []
    tell(f"error: {one_line(str(error))}", *hint)


def _dispatch(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
        command = importlib.import_module(f"planner.commands.{args.command}")
        code: int = command.run(args)
    finally:
        settle(sys.stdout)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code. `argv` without the program's name; None reads `sys.argv`."""
    reopen_closed()
    debug = "--debug" in (sys.argv if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return _dispatch(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except Exception as error:
        if debug:
            raise
        shown = _as_shown(error)
        report(shown)
        return shown.exit_code


def _as_shown(error: Exception) -> FitwrightError:
    """Any error as one that can be shown in a line."""
    if isinstance(error, FitwrightError):
        return error
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return FitwrightError(f"{reason}: {error.filename}" if error.filename else reason)
    return FitwrightError(f"{DEFECT} ({type(error).__name__}: {error})", "--debug shows where")
