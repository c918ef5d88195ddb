"""The estimate of one card: how its figures hang together, and what each option changes."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from planner.errors import BadOption
from planner.estimate import CALIBRATED_STACK, architecture_of, estimate, normal, normal_strategy
from planner.machine import machine_from_gpus
from planner.memory.infer import inference_memory
from planner.memory.overheads import context, cublas_workspace, slack
from planner.memory.steady import steady_holes
from planner.memory.train import training_memory
from planner.types import Machine, Stack, Strategy, Workload
from profiles.catalogue import load_model
from profiles.hardware import load_gpu

QWEN = load_model("qwen2.5-7b")
H200 = machine_from_gpus([(load_gpu("h200"), 1)])
INFER, TRAIN = Workload(task="infer"), Workload(task="train")
QLORA = Strategy(quant="nf4", optimizer="paged_adamw_8bit")


def on(machine: Machine, work: Workload, how: Strategy):
    return estimate(QWEN, machine, work, how).gpus[0]


@pytest.mark.parametrize(("work", "how"), [(INFER, Strategy()), (TRAIN, QLORA)], ids=["infer", "train"])
def test_figures_are_peak_slack_and_context(work: Workload, how: Strategy) -> None:
    arch, card = architecture_of(QWEN), load_gpu("h200")
    run = inference_memory if work.task == "infer" else training_memory
    memory = run(arch, normal(work), normal_strategy(how, work), cublas_workspace(card))
    holes = steady_holes(arch, normal(work), normal_strategy(how, work), cublas_workspace(card))
    room, around = slack(memory, arch, work, how, holes), context(card, arch, work, how)
    gpu = on(H200, work, how)
    assert gpu.load_bytes == memory.load_bytes
    assert gpu.allocated_peak_bytes == memory.peak.bytes
    assert gpu.components == memory.peak.lines
    assert gpu.peak_moment == memory.peak.moment
    assert gpu.required_bytes == memory.peak.bytes + room.typical
    assert gpu.process_bytes == gpu.required_bytes + around.typical
    less = gpu.required_bytes - memory.peak.bytes * 0.997 - room.low, around.typical - around.low
    assert gpu.low_bytes == gpu.process_bytes - int(math.hypot(*less))
    more = memory.peak.bytes * 1.003 + room.high - gpu.required_bytes, around.high - around.typical
    assert gpu.high_bytes == gpu.process_bytes + int(math.hypot(*more))
    assert gpu.moments == {"load": memory.load_peak_bytes, **memory.by_moment}


def test_the_published_run() -> None:
    # Qwen2.5-7B QLoRA, r = 8 on every linear, 2048 tokens: 9.22 GiB measured
    gpu = on(H200, TRAIN, QLORA)
    assert gpu.allocated_peak_bytes == pytest.approx(9.22 * 2**30, rel=0.005)
    assert gpu.peak_moment == "loss"
    assert {line.name for line in gpu.components} == {
        "weights", "adapters", "optimizer state", "library workspace", "inputs and rope", "checkpoints",
        "logits and loss",
    }  # fmt: skip


def test_loading_decides_where_it_peaks_higher_than_the_run() -> None:
    # a prompt of one token needs next to nothing beside the weights; quantizing needs a matrix and its copies
    gpu = on(H200, replace(INFER, prompt_tokens=1, new_tokens=1), Strategy(quant="int8"))
    assert gpu.required_bytes == gpu.moments["load"] > gpu.allocated_peak_bytes


@pytest.mark.parametrize(
    ("name", "share"), [("h200", 0.003), ("rtx-3090", 0.02), ("mi300x", 0.15), ("m3-max-128gb", 0.15)]
)
def test_uncertainty_of_the_peak_by_where_it_was_measured(name: str, share: float) -> None:
    machine = machine_from_gpus([(load_gpu(name), 1)])
    gpu = on(machine, TRAIN, QLORA)
    arch, card = architecture_of(QWEN), load_gpu(name)
    memory = training_memory(arch, normal(TRAIN), normal_strategy(QLORA, TRAIN), cublas_workspace(card))
    holes = steady_holes(arch, normal(TRAIN), normal_strategy(QLORA, TRAIN), cublas_workspace(card))
    room, around = slack(memory, arch, TRAIN, QLORA, holes), context(card, arch, TRAIN, QLORA)
    more = memory.peak.bytes * (1 + share) + room.high - gpu.required_bytes, around.high - around.typical
    assert gpu.high_bytes == gpu.process_bytes + int(math.hypot(*more))


def test_cards_differ_in_workspace_and_context_only() -> None:
    here = on(H200, INFER, Strategy())
    there = on(machine_from_gpus([(load_gpu("rtx-3090"), 1)]), INFER, Strategy())
    assert here.load_bytes == there.load_bytes
    # one cuBLAS workspace: 32 MiB, or 8.125
    assert here.allocated_peak_bytes - there.allocated_peak_bytes == int((32 - 8.125) * 2**20)


def test_budget_comes_from_the_machine() -> None:
    gpu = on(machine_from_gpus([(load_gpu("h200"), 1)], vram_bytes=10**10, reserve_bytes=10**9), TRAIN, QLORA)
    assert gpu.budget_bytes == 9 * 10**9 and "given by --vram" in gpu.budget_basis


def test_parameters_stack_and_defaults_are_reported() -> None:
    found = estimate(QWEN, H200, INFER, Strategy())
    assert (found.model.id, found.model.parameters) == ("qwen2.5-7b", 7_615_616_512)
    assert found.stack == CALIBRATED_STACK
    newer = Stack("2.13", "5.23", "0.50", "0.21")
    assert estimate(QWEN, H200, INFER, Strategy(), newer).stack == newer


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 4096}, {"method": "full"}, {"lora_rank": 64}, {"gradient_accumulation_steps": 9},
        {"train_tokens": 10**9}, {"adapter_dtype": "bf16"},
    ],
    ids=str,
)  # fmt: skip
def test_inference_ignores_options_of_training(change: dict) -> None:
    plain = estimate(QWEN, H200, INFER, Strategy())
    assert estimate(QWEN, H200, replace(INFER, **change), Strategy()).gpus == plain.gpus
    for how in (
        Strategy(optimizer="sgd"),
        Strategy(gradient_checkpointing=False),
        Strategy(upcast_frozen=True),
    ):
        assert estimate(QWEN, H200, INFER, how).gpus == plain.gpus


def test_training_ignores_options_of_inference() -> None:
    plain = estimate(QWEN, H200, TRAIN, QLORA)
    other = replace(TRAIN, prompt_tokens=9, new_tokens=9, concurrency=9)
    assert estimate(QWEN, H200, other, replace(QLORA, cache="static", speculate="lookup")).gpus == plain.gpus


def test_preparing_an_unquantized_base_changes_nothing() -> None:
    lora = replace(TRAIN, method="lora")
    assert on(H200, lora, Strategy(upcast_frozen=True)) == on(H200, lora, Strategy())
    assert on(H200, TRAIN, replace(QLORA, upcast_frozen=True)) != on(H200, TRAIN, QLORA)


def test_an_optimizer_nobody_described_is_refused() -> None:
    with pytest.raises(BadOption, match="unknown optimizer 'adamw_apex'") as caught:
        estimate(QWEN, H200, TRAIN, Strategy(optimizer="adamw_apex"))
    assert "paged_adamw_8bit" in str(caught.value.hint)
    estimate(QWEN, H200, INFER, Strategy(optimizer="adamw_apex"))  # nothing is trained


def test_a_draft_model_nobody_named_is_unknown_where_the_model_itself_fits() -> None:
    assert estimate(QWEN, H200, INFER, Strategy(speculate="draft")).verdict == "unknown"
    small = machine_from_gpus([(load_gpu("rtx-3060-12gb"), 1)])
    assert estimate(QWEN, small, INFER, Strategy(speculate="draft")).verdict == "does_not_fit"


def test_managed_memory_is_ram_too() -> None:
    found = estimate(QWEN, H200, TRAIN, QLORA)
    paged = {line.name: line.bytes for line in found.host.components}["paged optimizer state"]
    assert found.gpus[0].managed_bytes == paged > 0
    assert all(line.name != "paged optimizer state" for line in found.gpus[0].components)


def test_unified_memory_takes_the_gpus_share() -> None:
    machine = machine_from_gpus([(load_gpu("m3-max-128gb"), 1)])
    gpu = on(machine, INFER, Strategy())
    assert gpu.budget_bytes is not None and gpu.budget_bytes < machine.gpus[0].total_bytes
