"""On a real card: every cache, prompts in parts and speculation, streamed and resident, bit by bit."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.executor]
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "streaming"))
NAME, NEW = "qwen2.5-0.5b", 12


@pytest.fixture(scope="module")
def equality() -> Any:
    """The program of the comparisons, which loads by either engine."""
    import equality

    return equality


def generate(equality: Any, engine: Any, quant: str, kept: int | None, how: Any) -> Any:
    """Logits of tokens after a prompt that repeats itself, as a strategy says."""
    import torch

    from executor.caches import Caches
    from executor.chunked_prefill import chunked_prefill
    from executor.speculation.assisted import SETTINGS, speculation_of

    loaded = equality.load(engine, NAME, quant, kept)
    model, device = loaded.model, equality.DEVICE
    ids = torch.randint(0, 1000, (1, 60), generator=torch.Generator().manual_seed(0)).repeat(1, 5).to(device)
    mask = torch.ones_like(ids)
    caches = Caches(model, how, device, ids.shape[1] + NEW, streamed=loaded.layers_streamed > 0)
    speculation = speculation_of(model, how, None)
    more = SETTINGS if speculation else {}
    guesses = speculation.attached() if speculation else nullcontext()
    with (
        torch.no_grad(),
        chunked_prefill(model, how.prefill_chunk_tokens),
        guesses,
        caches.open(mask) as given,
    ):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True, **more, **given,
        )  # fmt: skip
    counts = speculation.counts if speculation else None
    result = (out.sequences.cpu(), [logits.cpu() for logits in out.logits], counts)
    loaded.close()
    return result


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize(
    "how",
    [
        {"cache": "offloaded"},
        {"cache": "quantized"},
        {"prefill_chunk_tokens": 128},
        {"speculate": "lookup"},
        {"speculate": "lookup", "cache": "offloaded", "prefill_chunk_tokens": 128},
    ],
)
def test_streamed_equals_resident(equality: Any, quant: str, how: dict[str, Any]) -> None:
    from executor.engines import resident, stream
    from planner.types import Strategy

    strategy = Strategy(**how)
    want = generate(equality, resident, quant, None, strategy)
    got = generate(equality, stream, quant, 8, strategy)
    assert bool((got[0] == want[0]).all())
    assert all(bool((a == b).all()) for a, b in zip(got[1], want[1], strict=True))
    assert got[2] == want[2]


def test_offloaded_cache_gives_the_bits_of_one_on_the_card(equality: Any) -> None:
    from executor.engines import stream
    from planner.types import Strategy

    there, away = (
        generate(equality, stream, "nf4", 8, Strategy(cache=cache))  # type: ignore[arg-type]
        for cache in ("dynamic", "offloaded")
    )
    assert all(bool((a == b).all()) for a, b in zip(there[1], away[1], strict=True))
