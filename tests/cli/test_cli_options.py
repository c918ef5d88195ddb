"""Options: their names are frozen, their values are checked one by one, and each wrong one is one line."""

from __future__ import annotations

import argparse

import pytest

from planner import request
from planner.cli import build_parser
from planner.errors import BadOption, FitwrightError
from planner.types import Strategy, Workload

HARDWARE = {"--gpu", "--vram", "--reserve", "--ram", "--disk", "--machine"}
INFER = {"--prompt-tokens", "--new-tokens", "--concurrency", "--cache"}
LORA = {f"--lora-{name}" for name in ("rank", "alpha", "targets", "dropout", "variant")}
TRAIN = {"--method", "--seq-len", "--gradient-accumulation-steps", "--train-tokens", "--adapter-dtype"}
JOB = {"--task", "--batch-size"} | INFER | TRAIN | LORA
PRECISION = {"--dtype", "--quant", "--quant-experts"}
CHECKPOINTING = {"--gradient-checkpointing", "--no-gradient-checkpointing", "--activation-offload"}
KERNELS = {"--attention", "--loss", "--kernels", "--optimizer", "--upcast-frozen"}
SPECULATION = {"--speculate", "--draft"}
STRATEGY = PRECISION | CHECKPOINTING | KERNELS | SPECULATION | {"--placement", "--engine", "--no-ledger"}
COMMON = {"-h", "--help", "--json", "--debug"}
FROZEN = {
    "check": COMMON | HARDWARE | JOB | STRATEGY | {"--offline", "--prefer"},
    "plan": COMMON | HARDWARE | JOB | STRATEGY | {"--offline", "--prefer", "-o", "--output"},
    "estimate": COMMON | HARDWARE | JOB | STRATEGY | {"--offline", "--exact"},
    "explain": COMMON | HARDWARE | JOB | STRATEGY | {"--offline", "--exact"},
    "models": COMMON | HARDWARE | JOB,
    "gpus": COMMON,
    "inspect": COMMON,
}


def subparsers() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    found = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def test_commands_are_frozen() -> None:
    assert set(subparsers()) == set(FROZEN)


@pytest.mark.parametrize("command", sorted(FROZEN))
def test_options_are_frozen(command: str) -> None:
    """An option added in passing is an option kept for ever: add it to the contract first, then here."""
    options = {option for action in subparsers()[command]._actions for option in action.option_strings}
    assert options == FROZEN[command]


@pytest.mark.parametrize("command", sorted(FROZEN))
def test_every_option_has_help(command: str) -> None:
    assert all(action.help for action in subparsers()[command]._actions)


def parsed(*argv: str) -> argparse.Namespace:
    return build_parser().parse_args(["estimate", "m", *argv])


def test_defaults_are_those_of_the_types() -> None:
    assert request.workload(parsed()) == Workload()
    assert request.workload(parsed("--task", "train")) == Workload(task="train")
    assert request.wishes(parsed()) == {}


def test_values_reach_the_types() -> None:
    args = parsed(
        *[
            "--task",
            "train",
            "--method",
            "lora",
            "--seq-len",
            "4096",
            "--batch-size",
            "2",
            "--lora-rank",
            "64",
            "--lora-dropout",
            "0",
        ],
        *[
            "--dtype",
            "fp16",
            "--no-gradient-checkpointing",
            "--optimizer",
            "sgd",
            "--loss",
            "fused",
            "--engine",
            "auto",
        ],
    )
    job = request.workload(args)
    assert job == Workload(
        task="train", method="lora", seq_len=4096, batch_size=2, lora_rank=64, lora_dropout=0.0
    )
    assert request.wishes(args) == {
        "dtype": "fp16",
        "gradient_checkpointing": False,
        "optimizer": "sgd",
        "loss": "fused",
    }
    assert Strategy(**request.wishes(args)).optimizer == "sgd"


@pytest.mark.parametrize(
    "argv",
    [
        "--batch-size 0",
        "--batch-size -1",
        "--batch-size 1.5",
        "--batch-size 1e3",
        "--batch-size 99999999999",
        "--prompt-tokens nan",
        "--new-tokens 0",
        "--task train --seq-len -5",
        "--task train --seq-len 1000000000000000",
        "--task train --seq-len " + "9" * 5000,
        "--task train --lora-dropout 1",
        "--task train --lora-dropout nan",
        "--task train --lora-dropout -0.1",
        "--task train --lora-rank 0",
        "--task train --optimizer nope",
        "--task sing",
        "--dtype int3",
        "--vram 24",
        "--vram nan",
        "--vram -3GiB",
        "--vram=-3GiB",
        "--vram 0GiB",
        "--vram 1e400GiB",
        "--vram " + "9" * 400 + "GiB",
        "--reserve 0",
        "--reserve 0EiB",
        "--reserve=-1GiB",
        "--ram infGiB",
        "--gpux",
        "--gpu",
        "--task",
        "extra",
        "--prompt-tokens 90000000 --batch-size 900000",
        "--seq-len 4096",
        "--task infer --method lora",
        "--task train --concurrency 3",
        "--task train --cache static",
        "--speculate draft",
        "--draft qwen2.5-0.5b",
    ],
)
def test_a_wrong_option_is_one_clear_error(argv: str) -> None:
    with pytest.raises(FitwrightError) as caught:
        args = parsed(*argv.split(" "))
        request.workload(args)
        request.wishes(args)
    assert caught.value.exit_code == 2
    assert str(caught.value) and len(str(caught.value)) < 1000


def test_a_card_without_a_display_may_reserve_nothing() -> None:
    (card,) = request.machine(parsed("--reserve", "0GiB"), "rtx-3090").gpus
    assert card.reserve_bytes == 0 and request.machine(parsed(), "rtx-3090").gpus[0].reserve_bytes > 0


def test_the_error_names_the_option() -> None:
    with pytest.raises(BadOption, match=r"--batch-size.*'0' is not a whole number from 1"):
        parsed("--batch-size", "0")
    with pytest.raises(BadOption, match="--seq-len belongs to --task train"):
        request.workload(parsed("--seq-len", "4096"))
    with pytest.raises(BadOption, match="--kernels belongs to --task train"):
        request.workload(parsed("--task", "infer", "--kernels", "liger"))


def test_options_are_not_abbreviated() -> None:
    with pytest.raises(BadOption):
        parsed("--prompt", "5")
