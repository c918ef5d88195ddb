"""Parameter counts worked out by hand, one of each kind of architecture."""

from __future__ import annotations

import pytest

from profiles.architecture import architecture
from profiles.arithmetic import active_parameter_count, parameter_count, part_counts
from profiles.catalogue import load_model
from profiles.schema import Architecture


def arch_of(name: str) -> Architecture:
    return architecture(load_model(name).config)


def test_grouped_queries_with_biases_and_a_head_of_its_own() -> None:
    h, inner, vocab, kv = 3584, 18944, 152064, 4 * 128
    attention = h * h + h + 2 * (h * kv + kv) + h * h
    layer = attention + 3 * h * inner + 2 * h
    assert parameter_count(arch_of("qwen2.5-7b")) == 28 * layer + 2 * vocab * h + h == 7_615_616_512


def test_tied_head_counts_once() -> None:
    h, inner, vocab = 2048, 8192, 128256
    layer = 2 * h * h + 2 * h * 512 + 3 * h * inner + 2 * h
    arch = arch_of("llama-3.2-1b")
    assert arch.head is None
    assert parameter_count(arch) == 16 * layer + vocab * h + h == 1_235_814_400


def test_four_norms_and_a_window_on_every_other_layer() -> None:
    arch = arch_of("gemma-2-2b")
    h, inner, vocab, q, kv = 2304, 9216, 256000, 8 * 256, 4 * 256
    layer = 2 * h * q + 2 * h * kv + 3 * h * inner + 4 * h
    assert parameter_count(arch) == 26 * layer + vocab * h + h == 2_614_341_888
    assert [norm.name for norm in arch.kinds[0].norms] == [
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ]
    assert arch.order == (0, 1) * 13
    assert [(kind.attention.kind, kind.attention.window) for kind in arch.kinds] == [
        ("sliding", 4096),
        ("full", None),
    ]
    assert arch.kinds[0].attention.softcap and arch.logit_softcap and arch.embedding_scale


def test_routed_experts_and_what_a_token_uses_of_them() -> None:
    h, inner, vocab = 4096, 14336, 32000
    attention = 2 * h * h + 2 * h * 1024
    outside = 32 * (attention + 8 * h + 2 * h) + 2 * vocab * h + h
    arch = arch_of("mixtral-8x7b-v0.1")
    assert parameter_count(arch) == outside + 32 * 8 * 3 * h * inner == 46_702_792_704
    assert active_parameter_count(arch) == outside + 32 * 2 * 3 * h * inner
    experts = arch.kinds[0].feed_forward.experts
    assert experts is not None and experts.fused and not experts.linears


def test_latent_attention_with_shared_experts_after_dense_layers() -> None:
    h, heads, vocab = 7168, 128, 129280
    attention = h * 1536 + 1536 * heads * 192 + h * 576 + 512 * heads * 256 + heads * 128 * h + 1536 + 512
    moe = 256 * 3 * h * 2048 + 3 * h * 2048 + 256 * h
    layers = 61 * (attention + 2 * h) + 3 * 3 * h * 18432 + 58 * moe
    arch = arch_of("deepseek-r1")
    assert parameter_count(arch) == layers + 2 * vocab * h + h == 671_026_404_352
    assert arch.order == (0,) * 3 + (1,) * 58
    latent = arch.kinds[0].attention
    assert latent.kind == "latent" and (latent.head_dim, latent.value_dim) == (192, 128)
    assert latent.latent is not None and latent.latent.kv_rank == 512


def test_fused_queries_keys_and_values_of_one_head() -> None:
    h, vocab = 4544, 65024
    layer = h * (h + 2 * 64) + h * h + 8 * h * h + 2 * h
    arch = arch_of("falcon-7b")
    assert parameter_count(arch) == 32 * layer + vocab * h + 2 * h == 6_921_720_704
    assert arch.kinds[0].attention.kv_heads == 1 and arch.kinds[0].residual == "parallel"


def test_biases_everywhere_and_a_plain_feed_forward() -> None:
    h, inner, vocab = 2560, 10240, 51200
    layer = 4 * (h * h + h) + 2 * h * inner + inner + h + 2 * h
    arch = arch_of("phi-2")
    assert parameter_count(arch) == 32 * layer + vocab * h + (vocab * h + vocab) + 2 * h == 2_779_683_840


def test_vision_tower_is_counted_as_such() -> None:
    arch = arch_of("qwen2-vl-7b-instruct")
    counts = part_counts(arch)
    width, merged = 1280, 5120
    block = width * 3 * width + 3 * width + width * width + width + 8 * width * width + 5 * width + 4 * width
    merger = 2 * width + merged * merged + merged + merged * 3584 + 3584
    assert counts.towers == 32 * block + width * 3 * 2 * 14 * 14 + merger
    assert counts.total - counts.towers == parameter_count(arch_of("qwen2.5-7b"))


def test_linear_attention_keeps_a_state_and_full_layers_a_cache() -> None:
    arch = arch_of("qwen3-next-80b-a3b-instruct")
    mixers = [arch.kinds[kind].attention for kind in arch.order]
    assert [mixer.kind for mixer in mixers[:4]] == ["recurrent"] * 3 + ["full"]
    state = mixers[0].state
    assert state is not None and state.state_elements == 32 * 128 * 128
    assert (state.conv_dim, state.conv_kernel) == (8192, 4)
    assert mixers[3].heads == 16 and mixers[3].kv_heads == 2 and mixers[3].head_dim == 256


def test_layers_that_share_keys_and_values_own_no_projection_for_them() -> None:
    arch = arch_of("gemma-4-e2b-it")
    shared = [arch.kinds[kind].attention for kind in arch.order if arch.kinds[kind].attention.shares_kv]
    assert len(shared) == 20
    assert all(
        [linear.name for linear in mixer.linears] == ["self_attn.q_proj", "self_attn.o_proj"]
        for mixer in shared
    )


@pytest.mark.parametrize(
    ("name", "linears"),
    [
        ("llama-3.1-8b", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("phi-4", ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"]),
        ("starcoder2-7b", ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]),
    ],
)
def test_linears_keep_the_names_and_order_of_transformers(name: str, linears: list[str]) -> None:
    layer = arch_of(name).kinds[0]
    found = [linear.name.split(".")[-1] for linear in (*layer.attention.linears, *layer.feed_forward.linears)]
    assert found == linears


def test_published_quantization_and_dtype_are_kept() -> None:
    assert arch_of("gpt-oss-20b").pretrained_quantization == "mxfp4"
    assert arch_of("deepseek-v3").pretrained_quantization == "fp8"
    assert arch_of("gemma-2-2b").dtype == "float32"
    assert arch_of("qwen2.5-7b").dtype == "bfloat16"
