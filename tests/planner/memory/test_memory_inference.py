"""Moments of generation, worked out on the three-layer model. D = 64, F = 128, V = 1000, bf16."""

from __future__ import annotations

import pytest
from memory_cases import known, llama_layer, tiny

from planner.memory.infer import inference_memory
from planner.memory.layer import layer_cost
from planner.memory.moments import CardMemory
from planner.memory.shapes import Pass
from planner.types import Strategy, Workload

U = 256 * 64 * 2
KV = 128
"""Bytes a token and layer: 2 x 2 heads x 16 x 2 B."""


def generate(**changes) -> Workload:
    return Workload(task="infer", **{"prompt_tokens": 256, "new_tokens": 64, **changes})


def memory(work: Workload, strategy: Strategy | None = None, arch=None, workspace: int = 0) -> CardMemory:
    return inference_memory(arch or tiny(), work, strategy or Strategy(), workspace)


def lines(card: CardMemory, index: int) -> dict[str, int]:
    return {line.name: line.bytes for line in card.snapshots[index].lines}


def test_prefill_of_a_layer() -> None:
    found = lines(memory(generate(), workspace=1000), 0)
    assert found["library workspace"] == 1000
    # the layer in work counts its own share of the cache
    assert found["kv cache"] == 2 * 256 * KV
    assert found["activations"] == 2 * U
    assert found["layer in work"] == 9 * U
    # ids, mask and positions of 320 tokens (2,560 B); cos and sin of 256 x 16
    assert found["inputs and rope"] == 4 * 2_560 + 2 * 8_192


def test_end_of_prefill_asks_for_one_row_of_logits() -> None:
    found = lines(memory(generate()), 1)
    assert found["kv cache"] == 3 * 256 * KV
    assert found["logits"] == 6_144  # 1000 x (2 + 4) B, rounded up
    assert found["layer in work"] == 5 * U


def test_decode_grows_one_layer_at_a_time() -> None:
    found = lines(memory(generate()), 2)
    assert found["kv cache"] == 3 * 320 * KV
    assert found["kv copy"] == 320 * KV // 2  # keys before values
    one = Pass(batch=1, seq=1, past=319, cache="dynamic")
    assert found["layer in work"] == layer_cost(llama_layer(), one, 64).forward_peak


def test_loading_is_the_weights() -> None:
    card = memory(generate())
    assert card.load_bytes == card.load_peak_bytes == lines(card, 0)["weights"]
    assert card.managed_bytes == card.host_bytes == 0


@pytest.mark.parametrize("moment", ["prefill", "decode"])
def test_sequences_are_batch_times_concurrency(moment: str) -> None:
    assert memory(generate(batch_size=6)) == memory(generate(batch_size=2, concurrency=3))
    one, six = (memory(generate(batch_size=n)).by_moment[moment] for n in (1, 6))
    assert six > one


def test_largest_block_is_the_widest_activation() -> None:
    assert memory(generate()).snapshots[0].largest_block == 256 * 128 * 2
    routed = tiny(
        model_type="qwen3_moe", num_experts=8, num_experts_per_tok=4, moe_intermediate_size=96, head_dim=16
    )
    # four copies of a token, gate and up of an expert together
    assert memory(generate(), arch=routed).snapshots[0].largest_block == 256 * 4 * 2 * 96 * 2


def test_kinds_of_cache() -> None:
    tokens = 320
    static = memory(generate(), Strategy(cache="static"))
    assert lines(static, 0)["kv cache"] == lines(static, 2)["kv cache"] == 3 * tokens * KV
    assert "kv copy" not in lines(static, 2)
    away = memory(generate(), Strategy(cache="offloaded"))
    pinned = 2 * (16384 + 32768)  # keys and values in powers of two: 256 tokens, then up to 320
    assert (lines(away, 2)["kv cache"], away.host_bytes) == (2 * tokens * KV, 3 * pinned)
    packed = memory(generate(), Strategy(cache="quantized"))
    assert lines(packed, 2)["kv cache"] < 0.6 * lines(memory(generate()), 2)["kv cache"]


def test_quantization_changes_weights_and_workspace_only() -> None:
    arch = known("qwen2.5-7b")
    work = generate(prompt_tokens=2048)
    plain, nf4 = (memory(work, Strategy(quant=quant), arch) for quant in ("none", "nf4"))
    assert nf4.load_bytes < 0.4 * plain.load_bytes
    assert lines(nf4, 2)["kv cache"] == lines(plain, 2)["kv cache"]
    # a matrix of 3584 x 18944 is dequantized for the prefill's product
    grown = lines(nf4, 0)["layer in work"] - lines(plain, 0)["layer in work"]
    assert 0 < grown <= 3_584 * 18_944 * 2


def test_a_short_prompt_with_a_long_answer_peaks_in_decode() -> None:
    assert memory(generate(prompt_tokens=1, new_tokens=4096)).peak.moment == "decode"
    assert memory(generate(prompt_tokens=4096, new_tokens=1)).peak.moment == "prefill"


def test_recurrent_layers_do_not_grow() -> None:
    arch = known("qwen3-next-80b-a3b-instruct")
    attending = sum(arch.kinds[kind].attention.kind != "recurrent" for kind in arch.order)
    assert 0 < attending < arch.layers
    short, long = (lines(memory(generate(new_tokens=n), arch=arch), 2)["kv cache"] for n in (256, 1280))
    spec = next(layer.attention for layer in arch.kinds if layer.attention.kind != "recurrent")
    assert long - short == attending * 1024 * 2 * spec.kv_heads * spec.head_dim * 2
