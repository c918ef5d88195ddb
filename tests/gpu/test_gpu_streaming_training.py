"""Training through slots on a card: twenty steps bit-equal to resident ones, and a test that can fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.executor]
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "streaming"))


@pytest.fixture(scope="module")
def program() -> Any:
    """The benchmark's program, whose comparisons these are."""
    import training_equality

    return training_equality


@pytest.fixture(scope="module")
def bench(program: Any) -> Iterator[Any]:
    """Five layers of a 0.5B. Strictly deterministic: with warnings only, attention's backward is not."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield program.bench_of("qwen2.5-0.5b", 5)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_twenty_steps_equal_resident(program: Any, bench: Any, quant: str, kept: int) -> None:
    """Every way of checkpointing, on the card and in RAM, with no and every other layer resident."""
    assert program.compare(bench, quant, kept) == 0


def test_twenty_steps_with_the_vocabulary_in_ram_equal_resident(program: Any, bench: Any) -> None:
    assert program.vocabulary_outside(bench) == 0


@pytest.mark.parametrize(("quant", "mode"), [("nf4", "none"), ("nf4", "non-reentrant"), ("int8", "none")])
def test_stock_products_on_reused_slots_are_wrong(program: Any, bench: Any, quant: str, mode: str) -> None:
    """bitsandbytes' own product keeps the slot's memory: the first loss is right, the gradients are not. With
    ours, in the same slots in the same order, both are."""
    assert program.trap(bench, quant, mode) == 0
