"""`executor`: carry out a plan, rehearse it with random weights, or see both at work on a tiny model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from executor.errors import BadOption, FitwrightError
from executor.options import LEARNING_RATE, RunOptions
from planner.options import MOST_TOKENS
from planner.streams import reopen_closed, settle, tell

ENGINES = ("resident", "accelerate", "stream")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
MOST_STEPS = 10**9
LARGEST_SEED = 2**32 - 1
"""numpy's generator, which transformers seeds as well, takes 32 bits."""


class _Parser(argparse.ArgumentParser):
    """Bad usage reads like every other error: one line, exit 2."""

    def error(self, message: str) -> NoReturn:
        raise BadOption(message, f"see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; returns the exit code."""
    reopen_closed()
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):  # stderr never fails on a letter, stdout would
        sys.stdout.reconfigure(errors="replace")
    try:
        return _dispatch(argv)
    except FitwrightError as error:
        if debug and error.exit_code == 2:
            raise
        _tell(str(error), error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        tell("error: interrupted")
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        # the parts name their own failures; what is left is a terminal or file that takes no more
        if debug:
            raise
        tell(f"error: cannot print: {error.strerror}")
        return 2
    except Exception as error:
        if debug:
            raise
        from executor.run import DEFECT

        _tell(f"{DEFECT} ({type(error).__name__}: {error})", "--debug shows where")
        return 2


def _tell(error: str, hint: str | None) -> None:
    """A line each: names of files may hold what a terminal would obey."""
    from planner.render.text import one_line

    tell(f"error: {one_line(error)}", *([f"hint: {one_line(hint)}"] if hint else []))


def _dispatch(argv: Sequence[str] | None) -> int:
    try:
        args = parser().parse_args(argv)
        return int(args.command(args))
    finally:
        settle(sys.stdout)


def parser() -> argparse.ArgumentParser:
    """The command line of `executor`."""
    top = _Parser(prog="executor", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for name, text in (
        ("run", "carry out a plan: generate text or fine-tune"),
        ("rehearse", "the plan with random weights in the real shapes: memory and speed before any download"),
    ):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        _add_run_options(sub, rehearse=name == "rehearse")
        sub.set_defaults(command=_run, rehearse=name == "rehearse")
    _add_probe(commands)
    _add_report(commands)
    _add_merge(commands)
    _add_pack(commands)
    quick = commands.add_parser(
        "quickstart",
        help="check, plan and fine-tune a tiny built-in model: no downloads, no GPU needed",
        allow_abbrev=False,
    )
    quick.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where to leave the files (default: a new temporary folder)",
    )
    _add_debug(quick)
    quick.set_defaults(command=_quickstart)
    return top


def _add_probe(commands: Any) -> None:
    text = "measure this machine's link, memory, arithmetic and disk once; the planner uses it from then on"
    p = commands.add_parser("probe", help=text, description=text, allow_abbrev=False)
    p.add_argument(
        "--folder", type=Path, metavar="DIR", help="test the disk of this folder (default: the current one)"
    )
    _add_json(p, "the result as JSON")
    _add_debug(p)
    p.set_defaults(command=_probe)


def _add_report(commands: Any) -> None:
    text = "predicted against measured: of one run, or of every run on this machine"
    p = commands.add_parser("report", help=text, description=text, allow_abbrev=False)
    p.add_argument(
        "run_dir", type=Path, nargs="?", metavar="RUN_DIR", help="the --output folder of a run (default: all)"
    )
    _add_json(p, "JSON")
    _add_debug(p)
    p.set_defaults(command=_report)


def _add_merge(commands: Any) -> None:
    text = "fold a run's adapter into its base: a standalone model in the base's own dtype"
    p = commands.add_parser("merge", help=text, description=text, allow_abbrev=False)
    p.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the --output folder of a run")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the new model's folder")
    p.add_argument(
        "--base", type=Path, metavar="DIR", help="the base model's folder (default: where the run had it)"
    )
    _add_remote_code(p)
    _add_json(p, "the result as JSON")
    _add_debug(p)
    p.set_defaults(command=_merge)


def _add_pack(commands: Any) -> None:
    text = "quantize a model once and lay it out in a slab file that engine stream loads at the disk's speed"
    p = commands.add_parser("pack", help=text, description=text, allow_abbrev=False)
    p.add_argument("model", metavar="MODEL", help="catalogue id, Hub name, or a folder with the weights")
    p.add_argument(
        "--quant", choices=("nf4", "int8", "none"), help="precision (default: the checkpoint's own, else nf4)"
    )
    p.add_argument("--quant-experts", choices=("none", "nf4"), default="none", help="of routed experts")
    p.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="compute dtype (default: bf16 where the card has it)",
    )
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the slab file (default: beside the weights; runs find it anywhere)",
    )
    p.add_argument("--offline", action="store_true", help="never use the network")
    _add_remote_code(p)
    _add_json(p, "the result as JSON")
    _add_debug(p)
    p.set_defaults(command=_pack)


def _add_json(p: argparse.ArgumentParser, what: str) -> None:
    p.add_argument("--json", action="store_true", help=f"print {what} and nothing else on stdout")


def _add_debug(p: argparse.ArgumentParser) -> None:
    p.add_argument("--debug", action="store_true", help="tracebacks and the libraries' own messages")


def _add_remote_code(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )


def _add_run_options(p: argparse.ArgumentParser, rehearse: bool) -> None:
    p.add_argument("plan", type=Path, metavar="PLAN", help="plan.json, as `planner plan -o` writes it")
    p.add_argument(
        "--output", type=Path, metavar="DIR", help="where the run leaves its files (default: under ./runs)"
    )
    p.add_argument(
        "--candidate", type=_whole(1), metavar="N", help="only this candidate of the plan (1 is the best)"
    )
    p.add_argument("--engine", choices=ENGINES, help="in place of the candidate's engine")
    p.add_argument(
        "--resident-layers", type=_whole(0), metavar="N", help="layers kept on the card (engine stream)"
    )
    p.add_argument(
        "--vram-cap", type=_size, metavar="SIZE", help="run as if the card had this much memory, like 8GiB"
    )
    p.add_argument(
        "--seed",
        type=_whole(0, LARGEST_SEED),
        default=0,
        metavar="N",
        help="seed of every random number (default 0)",
    )
    p.add_argument("--offline", action="store_true", help="never use the network")
    p.add_argument(
        "--deterministic", action="store_true", help="deterministic kernels on the card (slower, more memory)"
    )
    p.add_argument(
        "--no-preflight",
        dest="preflight",
        action="store_false",
        help="try even what this machine has no room for now",
    )
    p.add_argument(
        "--pack",
        action="store_true",
        help="write a slab file first, where there is none, and load from it (engine stream)",
    )
    p.add_argument("--restart", action="store_true", help="forget an earlier run in DIR and begin again")
    _add_remote_code(p)
    _add_json(p, "the report as JSON")
    _add_debug(p)
    _add_inference_options(p.add_argument_group("generation"), rehearse)
    _add_training_options(p.add_argument_group("training"), rehearse)


def _add_inference_options(p: argparse._ArgumentGroup, rehearse: bool) -> None:
    if not rehearse:
        p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt (repeatable)")
        p.add_argument(
            "--prompts", type=Path, metavar="FILE", help='JSONL of {"prompt": ...} or {"messages": [...]}'
        )
    p.add_argument(
        "--max-new-tokens", type=_whole(1, MOST_TOKENS), metavar="N", help="in place of the plan's new tokens"
    )
    p.add_argument("--greedy", action="store_true", help="always the likeliest token")
    p.add_argument("--temperature", type=_number(0.0, 100.0), metavar="X", help="sample at this temperature")
    p.add_argument(
        "--top-p", type=_number(0.0, 1.0), metavar="X", help="sample among the likeliest X of probability"
    )


def _add_training_options(p: argparse._ArgumentGroup, rehearse: bool) -> None:
    p.add_argument(
        "--max-steps", type=_whole(1, MOST_STEPS), metavar="N", help="stop after this many optimizer steps"
    )
    p.add_argument(
        "--learning-rate",
        type=_number(0.0, 1000.0, above=True),
        metavar="X",
        help="peak rate (default: {lora:g}; method full: {full:g})".format(**LEARNING_RATE),
    )
    if rehearse:
        return
    p.add_argument(
        "--dataset", type=Path, metavar="FILE", help="JSONL of messages, of prompt and completion, or of text"
    )
    p.add_argument(
        "--lr-schedule", choices=SCHEDULES, default="linear", help="how the rate falls (default linear)"
    )
    p.add_argument(
        "--warmup-ratio",
        type=_number(0.0, 1.0),
        default=0.0,
        metavar="X",
        help="part of the steps to warm up",
    )
    p.add_argument(
        "--epochs",
        type=_number(0.0, 1e6, above=True),
        default=1.0,
        metavar="X",
        help="passes over the data (default 1)",
    )
    p.add_argument(
        "--save-steps",
        type=_whole(1, MOST_STEPS),
        metavar="N",
        help="steps between checkpoints (default: a tenth)",
    )
    p.add_argument(
        "--eval-split",
        type=_number(0.0, 0.9),
        default=0.0,
        metavar="X",
        help="part of the rows held out; their loss is taken with each checkpoint",
    )
    p.add_argument(
        "--packing",
        action="store_true",
        help="several rows in one sequence, kept apart by the attention mask",
    )
    p.add_argument(
        "--report-to", choices=("none", "tensorboard"), default="none", help="where losses are logged too"
    )


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"must be {bounds}")
        return value

    read.__name__ = "whole number"  # argparse calls what it cannot read an "invalid whole number value"
    return read


def _number(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not low <= value <= high or (above and value == low):  # nan is neither
            bounds = f"above {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}")
        return value

    read.__name__ = "number"
    return read


def _size(text: str) -> int:
    from planner.units import parse_size

    return parse_size(text)


def _run(args: argparse.Namespace) -> int:
    given = {k: v for k, v in vars(args).items() if k not in {"command", "prompt", "prompts", "vram_cap"}}
    options = RunOptions(
        **given,
        prompts=tuple(getattr(args, "prompt", ())),
        prompts_file=getattr(args, "prompts", None),
        vram_cap_bytes=args.vram_cap,
    )
    from executor.run import run

    return run(options)


def _probe(args: argparse.Namespace) -> int:
    from executor.probe_command import probe

    return probe(args.folder, args.json, args.debug)


def _report(args: argparse.Namespace) -> int:
    from executor.report_command import report

    return report(args.run_dir, args.json)


def _merge(args: argparse.Namespace) -> int:
    from executor.merge import merge

    return merge(args.run_dir, args.output, args.base, args.trust_remote_code, args.json, args.debug)


def _pack(args: argparse.Namespace) -> int:
    from executor.pack_command import PackOptions, pack_command

    return pack_command(PackOptions(**{k: v for k, v in vars(args).items() if k != "command"}))


def _quickstart(args: argparse.Namespace) -> int:
    from executor.quickstart import quickstart

    return quickstart(args.output, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
