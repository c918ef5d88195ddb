"""Engine stream with each kind of cache: the bits of engine resident with the same one.

The offloaded cache moves over CUDA streams: `tests/gpu/test_gpu_speculation.py` compares it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from streaming_models import request, write_model

from executor.caches import Caches, bytes_of
from executor.engines import resident, stream
from planner.types import Strategy

pytestmark = pytest.mark.executor
NEW = 6


def generate(loaded: Any, cache: Any, prompt: int) -> Any:
    """Logits of six tokens after two prompts, the first padded, over the cache of a strategy."""
    ids = torch.randint(0, 256, (2, prompt), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    how = Strategy(placement="cpu", cache=cache)
    caches = Caches(loaded.model, how, torch.device("cpu"), prompt + NEW, streamed=loaded.layers_streamed > 0)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 258}
    with torch.no_grad(), caches.open(mask) as given:
        return loaded.model.generate(
            ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings, **given
        )


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized"])
def test_logits_and_cache_equal_resident(tmp_path: Path, kind: str, cache: str) -> None:
    """Prompts of more tokens than the quantized cache leaves unpacked."""
    source = write_model(tmp_path, kind)
    results = []
    for engine in (resident, stream):
        loaded = engine.load(request(source, resident=2))
        results.append(generate(loaded, cache, prompt=140))
        loaded.close()
    want, got = results
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    assert bytes_of(got.past_key_values) == bytes_of(want.past_key_values) > 0
