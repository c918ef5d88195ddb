"""LoRA's tensors, counted by hand."""

from __future__ import annotations

import pytest
from memory_cases import known, tiny

from planner.memory.adapters import adapter_parameters, adapter_tensors, fuses_experts, is_target
from planner.types import Workload
from profiles.schema import Linear


def lora(**changes) -> Workload:
    return Workload(task="train", method="lora", **changes)


def test_tiny_llama() -> None:
    # r (in + out): q, o 128; k, v 96; gate, up, down 192; three layers
    one = 8 * (2 * 128 + 2 * 96 + 3 * 192)
    assert adapter_parameters(tiny(), lora()) == 3 * one
    assert adapter_parameters(tiny(), lora(lora_targets="attention")) == 3 * 8 * (2 * 128 + 2 * 96)


def test_tensors_of_equal_size_are_counted_together() -> None:
    # A of q, k, v, gate, up and B of q, o, down: 64 r; B of k, v: 32 r; A of o: 64 r; A of down, B of gate,
    # up: 128 r
    tensors = adapter_tensors(tiny(num_hidden_layers=1), 8, "all-linear", "lora")
    assert tensors == ((256, 2), (512, 9), (1024, 3))


def test_qwen25_7b() -> None:
    # r (in + out), 28 layers: q, o 7168; k, v 4096; gate, up, down 22528
    assert 8 * 28 * (2 * 7_168 + 2 * 4_096 + 3 * 22_528) == 20_185_088
    assert adapter_parameters(known("qwen2.5-7b"), lora()) == 20_185_088
    assert adapter_parameters(known("qwen2.5-7b"), lora(lora_targets="attention")) == 8 * 28 * 22_528


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_parameters_are_proportional_to_rank(rank: int) -> None:
    assert adapter_parameters(known("qwen2.5-7b"), lora(lora_rank=rank)) == 20_185_088 // 8 * rank


def test_dora_adds_a_magnitude_for_every_output() -> None:
    outputs = 28 * (3_584 + 512 + 512 + 3_584 + 18_944 + 18_944 + 3_584)
    assert adapter_parameters(known("qwen2.5-7b"), lora(lora_variant="dora")) == 20_185_088 + outputs


def test_rank_stabilized_lora_is_lora() -> None:
    assert adapter_parameters(tiny(), lora(lora_variant="rslora")) == adapter_parameters(tiny(), lora())


@pytest.mark.parametrize(
    ("name", "all_linear", "attention"),
    [
        ("self_attn.q_proj", True, True),
        ("attention.wqkv", True, True),
        ("mlp.down_proj", True, False),
        ("mamba.out_proj", True, False),
        ("attn_gate", True, False),  # a linear's own name says nothing about where it sits
    ],
)
def test_targets(name: str, all_linear: bool, attention: bool) -> None:
    linear = Linear(name, 8, 8)
    assert is_target(linear, "all-linear", False) is all_linear
    assert is_target(linear, "attention", False) is attention


@pytest.mark.parametrize("name", ["mlp.gate", "mlp.shared_experts.up_proj", "mlp.down_proj", "experts.0.w1"])
def test_linears_called_like_experts_are_left_alone_where_experts_are_fused(name: str) -> None:
    assert is_target(Linear(name, 8, 8), "all-linear", False)
    assert not is_target(Linear(name, 8, 8), "all-linear", True)


def test_fused_experts_get_no_adapters() -> None:
    routed = tiny(
        model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
    )
    assert fuses_experts(routed) and not fuses_experts(tiny())
    assert adapter_parameters(routed, lora()) == adapter_parameters(tiny(), lora(lora_targets="attention"))
