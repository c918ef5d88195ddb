"""The options of every command: names, bounds, help. Values become types of the planner in `planner.request`.

An option that was not given is `None` in the namespace, so that a command can tell a wish from a default;
the default shown in the help is applied by `planner.request`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from planner.units import parse_reserve, parse_size

MOST_TOKENS = 10**8
"""Longest sequence an estimate is made for: 100 times the longest context in the catalogue."""
MOST_SEQUENCES = 10**6
MOST_TOTAL_TOKENS = 10**15
_Type = Callable[[str], Any]


def whole(low: int, high: int) -> _Type:
    """A parser of whole numbers from `low` to `high`, both included."""

    def parse(text: str) -> int:
        try:
            number = int(text) if len(text) <= 40 else None
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {low} to {high}")
        return number

    return parse


def fraction(text: str) -> float:
    """A number from 0 (included) to 1 (not included)."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from 0 to below 1")
    return number


def optimizer(text: str) -> str:
    """A transformers `optim` name the estimator knows."""
    from planner.memory.optimizer import OPTIMIZERS

    if text not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not one of {', '.join(sorted(OPTIMIZERS))}")
    return text


_tokens = whole(1, MOST_TOKENS)
_sequences = whole(1, MOST_SEQUENCES)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every command."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON instead of tables")
    group.add_argument("--debug", action="store_true", help="show a traceback when something fails")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The MODEL argument and where it may be looked up."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="catalogue id (qwen2.5-7b), Hub name (ORG/NAME), or a folder or file with config.json",
    )
    parser.add_argument("--offline", action="store_true", help="never ask the Hugging Face Hub")


def add_machine(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Options that say which hardware is meant; without any, it is this machine."""
    group = parser.add_argument_group("hardware (default: this machine)")
    often = "; repeat to compare cards" if several else ""
    group.add_argument(
        "--gpu",
        metavar="GPU",
        action="append" if several else "store",
        help=f"card of the catalogue, with a count if several: rtx-3090, rtx-3090x2{often}",
    )
    group.add_argument(
        "--vram", metavar="SIZE", type=parse_size, help="memory of the card, like 24GiB; alone: memory only"
    )
    group.add_argument(
        "--reserve", metavar="SIZE", type=parse_reserve, help="card memory to leave free; 0GiB: none"
    )
    group.add_argument("--ram", metavar="SIZE", type=parse_size, help="host memory")
    group.add_argument("--disk", metavar="SIZE", type=parse_size, help="free disk space")
    group.add_argument("--machine", metavar="FILE", help="a machine saved by `planner inspect --json`")


def add_job(parser: argparse.ArgumentParser, *, task_help: str = "what to do (default: infer)") -> None:
    """Options that describe the job: what is generated or trained."""
    parser.add_argument("--task", choices=("infer", "train"), help=task_help)
    both = parser.add_argument_group("job")
    both.add_argument("--batch-size", metavar="N", type=_sequences, help="sequences at once (default: 1)")
    infer = parser.add_argument_group("inference")
    infer.add_argument(
        "--prompt-tokens", metavar="N", type=_tokens, help="tokens of the prompt (default: 1024)"
    )
    infer.add_argument("--new-tokens", metavar="N", type=_tokens, help="tokens to generate (default: 256)")
    infer.add_argument(
        "--concurrency", metavar="N", type=_sequences, help="batches served at once (default: 1)"
    )
    infer.add_argument(
        "--cache",
        choices=("dynamic", "static", "offloaded", "quantized"),
        help="kind of KV cache (default: dynamic)",
    )
    train = parser.add_argument_group("training")
    train.add_argument("--method", choices=("full", "lora", "qlora"), help="what is trained (default: qlora)")
    train.add_argument(
        "--seq-len", metavar="N", type=_tokens, help="tokens of a training sequence (default: 2048)"
    )
    train.add_argument(
        "--gradient-accumulation-steps",
        metavar="N",
        type=_sequences,
        help="batches per optimizer step (default: 1)",
    )
    train.add_argument(
        "--train-tokens",
        metavar="N",
        type=whole(1, MOST_TOTAL_TOKENS),
        help="tokens to train on, for the time it takes",
    )
    train.add_argument(
        "--lora-rank", metavar="N", type=whole(1, 65536), help="rank of the adapters (default: 8)"
    )
    train.add_argument(
        "--lora-alpha", metavar="N", type=whole(1, 10**6), help="scale of the adapters (default: 32)"
    )
    train.add_argument(
        "--lora-targets", choices=("all-linear", "attention"), help="adapted modules (default: all-linear)"
    )
    train.add_argument(
        "--lora-dropout", metavar="X", type=fraction, help="dropout before the adapters (default: 0.05)"
    )
    train.add_argument(
        "--adapter-dtype", choices=("fp32", "bf16"), help="dtype of the adapters (default: fp32)"
    )
    train.add_argument(
        "--lora-variant", choices=("lora", "dora", "rslora"), help="kind of adapter (default: lora)"
    )


def add_strategy(parser: argparse.ArgumentParser, *, searched: bool) -> None:
    """Options that fix how the job is carried out; `searched` ones are tried in turn when not given."""
    group = parser.add_argument_group("how it is carried out")
    tried = "tried in turn"

    def choice(name: str, values: tuple[str, ...], text: str, default: str) -> None:
        group.add_argument(name, choices=values, help=f"{text} (default: {default})")

    choice("--dtype", ("auto", "bf16", "fp16", "fp32"), "compute dtype", "auto: bf16 where the card has it")
    choice("--quant", ("none", "nf4", "int8"), "weights", tried if searched else "nf4 for qlora, else none")
    choice("--quant-experts", ("none", "nf4"), "fused experts of a mixture", tried if searched else "none")
    choice(
        "--placement",
        ("full_gpu", "mixed_offload", "disk_offload", "cpu"),
        "where the weights live",
        tried if searched else "full_gpu; cpu without a card",
    )
    choice("--engine", ("auto", "resident", "accelerate", "stream"), "what carries it out", "auto")
    choice("--attention", ("sdpa", "eager", "flash_attention_2"), "attention kernel", "sdpa")
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations in backward (default: on)",
    )
    group.add_argument(
        "--activation-offload", action="store_true", default=None, help="checkpoints to host memory"
    )
    group.add_argument(
        "--optimizer",
        metavar="NAME",
        type=optimizer,
        help="paged_adamw_8bit for qlora, else adamw_torch_fused",
    )
    choice("--loss", ("full", "fused"), "cross-entropy", "full: logits as transformers keeps them")
    choice("--kernels", ("torch", "liger"), "kernels", "torch")
    group.add_argument(
        "--upcast-frozen", action="store_true", default=None, help="peft's prepare_model_for_kbit_training"
    )
    choice("--speculate", ("none", "lookup", "draft"), "speculative decoding", "none")
    group.add_argument("--draft", metavar="MODEL", help="draft model of --speculate draft")
    group.add_argument(
        "--no-ledger", action="store_true", help="leave earlier measured runs out of the estimate"
    )
    if not searched:
        group.add_argument(
            "--exact",
            action="store_true",
            help="trace memory on transformers' own code, without weights or card: any architecture it knows,"
            " in seconds; needs the executor extra",
        )


def add_preference(parser: argparse.ArgumentParser) -> None:
    """What decides between ways that fit."""
    parser.add_argument(
        "--prefer",
        choices=("quality", "speed", "headroom"),
        help="what decides between ways that fit (default: quality)",
    )
