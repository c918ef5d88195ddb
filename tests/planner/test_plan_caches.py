"""KV caches in plans: what a static one would give is said, and what each kind holds."""

from __future__ import annotations

import pytest
from plan_fakes import GEMMA_2_2B, QWEN_7B, card, profile

from planner.estimate import estimate
from planner.memory.kvcache import cache_bytes
from planner.plan import make_plan
from planner.types import Plan, Strategy, Workload
from planner.units import format_bytes
from profiles.architecture import architecture

HINT = "with --cache static: "


def plan_for(name: str, workload: Workload | None = None, **options: object) -> Plan:
    return make_plan(profile(QWEN_7B), card(name), workload or Workload(), **options)


def hints(plan: Plan) -> dict[str, str]:
    found = {}
    for each in plan.candidates:
        for reason in each.reasons:
            if reason.startswith(HINT):
                found[each.strategy.quant] = reason
    return found


def test_candidates_on_one_card_say_what_a_static_cache_would_give() -> None:
    plan = plan_for("h200")
    said = hints(plan)
    assert said.keys() == {"none", "nf4"}  # LLM.int8 decides on the host: nothing to gain
    best = plan.candidates[0]
    static = estimate(profile(QWEN_7B), card("h200"), Workload(), Strategy(cache="static"))
    assert best.strategy.cache == "dynamic"
    assert f"{static.speed.decode_tokens_per_s.typical:.0f} tokens/s" in said["none"]
    more = static.gpus[0].process_bytes - best.estimate.gpus[0].process_bytes
    assert more > 0 and said["none"].endswith(f"for {format_bytes(more)} more")


@pytest.mark.parametrize(
    "options",
    [{"pinned": {"cache": "dynamic"}}, {"prefer": "speed"}, {"workload": Workload(task="train")}],
    ids=["the user chose", "a candidate already", "no decoding"],
)
def test_nothing_is_said_where_it_means_nothing(options: dict[str, object]) -> None:
    assert not hints(plan_for("h200", **options))


def test_recorded_steps_pay_where_the_host_is_the_limit() -> None:
    """The host launches even more kernels for NF4 than for bf16; recorded, only the card's work is left."""
    for quant, gain in (("none", 1.5), ("nf4", 2.0), ("int8", 1.0)):
        usual, static = (
            estimate(profile(QWEN_7B), card("h200"), Workload(), Strategy(quant=quant, cache=cache)).speed
            for cache in ("dynamic", "static")
        )
        ratio = static.decode_tokens_per_s.typical / usual.decode_tokens_per_s.typical
        assert ratio >= gain and (quant != "int8" or ratio < 1.1)


def test_quantized_cache_by_hand() -> None:
    qwen = cache_bytes(architecture(QWEN_7B), 1, 1024, 1280, 2, "quantized")
    # keys and values of 4 heads x 128 in 28 layers: 128 recent tokens in bf16, the rest 4 bits and a pair of
    # 16-bit numbers for each 64 elements
    elements = 2 * 4 * 128
    assert qwen.final == 28 * elements * (128 * 2 + 1152 // 2 + 1152 * 4 // 64)
    gemma = architecture(GEMMA_2_2B)
    windows = [layer.attention.window for layer in gemma.kinds]
    sliding = sum(windows[kind] is not None for kind in gemma.order)
    whole, packed = (cache_bytes(gemma, 1, 1024, 1280, 2, kind).final for kind in ("dynamic", "quantized"))
    layer = whole // gemma.layers
    assert packed >= sliding * layer  # sliding layers are small and stay as they are
    assert packed < sliding * layer + (gemma.layers - sliding) * layer / 2


def test_static_decode_repeats_grouped_keys() -> None:
    long = Workload(prompt_tokens=64, new_tokens=8192, batch_size=8)
    static, dynamic = (
        estimate(profile(QWEN_7B), card("h200"), long, Strategy(cache=cache)).gpus[0].moments["decode"]
        for cache in ("static", "dynamic")
    )
    one_layer = 2 * 8 * 8256 * 4 * 128 * 2
    repeated = one_layer * 7
    assert static - dynamic == pytest.approx(repeated - one_layer / 2, rel=0.02)  # dynamic copies its keys
