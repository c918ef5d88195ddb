"""Which linears adapters go on, on a small model of transformers' own code."""

from __future__ import annotations

import pytest

from planner.types import Strategy, Workload

torch = pytest.importorskip("torch", reason="needs the [executor] extra")
pytest.importorskip("peft", reason="needs the [executor] extra")

pytestmark = pytest.mark.executor

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def test_a_router_that_answers_with_a_tuple_is_left_alone() -> None:
    from transformers import AutoModelForCausalLM, PhimoeConfig

    from planner.exact.adapters import add_adapters

    model = AutoModelForCausalLM.from_config(PhimoeConfig(num_local_experts=4, **SMALL))
    adapted = add_adapters(model, Workload(task="train", method="lora"), Strategy())
    trained = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in trained} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    ids = torch.randint(0, 100, (1, 16))
    assert adapted(input_ids=ids, labels=ids, use_cache=False).loss.requires_grad
