"""The tape against what real transformers modules allocate, storage by storage (see tracing.py).

Left out, with the cause:

* Prefill of DeepSeek and GLM-4 MoE: their routers hand on float32 weights, so the experts' weighted outputs
  are float32; the tape has them in the compute dtype. Heads of different size for keys and values (most
  latent attention) have no fused kernel on the CPU; here they are equal.
* GPT-OSS: attention sinks, biased and clamped experts, and attention weights that stay named through the
  feed-forward are not on the tape: a fifth too little in prefill. Mamba-2 and Kimi's delta attention: their
  torch fallbacks build tensors many times larger than the tape's scan.
* Models with LayerNorm (StarCoder 2, StableLM, Phi, GPT-NeoX): the CPU's autocast leaves it in bfloat16.
* Models whose attention drops out by default (Seed-OSS, GPT-2): the CPU then has no fused kernel.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.executor

tracing = pytest.importorskip("tracing", reason="needs the [executor] extra")

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
ROUTED = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
DELTA = {
    "num_hidden_layers": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
EXTRA = {
    "qwen3_moe": EXPERTS,
    "gemma3_text": {"sliding_window": 1024},
    "qwen3_5_text": DELTA,
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 192},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 192},
    "glm4_moe": ROUTED,
    "deepseek_v3": {
        **ROUTED, "num_key_value_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32, "v_head_dim": 48, "n_group": 2, "topk_group": 1, "head_dim": 16,
    },
}  # fmt: skip
DENSE = (
    "llama", "qwen2", "qwen3", "mistral", "granite", "gemma3_text", "olmo2", "exaone4", "glm4", "phi3",
)  # fmt: skip
JOBS = (("prefill", False), ("lora", False), ("lora", True), ("full", False), ("full", True))

CASES = (
    [
        tracing.Case(model_type, method, checkpointing, extra=EXTRA.get(model_type, {}))
        for model_type in (*DENSE, "qwen3_moe", "qwen3_5_text", "qwen3_next")
        for method, checkpointing in JOBS
    ]
    + [
        tracing.Case(model_type, method, checkpointing, extra=EXTRA[model_type])
        for model_type in ("qwen2_moe", "glm4_moe", "deepseek_v3")
        for method, checkpointing in (("lora", False), ("full", False), ("full", True))
    ]
    + [
        tracing.Case(model_type, method, checkpointing, attention="eager")
        for model_type in ("llama", "gemma2")
        for method, checkpointing in JOBS
    ]
)


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    """Small matrices gain nothing from more, and other tests may run beside these."""
    torch = tracing.torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tape_counts_what_the_module_allocates(case) -> None:
    traced, predicted = tracing.trace(case)
    assert predicted.forward == pytest.approx(traced.forward, rel=0.03)
    # the moment that decides whether a training job fits; a scan over chunks is followed less closely
    close = 0.03 if "linear_num_key_heads" in case.extra else 0.02
    assert predicted.backward == pytest.approx(traced.backward, rel=close)


def test_counting_sees_what_it_should() -> None:
    torch = tracing.torch
    weight = torch.zeros(1000)
    with tracing.Storages(weight) as count:
        a = torch.zeros(1024)  # 4096 B
        b = a.view(32, 32)  # the same storage
        c = weight + 1  # 4000 B, booked as 4096
        assert count.live == 8192
        del c
        assert count.live == 4096
        weight.add_(1)
        del a
        assert count.live == 4096  # b still holds it
        del b
    assert (count.live, count.peak) == (0, 8192)
