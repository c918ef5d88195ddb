"""An explanation is the estimate taken apart: everything adds up to the figures it explains."""

from __future__ import annotations

import pytest

from planner.anatomy import cache_rate, weight_groups
from planner.estimate import architecture_of, estimate
from planner.explain import explain
from planner.machine import machine_from_gpus
from planner.memory.kvcache import cache_bytes
from planner.memory.weights import weight_bytes
from planner.types import Strategy, Workload
from planner.units import GIB
from profiles.arithmetic import parameter_count
from profiles.catalogue import all_models, load_model
from profiles.hardware import load_gpu

H200 = machine_from_gpus([(load_gpu("h200"), 1)])
TRAIN = Workload(task="train", method="lora")
JOBS = {
    "generate": ("qwen2.5-7b", Workload(), Strategy()),
    "experts": ("gpt-oss-20b", Workload(prompt_tokens=512), Strategy(attention="eager")),
    "latent": ("deepseek-v2-lite", Workload(), Strategy(quant="nf4")),
    "vision": ("gemma-3-4b-it", Workload(), Strategy(quant="int8")),
    "qlora": ("qwen2.5-7b", Workload(task="train"), Strategy(quant="nf4", optimizer="paged_adamw_8bit")),
    "fused": ("llama-3.2-1b", TRAIN, Strategy(loss="fused")),
    "recorded": ("llama-3.2-1b", TRAIN, Strategy(gradient_checkpointing=False)),
    "full": ("qwen2.5-0.5b", Workload(task="train", method="full"), Strategy(optimizer="adamw_torch")),
}


def explained(name: str):
    model_id, work, how = JOBS[name]
    model = load_model(model_id)
    found = estimate(model, H200, work, how)
    return found, explain(found, architecture_of(model), H200, work, how)


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_groups_add_up_to_the_loaded_bytes_of_every_model(quant):
    how = Strategy(quant=quant)
    for model in all_models():
        arch = architecture_of(model)
        groups = weight_groups(arch, how)
        assert sum(g.bytes for g in groups) == weight_bytes(arch, quant, "none", "bf16").counted(
            arch.order
        ), model.id
        assert sum(g.parameters for g in groups) == parameter_count(arch), model.id


@pytest.mark.parametrize("name", JOBS)
def test_lines_moments_and_steps_add_up(name):
    found, shown = explained(name)
    (gpu,), (card,) = found.gpus, shown.cards
    assert sum(line.bytes for line in card.lines) == gpu.allocated_peak_bytes
    assert sum(line.share for line in card.lines) == pytest.approx(1)
    assert max(bar.of_peak for bar in card.moments if bar.name != "load") == 1.0
    assert [bar.name for bar in card.moments] == list(gpu.moments)
    ends = [sum(getattr(step, end) for step in card.steps) for end in ("low", "typical", "high")]
    assert ends == [gpu.low_bytes, gpu.process_bytes, gpu.high_bytes]
    assert sum(line.bytes for line in shown.host) == found.host.ram_bytes
    assert all((line.source is not None) == (line.basis == "measured") for line in card.lines)


def arithmetic(name: str, line: str) -> str:
    _, shown = explained(name)
    return next(item.arithmetic for item in shown.cards[0].lines if item.name == line)


def test_formulas_have_their_numbers_in():
    assert (
        arithmetic("qlora", "adapters")
        == "8 x (inputs + outputs) of each adapted linear = 20,185,088 parameters x 4 B"
    )
    assert arithmetic("qlora", "checkpoints") == "28 layer inputs x 2048 tokens x 3584 x 2 B"
    loss = arithmetic("qlora", "logits and loss")
    assert loss.startswith("3.02 float32 copies of the logits, each 2048 tokens x 152064 vocabulary x 4 B")
    cache = arithmetic("generate", "kv cache")
    assert "56 KiB a token" in cache and "28 layers x (512 + 512) x 2 B" in cache
    assert "2 x 32 MiB" in arithmetic("qlora", "library workspace")


def test_why_names_the_line_that_comes_on_top_and_the_next_moment():
    _, shown = explained("qlora")
    why = shown.cards[0].why
    assert why.startswith("loss: ") and "logits and loss comes on top" in why and "backward, holds" in why


def test_rates_are_those_of_the_contract():
    _, shown = explained("full")
    rates = shown.rates
    assert rates.optimizer_bytes_per_parameter == pytest.approx(4, rel=0.02)
    assert rates.logits_copy_bytes == 4 * 2048 * 151936
    assert rates.layers[0].backward_peak > rates.layers[0].input > 0
    assert explained("fused")[1].rates.logits_copies is None


@pytest.mark.parametrize("name", ["qwen2.5-7b", "deepseek-v2-lite", "gpt-oss-20b", "gemma-3-27b-it"])
def test_a_token_costs_what_the_cache_grows_by(name):
    arch = architecture_of(load_model(name))
    rate = cache_rate(arch, Strategy())
    short = min([64, *rate.windows])
    assert cache_bytes(arch, 1, short, short, 2).final == pytest.approx(
        rate.bytes_per_token * short, rel=0.01
    )


def test_weights_of_one_card_of_two_are_said_to_be_a_part():
    two = machine_from_gpus([(load_gpu("rtx-3090"), 2)])
    model, work, how = load_model("qwen2.5-14b"), Workload(), Strategy()
    found = estimate(model, two, work, how)
    shown = explain(found, architecture_of(model), two, work, how)
    texts = [line.arithmetic for card in shown.cards for line in card.lines if line.name == "weights"]
    assert len(texts) == 2 and all("GiB of the" in text for text in texts)


def test_without_a_card_there_is_still_a_breakdown():
    from planner.machine import override

    cpu = override(machine_from_gpus([]), ram_bytes=64 * GIB)
    model, work, how = load_model("qwen2.5-0.5b"), Workload(), Strategy(placement="cpu")
    shown = explain(estimate(model, cpu, work, how), architecture_of(model), cpu, work, how)
    assert shown.cards == () and shown.weights and shown.host
