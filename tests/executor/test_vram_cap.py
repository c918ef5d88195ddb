"""The allocator's cap under `--vram-cap`, with a made-up card."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from executor.errors import CannotHonour
from executor.vram_cap import GRANULE, PAGE, VramCap
from planner.plan import read_plan
from planner.units import GIB, MIB

pytestmark = pytest.mark.executor
DEVICE = torch.device("cuda", 0)
FOLDER = Path(__file__).parents[2] / "benchmarks" / "streaming"
TOTAL = 24 * GIB


class Card:
    """Tells the context of the process, which a test changes."""

    def __init__(self, context: int | None = 500 * MIB) -> None:
        self.context = context

    def context_bytes(self) -> int | None:
        """As `executor.card.Card` measures it."""
        return self.context


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What torch's allocator is told, in bytes."""
    shares: list[float] = []

    def set_share(share: float, *_: Any) -> None:
        shares.append(share * TOTAL)

    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_share)
    return shares


def test_context_a_page_and_what_is_reserved_stay_within_the_size(asked: list[float]) -> None:
    """The allocator takes whole pages: it may hold a page more than it is allowed."""
    card = Card()
    cap = VramCap(8 * GIB, card, DEVICE)  # type: ignore[arg-type]
    assert asked == [cap.allocator_bytes] and asked[0] + PAGE + card.context == 8 * GIB


@pytest.mark.parametrize(
    ("settings", "kept"), [("expandable_segments:False", 0), ("expandable_segments:True", PAGE)]
)
def test_without_expandable_segments_nothing_is_kept_back(
    settings: str, kept: int, asked: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default allocator holds what it takes against its cap, not what is asked for."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", settings)
    card = Card()
    VramCap(8 * GIB, card, DEVICE)  # type: ignore[arg-type]
    assert asked[0] + kept + card.context == 8 * GIB


def test_the_cap_follows_a_context_that_grows(asked: list[float]) -> None:
    card = Card()
    cap = VramCap(8 * GIB, card, DEVICE)  # type: ignore[arg-type]
    card.context = 900 * MIB
    cap.tighten()
    assert asked[0] - asked[1] == 400 * MIB
    card.context = 600 * MIB
    cap.tighten()
    assert len(asked) == 2, "a cap is not lifted again"


def test_managed_memory_to_come_is_kept_free_from_the_beginning(asked: list[float]) -> None:
    """The allocator fills its cap before the optimizer's first step: a 32B on 8 GiB had 61 MiB too much."""
    card = Card()
    cap = VramCap(8 * GIB, card, DEVICE, managed_bytes=80 * MIB)  # type: ignore[arg-type]
    assert asked == [8 * GIB - card.context - 80 * MIB - PAGE]
    card.context += 80 * MIB  # NVML counts it into the process
    cap.tighten(managed_bytes=80 * MIB)
    assert len(asked) == 1, "it came as foreseen"
    card.context += 20 * MIB
    cap.tighten(managed_bytes=100 * MIB)
    assert asked[0] - asked[1] == 20 * MIB, "more came than was foreseen"


def test_an_attempt_keeps_free_what_its_optimizer_will_page(asked: list[float]) -> None:
    """As its candidate's estimate has it."""
    from executor.attempt import Attempt

    plan = read_plan(FOLDER / "llama8b-qlora-2.5gib.plan.json")
    card: Any = SimpleNamespace(open=lambda *_: None, context_bytes=lambda: 500 * MIB)
    options: Any = SimpleNamespace(vram_cap_bytes=8 * GIB)
    parts: list[Any] = [None] * 4
    attempt = Attempt(plan, plan.candidates[0], options, *parts[:3], card, parts[3])
    attempt._open_card(DEVICE)
    paged = plan.candidates[0].estimate.gpus[0].managed_bytes
    assert paged > 0 and asked == [8 * GIB - 500 * MIB - paged - PAGE]


def test_there_is_a_cap_where_no_context_is_seen(asked: list[float]) -> None:
    """Where NVML names no processes, others that let go of memory hide ours."""
    VramCap(8 * GIB, Card(0), DEVICE)  # type: ignore[arg-type]
    assert asked == [8 * GIB - PAGE]


@pytest.mark.parametrize(
    ("size", "context", "says"),
    [
        (25 * GIB, 500 * MIB, "more than the card's 24 GiB"),
        (500 * MIB + PAGE + GRANULE, 500 * MIB, "leaves nothing beside the context"),
        (8 * GIB, None, "needs NVML"),
    ],
)
def test_caps_that_cannot_be_kept(size: int, context: int | None, says: str, asked: list[float]) -> None:
    with pytest.raises(CannotHonour, match=says):
        VramCap(size, Card(context), DEVICE)  # type: ignore[arg-type]
    assert asked == []
