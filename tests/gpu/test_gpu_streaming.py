"""Streamed layers on a real card: copies on their own stream, and still the bits of a resident model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.executor]
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "streaming"))


@pytest.fixture(scope="module")
def equality() -> Any:
    """The benchmark's program, whose comparisons these are."""
    import equality

    return equality


@pytest.mark.parametrize("kept", [0, 12])
@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_logits_equal_resident(equality: Any, quant: str, kept: int) -> None:
    from executor.engines import resident, stream

    name = "qwen2.5-0.5b"
    want = equality.logits(equality.load(resident, name, quant, None))
    got = equality.logits(equality.load(stream, name, quant, kept))
    assert all(bool((a == b).all()) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("mode", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_gradients_equal_resident(equality: Any, quant: str, mode: str) -> None:
    from executor.engines import resident, stream

    name = "qwen2.5-0.5b"
    want = equality.gradients(resident, name, quant, None, mode)
    got = equality.gradients(stream, name, quant, 0, mode)
    assert all(bool((a == b).all()) for a, b in zip(want, got, strict=True))


def test_slabs_are_page_locked_at_their_own_size_and_slots_are_all_the_card_holds(equality: Any) -> None:
    """No block is rounded up to a power of two, and passes leave the allocator alone."""
    import torch

    from executor.engines import stream

    loaded = equality.load(stream, "qwen2.5-0.5b", "none", 0)
    layer = sum(p.numel() * 2 for p in loaded.model.model.layers[0].parameters())
    assert 24 * layer <= loaded.pinned_bytes <= 1.03 * 24 * layer
    ids = torch.zeros((1, 4), dtype=torch.long, device=equality.DEVICE)
    with torch.no_grad():
        for _ in range(3):
            loaded.model(ids, use_cache=False)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["num_device_alloc"]
        loaded.model(ids, use_cache=False)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
    outer = sum(p.numel() * 2 for n, p in loaded.model.named_parameters() if ".layers." not in n)
    assert torch.cuda.memory_allocated() < 1.05 * (outer + 2 * layer) + 32 * 2**20
    loaded.close()


def test_a_pass_makes_the_host_wait_for_nothing(equality: Any) -> None:
    import torch

    from executor.engines import stream

    loaded = equality.load(stream, "qwen2.5-0.5b", "nf4", 6)
    ids = torch.zeros((1, 4), dtype=torch.long, device=equality.DEVICE)
    with torch.no_grad():
        loaded.model(ids, use_cache=False)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loaded.model(ids, use_cache=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loaded.traffic()["link_bytes_per_s"] > 1e9
    loaded.close()
