"""Small models whose every byte can be worked out on paper."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from planner.types import Strategy, Workload
from profiles.architecture import architecture
from profiles.catalogue import load_model
from profiles.schema import Architecture, Attention, FeedForward, Layer, Linear, Norm

TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": False,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
"""D 64, F 128, H 4, K 2, E 16, V 1000, three layers."""


@lru_cache(maxsize=64)
def _arch(items: tuple[tuple[str, Any], ...]) -> Architecture:
    return architecture(dict(items))


def tiny(**changes: Any) -> Architecture:
    """`TINY_LLAMA` with other facts."""
    return _arch(tuple({**TINY_LLAMA, **changes}.items()))


@lru_cache(maxsize=64)
def known(name: str) -> Architecture:
    """A model of the catalogue."""
    return architecture(load_model(name).config)


def llama_layer() -> Layer:
    """One layer of `TINY_LLAMA`, written out."""
    attention = Attention(
        kind="full", heads=4, kv_heads=2, head_dim=16, value_dim=16,
        linears=(
            Linear("self_attn.q_proj", 64, 64), Linear("self_attn.k_proj", 64, 32),
            Linear("self_attn.v_proj", 64, 32), Linear("self_attn.o_proj", 64, 64),
        ),
    )  # fmt: skip
    mixer = FeedForward(
        kind="gated", intermediate=128,
        linears=(
            Linear("mlp.gate_proj", 64, 128), Linear("mlp.up_proj", 64, 128),
            Linear("mlp.down_proj", 128, 64),
        ),
    )  # fmt: skip
    return Layer(attention, mixer, (Norm("input_layernorm", 64), Norm("post_attention_layernorm", 64)))


def train(method: str = "lora", **changes: Any) -> Workload:
    """One micro-batch of 256 tokens, no dropout."""
    facts: dict[str, Any] = {"seq_len": 256, "batch_size": 1, "lora_dropout": 0.0, **changes}
    return Workload(task="train", method=method, **facts)


def how(**changes: Any) -> Strategy:
    """bf16, plain SGD, checkpointing: nothing but the terms a test asks for."""
    return Strategy(**{"optimizer": "sgd", **changes})
