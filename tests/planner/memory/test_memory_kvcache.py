"""The KV cache, worked out by hand."""

from __future__ import annotations

import pytest
from memory_cases import known, tiny

from planner.memory.kvcache import cache_bytes, kept_tokens, layer_kv_bytes
from profiles.schema import Attention, LatentAttention, RecurrentState

FULL = Attention(kind="full", heads=8, kv_heads=2, head_dim=64, value_dim=64)
K = 1024


def test_grouped_query_attention() -> None:
    # 2 (keys, values) x 3 sequences x 2 heads x 1000 tokens x 64 x 2 B
    assert layer_kv_bytes(FULL, 3, 1000, 2) == 2 * 768_000
    assert layer_kv_bytes(FULL, 3, 1000, 4) == 2 * 1_536_000


def test_multi_query_and_multi_head_attention() -> None:
    one = Attention(kind="full", heads=8, kv_heads=1, head_dim=64)
    every = Attention(kind="full", heads=8, kv_heads=0, head_dim=64)  # not stated: as many as heads
    assert layer_kv_bytes(one, 1, 1000, 2) == 2 * 128_000
    assert layer_kv_bytes(every, 1, 1000, 2) == 2 * 1_024_000


def test_keys_and_values_of_different_width() -> None:
    odd = Attention(kind="full", heads=8, kv_heads=2, head_dim=64, value_dim=32)
    assert layer_kv_bytes(odd, 1, 1000, 2) == 256_000 + 128_000


def test_keys_and_values_are_rounded_apart() -> None:
    assert layer_kv_bytes(Attention(kind="full", heads=1, kv_heads=1, head_dim=1), 1, 1, 2) == 2 * 512


def test_latent_attention_keeps_the_latent_and_the_rotated_part() -> None:
    latent = Attention(
        kind="latent", heads=128, kv_heads=128, head_dim=192, value_dim=128,
        latent=LatentAttention(kv_rank=512, q_rank=1536, rope_dim=64, nope_dim=128),
    )  # fmt: skip
    # 1000 tokens x (512 + 64) x 2 B, not 128 heads of 192 + 128
    assert layer_kv_bytes(latent, 1, 1000, 2) == 1_024_000 + 128_000


def test_recurrent_state_does_not_grow() -> None:
    state = RecurrentState(conv_dim=1000, conv_kernel=4, state_elements=16 * 64 * 64)
    spec = Attention(kind="recurrent", heads=16, head_dim=64, state=state)
    # 3 sequences: state 3 x 65,536 x 4 B, convolution 3 x 1000 x 4 x 2 B = 24,000 -> 24,064
    assert layer_kv_bytes(spec, 3, 10, 2) == layer_kv_bytes(spec, 3, 10**6, 2) == 786_432 + 24_064


def test_layers_without_keys_of_their_own() -> None:
    shared = Attention(kind="full", heads=8, kv_heads=2, head_dim=64, shares_kv=True)
    assert layer_kv_bytes(shared, 1, 1000, 2) == 0
    assert layer_kv_bytes(Attention(kind="none"), 1, 1000, 2) == 0


def test_a_window_is_a_view_after_prefill_and_a_copy_in_decode() -> None:
    sliding = Attention(kind="sliding", heads=8, kv_heads=2, head_dim=64, window=100)
    assert kept_tokens(sliding, 1000, sliced=True) == 1000
    assert kept_tokens(sliding, 1000, sliced=False) == 100
    assert kept_tokens(sliding, 60, sliced=False) == 60
    assert kept_tokens(FULL, 1000, sliced=False) == 1000


class TestWholeModels:
    """Three layers, 2 heads of 16 for keys and values: 128 B a token and layer in bf16."""

    def test_dynamic_cache_grows_one_layer_at_a_time(self) -> None:
        found = cache_bytes(tiny(), batch=2, prompt=1024, tokens=1280, width=2)
        assert found.prefill == 3 * 2 * 1024 * 128
        assert found.final == 3 * 2 * 1280 * 128
        assert found.growth == 2 * 1280 * 64  # keys, old and new, then values
        assert found.host == 0

    def test_static_cache_is_whole_from_the_start(self) -> None:
        found = cache_bytes(tiny(), 1, 1024, 1280, 2, "static")
        assert (found.prefill, found.final, found.growth) == (3 * 1280 * 128, 3 * 1280 * 128, 0)

    def test_offloaded_cache_keeps_two_layers_on_the_card(self) -> None:
        found = cache_bytes(tiny(), 1, 1024, 1280, 2, "offloaded")
        assert (found.prefill, found.final) == (1280 * 128, 2 * 1280 * 128)
        # pinned in powers of two: keys and values of 64 KiB after the prompt, of 128 KiB once they have grown
        assert found.host == 3 * 2 * (64 + 128) * K

    def test_offloading_one_layer_keeps_that_one(self) -> None:
        found = cache_bytes(tiny(num_hidden_layers=1), 1, 1024, 1280, 2, "offloaded")
        assert found.final == 1280 * 128

    def test_quantized_cache_packs_all_but_the_last_128_tokens(self) -> None:
        found = cache_bytes(tiny(), 1, 1024, 1152, 2, "quantized")
        old = 1024 * 64  # elements of a layer that are packed
        packed = old // 2 + old // 16 * 4  # 4 bits each, and two 16-bit numbers per head of 16
        assert found.final == 3 * (packed + 128 * 128)

    def test_a_short_quantized_cache_is_not_packed(self) -> None:
        assert cache_bytes(tiny(), 1, 64, 128, 2, "quantized").final == 3 * 128 * 128

    def test_sliding_layers_shrink_to_their_window_after_prefill(self) -> None:
        gemma = known("gemma-2-2b")  # 26 layers, every second one looks back on 4096 tokens, 4 heads of 256
        a_token = 2 * 4 * 256 * 2
        found = cache_bytes(gemma, 1, 8000, 8192, 2)
        assert found.prefill == 26 * 8000 * a_token
        assert found.final == 13 * 8192 * a_token + 13 * 4096 * a_token

    @pytest.mark.parametrize(("name", "bytes_a_token"), [("qwen2.5-7b", 28 * 2 * 4 * 128 * 2)])
    def test_known_models(self, name: str, bytes_a_token: int) -> None:
        assert cache_bytes(known(name), 1, 1024, 1024, 2).final == 1024 * bytes_a_token

    def test_layers_that_share_keys_own_no_cache(self) -> None:
        gemma = known("gemma-3n-e4b-it")
        kinds = [gemma.kinds[kind].attention for kind in gemma.order]
        owners = [spec for spec in kinds if not spec.shares_kv]
        assert 0 < len(owners) < len(kinds)
        expected = sum(2 * spec.kv_heads * spec.head_dim * 2 * 256 for spec in owners)
        assert cache_bytes(gemma, 1, 256, 256, 2).final == expected
