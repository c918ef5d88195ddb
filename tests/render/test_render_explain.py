"""The screen of `planner explain` at 80 and 140 columns against golden files.

FITWRIGHT_UPDATE=1 rewrites them. Every number is chosen here, so a screen changes only when its code does.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from render_fakes import INFER, MODEL, QLORA, TRAIN
from rich.console import Console

from planner.anatomy import CacheRate, LayerBytes, WeightGroup
from planner.explain import CardExplanation, ExplainedLine, Explanation, MomentBar, Rates, Step
from planner.machine import machine_from_gpus
from planner.render.explain import print_explanation
from planner.types import ModelRef, Strategy
from planner.units import GIB, MIB
from profiles.hardware import load_gpu

GOLDEN = Path(__file__).parent / "golden"
RTX = machine_from_gpus([(load_gpu("rtx-3090"), 1)])


def line(name: str, gib: float, arithmetic: str, basis: str = "counted", source: str | None = None):
    return ExplainedLine(name, int(gib * GIB), gib / 9, arithmetic, basis, source)


CARD = CardExplanation(
    index=0,
    peak_moment="loss",
    why="loss: 5.5 GiB are there all the time, and logits and loss comes on top with 3.5 GiB; the next "
    "largest moment, backward, holds 2.5 GiB less",
    moments=(
        MomentBar("load", int(5.2 * GIB), 0.58),
        MomentBar("loss", 9 * GIB, 1.0),
        MomentBar("backward", int(6.5 * GIB), 0.72),
        MomentBar("optimizer_step", int(5.4 * GIB), 0.6),
    ),
    lines=(
        line("weights", 5.17, "28 layers + embeddings + head, frozen, nf4: the sum of the groups below"),
        line(
            "library workspace", 0.06, "cuBLAS: 2 x 32 MiB", "measured", "steady minus loaded bytes, one card"
        ),
        line("logits and loss", 3.5, "3.02 float32 copies of the logits, each 2048 tokens x 152064 x 4 B"),
    ),
    steps=(
        Step("allocated peak", 9 * GIB, 9 * GIB, 9 * GIB, "the lines above", "counted"),
        Step("allocator, margin", -GIB // 10, GIB // 4, GIB // 2, "holes between blocks", "modelled"),
        Step("context", GIB // 2, GIB // 2, GIB // 2, "52 runs on one card", "measured"),
    ),
    low_bytes=int(9.4 * GIB),
    process_bytes=int(9.75 * GIB),
    high_bytes=10 * GIB,
    budget_bytes=int(23.5 * GIB),
    budget_basis="nvidia-smi total 24 GiB, minus 512 MiB for the display",
)
GROUPS = (
    WeightGroup("embeddings", 545_000_000, int(1.015 * GIB), "bf16"),
    WeightGroup("attention", 822_000_000, int(0.395 * GIB), "nf4"),
    WeightGroup("experts", 5_700_000_000, int(2.74 * GIB), "32 a layer, 4 used; nf4"),
    WeightGroup("head", 0, 0, "shares the embedding's weight"),
)
CACHE = CacheRate(56 * 1024, {4096: 14}, 3 * MIB, "28 layers x (512 + 512) x 2 B")


def explanation(rates: Rates) -> Explanation:
    return Explanation(
        model=ModelRef(MODEL.id, MODEL.parameters),
        verdict="fits",
        reasons=("card 0 needs what it needs, has 23.50 GiB: some of it to spare, as this line says",),
        cards=(CARD,),
        weights=GROUPS,
        rates=rates,
        host=(line("process", 1.2, "Python, torch and libraries", "measured", "13 jobs on one machine"),),
    )


TRAINED = Rates(
    cache=CACHE,
    layers=(LayerBytes(28, "full", 14 * MIB, 549 * MIB, 339 * MIB, 744 * MIB),),
    logits_copy_bytes=int(1.16 * GIB),
    logits_copies=3.02,
    trained_parameters=20_185_088,
    optimizer_bytes_per_parameter=0.78,
    managed_bytes_per_parameter=1.26,
)
GENERATED = Rates(
    cache=CACHE,
    layers=(
        LayerBytes(14, "sliding of 4096", 14 * MIB, 0, 339 * MIB, 0),
        LayerBytes(14, "full", 14 * MIB, 0, 400 * MIB, 0),
    ),
    logits_copy_bytes=594 * 1024,
)
SCREENS = {
    "explain_train": lambda out: print_explanation(out, explanation(TRAINED), RTX, TRAIN, QLORA),
    "explain_infer": lambda out: print_explanation(out, explanation(GENERATED), RTX, INFER, Strategy()),
}


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("name", SCREENS)
def test_screen(name, width):
    file = io.StringIO()
    SCREENS[name](
        Console(file=file, width=width, color_system=None, highlight=False, emoji=False, markup=False)
    )
    text = "\n".join(row.rstrip() for row in file.getvalue().splitlines()) + "\n"
    assert all(len(row) <= width for row in text.splitlines())
    golden = GOLDEN / f"{name}_{width}.txt"
    if os.environ.get("FITWRIGHT_UPDATE"):
        golden.write_text(text)
    assert text == golden.read_text()
