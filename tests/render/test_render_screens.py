"""Screens as text: whole screens at 80 and 140 columns against golden files, and what colour may not carry.

FITWRIGHT_UPDATE=1 rewrites the golden files.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from render_fakes import (
    INFER,
    MODEL,
    NF4,
    QLORA,
    TRAIN,
    estimate,
    live_machine,
    on_card,
    plan,
    survey,
    without_card,
)
from rich.console import Console

from planner.estimate import architecture_of
from planner.machine import machine_from_gpus
from planner.memory.weights import stored_as
from planner.render import describe
from planner.render.check import print_check
from planner.render.estimate import print_estimate
from planner.render.machine import print_machine
from planner.render.plan import print_plan
from planner.types import Machine, Strategy, Workload
from profiles.catalogue import load_model
from profiles.hardware import load_gpu

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURE = describe.architecture(architecture_of(MODEL))
RTX = machine_from_gpus([(load_gpu("rtx-3090"), 1)])

SCREENS: dict[str, Callable[[Console], None]] = {
    "check_one_card": lambda out: print_check(out, survey(on_card("rtx-3090")), ARCHITECTURE),
    "check_three_cards": lambda out: print_check(
        out, survey(*map(on_card, ("rtx-3090", "rtx-4060-8gb", "h200"))), ARCHITECTURE
    ),
    "check_no_card": lambda out: print_check(out, survey(without_card()), ARCHITECTURE),
    "estimate_train": lambda out: print_estimate(
        out, estimate(9.9, "fits", 832.2, train=True), RTX, TRAIN, QLORA
    ),
    "estimate_cost": lambda out: print_estimate(
        out, estimate(9.9, "fits", 832.2, train=True), RTX, replace(TRAIN, train_tokens=10**8), QLORA
    ),
    "estimate_no_speed": lambda out: print_estimate(
        out, estimate(26.1, "does_not_fit", None), RTX, INFER, NF4
    ),
    "plan": lambda out: print_plan(out, plan()),
    "machine": lambda out: print_machine(out, live_machine()),
    "machine_without_anything": lambda out: print_machine(out, Machine(notes=("no NVIDIA driver",))),
}


def drawn(name: str, width: int, *, colour: bool = False) -> str:
    out = Console(
        file=io.StringIO(),
        width=width,
        color_system="truecolor" if colour else None,
        force_terminal=colour,
        highlight=False,
        emoji=False,
        markup=False,
    )
    SCREENS[name](out)
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines()) + "\n"


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("name", SCREENS)
def test_screen(name: str, width: int) -> None:
    file = GOLDEN / f"{name}_{width}.txt"
    got = drawn(name, width)
    if os.environ.get("FITWRIGHT_UPDATE"):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(got)
    assert got == file.read_text()
    assert max(map(len, got.splitlines())) <= width


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("name", SCREENS)
def test_nothing_is_cut(name: str, width: int) -> None:
    """Where columns do not fit each row is a block, a line for each column."""
    wide, narrow = drawn(name, 140), drawn(name, width)
    assert "…" not in narrow and max(map(len, narrow.splitlines())) <= width
    words = {word for word in wide.split() if len(word) < 25 and "─" not in word}
    assert not words - set(narrow.split())


def test_colour_adds_no_words() -> None:
    import re

    for name in SCREENS:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", drawn(name, 80, colour=True))
        assert [line.rstrip() for line in plain.splitlines()] == drawn(name, 80).splitlines()


def test_a_name_cannot_colour_or_reverse_the_screen() -> None:
    assert "\u202e" not in drawn("machine", 80)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("qwen2.5-7b", "28 layers x 3584, GQA 28/4, vocabulary 152064"),
        ("gemma-2-9b", "sliding-window attention of 4096"),
        ("mixtral-8x7b-v0.1", "8 experts (2 used)"),
        ("deepseek-v3", "latent attention"),
    ],
)
def test_architecture_in_a_line(model: str, words: str) -> None:
    assert words in describe.architecture(architecture_of(load_model(model)))


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (Workload(), "generate 256 tokens after 1024, batch 1"),
        (Workload(concurrency=4), "batch 1 x 4"),
        (Workload(task="train"), "QLoRA (r=8, all-linear) on 1 x 2048 tokens"),
        (Workload(task="train", method="full", batch_size=3), "full fine-tuning on 3 x 2048 tokens"),
    ],
)
def test_job_in_a_line(work: Workload, words: str) -> None:
    assert words in describe.job(work)


def test_strategy_in_a_line_names_every_departure() -> None:
    how = Strategy(
        quant="nf4",
        dtype="fp16",
        placement="mixed_offload",
        engine="accelerate",
        gradient_checkpointing=False,
        activation_offload=True,
        loss="fused",
        kernels="liger",
        attention="eager",
    )
    line = describe.strategy(how, TRAIN)
    words = "NF4 weights, fp16 compute, card + RAM, accelerate, no checkpointing, fused, liger, eager"
    assert all(word in line for word in words.split(", "))


@pytest.mark.parametrize(
    ("model", "how", "says"),
    [
        ("qwen3-30b-a3b", Strategy(quant="nf4"), "NF4 weights, experts bf16, bf16 compute"),
        ("qwen3-30b-a3b", Strategy(quant="nf4", quant_experts="nf4"), "NF4 weights, experts NF4, bf16"),
        ("qwen3-30b-a3b", Strategy(), "bf16 weights, all on the card"),
        ("qwen2.5-7b", Strategy(quant="nf4"), "NF4 weights, bf16 compute"),
    ],
)
def test_what_experts_are_stored_as_is_said(model: str, how: Strategy, says: str) -> None:
    """Fused ones stay as they are under `--quant nf4`, and are most of the bytes."""
    profile = load_model(model)
    arch = architecture_of(profile)
    assert describe.strategy(how, INFER, arch).startswith(says)
    assert ("experts bf16" in stored_as(arch, how)) == ("experts bf16" in says)
