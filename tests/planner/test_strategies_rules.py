"""What excludes what, and which ways a job is tried."""

import pytest
from msgspec.structs import replace
from plan_fakes import GEMMA_2_2B, QWEN_7B, card, no_card

from planner.errors import BadOption
from planner.rates import auto_dtype, has_bf16
from planner.rules import RULES, Case, broken_rule, has_sinks, lacks_sdpa, liger_model_types, trains_on
from planner.strategies import LEVERS, departures, legal_strategies, resolve_strategy
from planner.types import Host, Strategy, Workload
from profiles.architecture import architecture
from profiles.catalogue import load_model

QWEN, GEMMA = architecture(QWEN_7B), architecture(GEMMA_2_2B)
INFER = Workload()
QLORA, LORA, FULL = (Workload(task="train", method=method) for method in ("qlora", "lora", "full"))


def rule(machine, workload, strategy, arch=QWEN):
    broken = broken_rule(Case(arch, machine, workload, strategy))
    return broken.name if broken else None


@pytest.mark.parametrize(
    ("name", "machine", "workload", "strategy"),
    [
        ("no_card", no_card(), INFER, Strategy()),
        ("stream_placement", card("rtx-3090"), INFER, Strategy(engine="stream")),
        ("stream_placement", no_card(), INFER, Strategy(engine="stream", placement="cpu")),
        ("stream_full", card("rtx-3090"), FULL, Strategy(engine="stream", placement="mixed_offload")),
        (
            "stream_upcast",
            card("rtx-3090"),
            QLORA,
            Strategy(engine="stream", placement="mixed_offload", quant="nf4", upcast_frozen=True),
        ),
        ("resident_offload", card("rtx-3090"), INFER, Strategy(placement="mixed_offload")),
        ("accelerate_without_card", no_card(), INFER, Strategy(placement="cpu", engine="accelerate")),
        ("train_offloaded", card("rtx-3090"), LORA, Strategy(placement="mixed_offload", engine="accelerate")),
        (
            "offload_quantized",
            card("rtx-3090"),
            INFER,
            Strategy(placement="disk_offload", engine="accelerate", quant="nf4"),
        ),
        ("speculation_cache", card("h200"), INFER, Strategy(speculate="lookup", cache="static")),
        ("speculation_batch", card("h200"), Workload(batch_size=2), Strategy(speculate="lookup")),
        ("full_quantized", card("h200"), FULL, Strategy(quant="nf4")),
        ("qlora_unquantized", card("h200"), QLORA, Strategy()),
        ("lora_quantized", card("h200"), LORA, Strategy(quant="nf4")),
        ("no_bf16", card("t4"), INFER, Strategy(dtype="bf16")),
        ("full_fp16", card("t4"), FULL, Strategy(dtype="fp16")),
        ("old_for_int8", card("v100-pcie-16gb"), INFER, Strategy(dtype="fp16", quant="int8")),
        (
            "rmsprop_bf16",
            card("h200"),
            Workload(task="train", method="full"),
            Strategy(optimizer="rmsprop_bnb"),
        ),
        ("paged_elsewhere", card("rx-7900-xtx"), QLORA, Strategy(quant="nf4", optimizer="paged_adamw_8bit")),
        (
            "flash_attention_without_card",
            no_card(),
            INFER,
            Strategy(placement="cpu", attention="flash_attention_2"),
        ),
        ("flash_attention_old", card("t4"), INFER, Strategy(dtype="fp16", attention="flash_attention_2")),
        ("flash_attention_fp32", card("h200"), INFER, Strategy(dtype="fp32", attention="flash_attention_2")),
        ("liger_inference", card("h200"), INFER, Strategy(kernels="liger")),
        ("liger_without_card", no_card(), LORA, Strategy(placement="cpu", kernels="liger")),
        ("liger_old", card("t4"), LORA, Strategy(dtype="fp16", kernels="liger")),
        ("cache_stays", no_card(), INFER, Strategy(placement="cpu", cache="offloaded")),
        (
            "static_offload",
            card("rtx-3090"),
            INFER,
            Strategy(placement="mixed_offload", engine="accelerate", cache="static"),
        ),
        ("no_fused_experts", card("h200"), INFER, Strategy(quant="nf4", quant_experts="nf4")),
        (
            "nothing_to_offload",
            card("h200"),
            LORA,
            Strategy(activation_offload=True, gradient_checkpointing=False),
        ),
        ("activations_stay", no_card(), LORA, Strategy(placement="cpu", activation_offload=True)),
    ],
)
def test_each_rule_excludes_its_case(name, machine, workload, strategy):
    assert rule(machine, workload, strategy) == name


def test_a_rule_about_systems_and_models():
    windows = replace(card("rtx-3090"), host=Host(system="Windows"))
    assert rule(windows, LORA, Strategy(kernels="liger")) == "liger_system"
    assert rule(replace(windows, host=Host(system="Linux")), LORA, Strategy(kernels="liger")) is None
    stranger = replace(QWEN, model_type="falcon")
    assert rule(card("rtx-3090"), LORA, Strategy(kernels="liger"), stranger) == "liger_model"
    assert {"qwen2", "llama", "gemma2"} <= liger_model_types()


def test_experts_are_quantized_where_they_run_in_common_code():
    packed = Strategy(quant="nf4", quant_experts="nf4")
    mixtral, llama4 = (
        architecture(load_model(name).config)
        for name in ("mixtral-8x7b-v0.1", "llama-4-scout-17b-16e-instruct")
    )
    assert rule(card("h200"), INFER, packed, mixtral) is None
    assert rule(card("h200"), INFER, packed, llama4) == "experts_in_own_code"
    assert rule(card("h200"), INFER, replace(packed, quant="int8"), mixtral) == "experts_alone"
    for workload in (INFER, QLORA):
        found, _ = legal_strategies(mixtral, card("h200"), workload)
        assert {s.quant_experts for s in found if s.quant == "nf4"} == {"none", "nf4"}
        assert {s.quant_experts for s in found if s.quant != "nf4"} <= {"none"}


@pytest.mark.parametrize(("stored", "other"), [("nf4", "int8"), ("int8", "nf4")])
def test_a_checkpoint_that_bitsandbytes_quantized_runs_as_it_is(stored, other):
    arch = replace(QWEN, pretrained_quantization=f"bitsandbytes-{stored}")
    assert resolve_strategy(arch, card("h200"), INFER, {}).quant == stored
    assert rule(card("h200"), INFER, Strategy(quant=stored), arch) is None
    for quant in ("none", other):
        assert rule(card("h200"), INFER, Strategy(quant=quant), arch) == "stored_precision"
    found, _ = legal_strategies(arch, card("h200"), INFER)
    assert {s.quant for s in found} == {stored}
    experts = Strategy(quant=stored, quant_experts="nf4")
    assert rule(card("h200"), INFER, experts, arch) == "stored_experts"
    nowhere = replace(QWEN, pretrained_quantization="bitsandbytes-fp4")
    assert rule(card("h200"), INFER, Strategy(quant="nf4"), nowhere) == "stored_precision"


def test_every_rule_says_why_and_what_would_do():
    assert len({each.name for each in RULES}) == len(RULES)
    for each in RULES:
        assert each.reason and each.needs and not each.reason.endswith(".")


def test_qlora_takes_any_quantized_base_and_full_takes_none():
    assert trains_on("nf4", "qlora") and trains_on("int8", "qlora") and trains_on("int8", "lora")
    assert not trains_on("nf4", "lora") and not trains_on("none", "qlora") and not trains_on("nf4", "full")


def test_bf16_follows_the_compute_capability():
    assert has_bf16(card("rtx-3090").gpus[0]) and not has_bf16(card("t4").gpus[0])
    assert auto_dtype(card("t4")) == "fp16" and auto_dtype(no_card()) == "bf16"
    assert resolve_strategy(QWEN, card("t4"), INFER, {}).dtype == "fp16"
    # fp16 weights cannot be trained themselves.
    assert resolve_strategy(QWEN, card("t4"), FULL, {}).dtype == "fp32"


@pytest.mark.parametrize(
    ("machine", "workload", "expected"),
    [
        (card("h200"), INFER, Strategy()),
        (card("h200"), QLORA, Strategy(quant="nf4", optimizer="paged_adamw_8bit")),
        (card("h200"), LORA, Strategy()),
        (no_card(), INFER, Strategy(placement="cpu")),
        (no_card(), QLORA, Strategy(placement="cpu", quant="nf4", optimizer="paged_adamw_8bit")),
        (card("rx-7900-xtx"), QLORA, Strategy(quant="nf4", optimizer="adamw_8bit")),
    ],
)
def test_one_strategy_takes_the_defaults(machine, workload, expected):
    assert resolve_strategy(QWEN, machine, workload, {}) == expected


def test_what_the_user_fixed_stays_fixed():
    fixed = {"quant": "nf4", "attention": "eager", "optimizer": "sgd", "gradient_checkpointing": False}
    legal, _ = legal_strategies(QWEN, card("rtx-3090"), QLORA, fixed, "speed")
    assert legal
    for each in legal:
        assert {name: getattr(each, name) for name in fixed} == fixed


@pytest.mark.parametrize(
    ("machine", "workload", "fixed", "word"),
    [
        (card("h200"), FULL, {"quant": "nf4"}, "full fine-tuning"),
        (card("h200"), QLORA, {"quant": "none"}, "QLoRA"),
        (card("h200"), LORA, {"placement": "disk_offload", "engine": "accelerate"}, "accelerate's offload"),
        (
            card("h200"),
            INFER,
            {"quant": "nf4", "placement": "disk_offload", "engine": "accelerate"},
            "unquantized",
        ),
        (card("h200"), FULL, {"engine": "stream", "placement": "mixed_offload"}, "never back"),
        (no_card(), INFER, {"placement": "full_gpu"}, "no card"),
        (card("h200"), INFER, {"engine": "stream", "placement": "full_gpu"}, "mixed_offload"),
        (card("t4"), INFER, {"dtype": "bf16", "placement": "full_gpu"}, "bf16"),
    ],
)
def test_impossible_wishes_are_one_clear_error(machine, workload, fixed, word):
    with pytest.raises(BadOption, match=word) as caught:
        legal_strategies(QWEN, machine, workload, fixed)
    assert caught.value.hint
    with pytest.raises(BadOption, match=word):
        resolve_strategy(QWEN, machine, workload, fixed)


def test_every_legal_strategy_breaks_no_rule_and_none_comes_twice():
    for machine in (card("rtx-3090", 1, 64), card("t4"), card("rtx-3090", 2), no_card(), card("rx-7900-xtx")):
        for workload in (INFER, QLORA, LORA, FULL):
            for prefer in ("quality", "speed", "headroom"):
                legal, rejected = legal_strategies(QWEN, machine, workload, {}, prefer)
                assert legal and len(set(legal)) == len(legal)
                for each in legal:
                    assert rule(machine, workload, each) is None
                for each in rejected:
                    assert each.reason and each.needs


def test_search_covers_placements_and_precisions():
    legal, rejected = legal_strategies(QWEN, card("rtx-3090", 1, 64), INFER)
    ways = {(each.placement, each.quant) for each in legal}
    assert ways == {
        (placement, quant)
        for placement in ("full_gpu", "mixed_offload", "disk_offload", "cpu")
        for quant in ("none", "int8", "nf4")
    }
    assert rejected == []
    engines = {(each.placement, each.engine) for each in legal}
    assert engines == {
        ("full_gpu", "resident"), ("mixed_offload", "stream"), ("disk_offload", "stream"),
        ("cpu", "resident"),
    }  # fmt: skip


def test_streaming_is_what_offloads_and_accelerate_is_searched_where_it_is_asked_for():
    for fixed in ({"engine": "stream"}, {"placement": "mixed_offload"}, {"placement": "disk_offload"}):
        legal, _ = legal_strategies(QWEN, card("rtx-3090"), INFER, fixed)
        assert {each.engine for each in legal} == {"stream"}
        assert {each.quant for each in legal} == {"none", "int8", "nf4"}
    for placement in ("mixed_offload", "disk_offload"):
        fixed = {"engine": "accelerate", "placement": placement}
        legal, _ = legal_strategies(QWEN, card("rtx-3090"), INFER, fixed)
        assert {(each.engine, each.quant) for each in legal} == {("accelerate", "none")}


def test_what_streams_may_send_away_what_a_step_keeps():
    legal, _ = legal_strategies(QWEN, card("rtx-3090"), QLORA)
    for placement, more in (("full_gpu", False), ("mixed_offload", True)):
        ways = [each for each in legal if each.placement == placement]
        assert any(each.activation_offload for each in ways) == more
        assert any((each.loss, each.kernels) == ("fused", "torch") for each in ways) == more


def test_a_card_that_is_missing_is_said_once():
    _, rejected = legal_strategies(QWEN, no_card(), INFER)
    assert [each.reason for each in rejected] == ["there is no card in this machine"]


def test_levers_save_memory_by_default_and_win_speed_when_asked():
    plain, _ = legal_strategies(QWEN, card("h200"), LORA)
    fast, _ = legal_strategies(QWEN, card("h200"), LORA, {}, "speed")
    assert all(each.gradient_checkpointing for each in plain)
    assert not all(each.gradient_checkpointing for each in fast)
    on_card = [each for each in plain if each.placement == "full_gpu"]
    optimizers = {each.optimizer for each in on_card}
    assert optimizers == {"adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"}
    assert {(each.loss, each.kernels) for each in on_card} == {("full", "torch"), ("fused", "liger")}


def test_models_without_sdpa_get_eager_attention_unless_told_otherwise():
    """transformers has no sdpa where attention logits are capped (Gemma 2) or meet sinks (gpt-oss)."""
    capped, _ = legal_strategies(GEMMA, card("h200"), INFER)
    plain, _ = legal_strategies(QWEN, card("h200"), INFER)
    assert {each.attention for each in capped} == {"eager"} and {each.attention for each in plain} == {"sdpa"}
    fixed, _ = legal_strategies(GEMMA, card("h200"), INFER, {"attention": "sdpa"})
    assert {each.attention for each in fixed} == {"sdpa"}
    sinks = architecture(load_model("gpt-oss-20b").config)
    assert has_sinks(sinks) and lacks_sdpa(sinks) and lacks_sdpa(GEMMA) and not lacks_sdpa(QWEN)
    assert (
        rule(card("h200"), INFER, Strategy(attention="flash_attention_2"), sinks) == "flash_attention_sinks"
    )


def test_departures_name_the_levers_in_use():
    machine = card("h200")
    assert departures(machine, LORA, Strategy()) == ()
    used = departures(machine, LORA, Strategy(optimizer="adamw_8bit", loss="fused", kernels="liger"))
    assert [lever.settings for lever in used] == [
        {"optimizer": "adamw_8bit"},
        {"loss": "fused", "kernels": "liger"},
    ]
    # The default of QLoRA is no departure.
    assert departures(machine, QLORA, Strategy(quant="nf4", optimizer="paged_adamw_8bit")) == ()
    assert all(lever.reason for lever in LEVERS)


def test_speculation_over_recurrent_layers_is_refused():
    arch = architecture(load_model("qwen3-next-80b-a3b-instruct").config)
    assert (
        rule(card("h200"), INFER, Strategy(speculate="lookup", attention="sdpa"), arch) == "speculation_state"
    )
    assert rule(card("h200"), INFER, Strategy(speculate="lookup")) is None
