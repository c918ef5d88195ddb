"""Layers on disk and memory that the system does not lock, on a real card: still a resident model's bits."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.executor]
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "streaming"))

MODEL, LAYERS = "qwen2.5-0.5b", 24
JOB: dict[str, Any] = {"task": "infer"}


@pytest.fixture(scope="module")
def equality() -> Any:
    """The benchmark's program, whose comparisons these are."""
    import equality

    return equality


@pytest.fixture(scope="module")
def want(equality: Any) -> Any:
    """Logits of the resident model in NF4."""
    from executor.engines import resident

    return equality.logits(equality.load(resident, MODEL, "nf4", None))


def on_disk(equality: Any, folder: Path, in_ram: int) -> Any:
    """Engine stream with all but `in_ram` layers on disk."""
    import msgspec

    from executor.engines import stream
    from planner.placement import Tiers
    from planner.types import Workload

    asked = equality.request(MODEL, "nf4", 0, Workload(**JOB))
    places = Tiers(0, on_disk=LAYERS - in_ram).places(LAYERS)
    device_map = {f"model.layers.{number}": place for number, place in enumerate(places)}
    candidate = msgspec.structs.replace(asked.candidate, device_map=device_map)
    return stream.load(dataclasses.replace(asked, candidate=candidate, scratch=folder / "offload"))


def same(want: Any, got: Any) -> bool:
    return all(bool((a == b).all()) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("in_ram", [0, 8])
def test_logits_equal_resident(equality: Any, want: Any, tmp_path: Path, in_ram: int) -> None:
    loaded = on_disk(equality, tmp_path, in_ram)
    assert loaded.layers_on_disk == LAYERS - in_ram
    traffic = loaded.traffic
    assert same(want, equality.logits(loaded))
    assert traffic()["disk_bytes_read"] > 0


def test_a_buffer_stays_until_a_late_copy_has_read_it(
    equality: Any, want: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is far ahead of copies that wait on the card."""
    import torch

    from executor.streaming.link import CudaLink

    stock = CudaLink.send

    def late(link: Any, *arguments: Any) -> None:
        with torch.cuda.stream(link._stream):
            torch.cuda._sleep(20_000_000)
        stock(link, *arguments)

    monkeypatch.setattr(CudaLink, "send", late)
    assert same(want, equality.logits(on_disk(equality, tmp_path, 0)))


@pytest.mark.parametrize("bounce", [True, False])
def test_unlocked_memory(equality: Any, want: Any, monkeypatch: pytest.MonkeyPatch, bounce: bool) -> None:
    """From the fifth layer on the system locks nothing, or nothing but two small buffers."""
    from executor.engines import stream
    from executor.streaming import arena

    stock, sizes = arena.Arena._register, []  # type: ignore[var-annotated]

    def refusing(self: Any, block: Any) -> int:
        sizes.append(block.numel())
        small = block.numel() == 2 * arena.BOUNCE_BYTES
        return stock(self, block) if len(sizes) < 5 or (small and bounce) else 2

    monkeypatch.setattr(arena.Arena, "_register", refusing)
    monkeypatch.setattr(arena, "BOUNCE_BYTES", 2**20)
    loaded = equality.load(stream, MODEL, "nf4", 0)
    assert any("locks no more memory" in note for note in loaded.notes)
    assert loaded.pinned_bytes < sum(sizes[:4]) + 3 * 2**20
    assert same(want, equality.logits(loaded))
