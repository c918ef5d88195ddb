"""A prompt in parts, traced on transformers' own code beside what is predicted."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from tracing import Storages

from planner.memory.infer import inference_memory
from planner.types import Strategy, Workload
from profiles.architecture import architecture

pytestmark = pytest.mark.executor
TOKENS = 1536
APART = ("weights", "library workspace")


@pytest.mark.parametrize("part", [0, 512, 256])
def test_most_bytes_beside_weights_while_a_prompt_is_read(part: int) -> None:
    """Grouped heads and a cache that grows: in parts, both are copied for the tokens before."""
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    config = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=512,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids, cache, step = torch.zeros((1, TOKENS), dtype=torch.long), DynamicCache(config=config), part or TOKENS
    with torch.no_grad(), Storages(*model.parameters(), *model.buffers(), ids) as count:
        for start in range(0, TOKENS, step):
            model(ids[:, start : start + step], past_key_values=cache, use_cache=True, logits_to_keep=1)
    work, how = Workload(prompt_tokens=TOKENS, new_tokens=1), Strategy(prefill_chunk_tokens=part)
    memory = inference_memory(architecture(config.to_dict()), work, how, 0)
    shots = [shot for shot in memory.snapshots if shot.moment == "prefill"]
    predicted = max(sum(line.bytes for line in shot.lines if line.name not in APART) for shot in shots)
    assert predicted == pytest.approx(count.peak, rel=0.04)
