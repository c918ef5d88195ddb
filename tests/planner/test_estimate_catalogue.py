"""Every model of the catalogue gives an estimate for every job, without error and in bounded time."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from planner.estimate import architecture_of, estimate
from planner.machine import machine_from_gpus
from planner.memory.recurrent import is_followed
from planner.types import Machine, Strategy, Workload
from profiles.catalogue import all_models
from profiles.hardware import load_gpu
from profiles.schema import ModelProfile

CARD = machine_from_gpus([(load_gpu("rtx-3090"), 1)], ram_bytes=64 * 2**30, disk_bytes=2**40)
TWO = machine_from_gpus([(load_gpu("rtx-3090"), 2)])
TRAIN = (("full", "none"), ("lora", "none"), ("qlora", "nf4"), ("qlora", "int8"))

JOBS = [
    *((CARD, Workload(task="infer"), Strategy(quant=quant)) for quant in ("none", "nf4", "int8")),
    *(
        (CARD, Workload(task="train", method=method), Strategy(quant=quant, gradient_checkpointing=on))
        for method, quant in TRAIN
        for on in (True, False)
    ),
    *(
        (CARD, Workload(task="infer"), Strategy(placement=where))
        for where in ("mixed_offload", "disk_offload", "cpu")
    ),
    (CARD, Workload(task="infer", batch_size=4), Strategy(attention="eager", cache="static")),
    (CARD, Workload(task="infer"), Strategy(quant="nf4", quant_experts="nf4")),
    (CARD, Workload(task="train", lora_variant="dora"), Strategy(quant="nf4", upcast_frozen=True)),
    (CARD, Workload(task="train", method="full"), Strategy(kernels="liger", loss="fused")),
    (TWO, Workload(task="infer"), Strategy()),
]
MODELS = [model for model in all_models() if model.same_as is None]
EVERY = 4
"""Beside the three precisions, a model gets every so many of the jobs, and its neighbours the others."""
SECONDS = 40.0
"""Of processor time, for all of them together; about 13 on a slow core. Each is new: nothing is cached."""


def check(model: ModelProfile, jobs: Sequence[tuple[Machine, Workload, Strategy]]) -> None:
    loaded = {}
    for machine, work, how in jobs:
        found = estimate(model, machine, work, how)
        where = f"{model.id} {work.task} {work.method} {how.quant} {how.placement}"
        followed = all(is_followed(layer.attention) for layer in architecture_of(model).kinds)
        assert found.verdict in (
            ("fits", "tight", "does_not_fit") if followed else ("unknown", "does_not_fit")
        ), where
        assert found.reasons and found.host.ram_bytes > 0 and found.disk.bytes > 0, where
        assert len(found.gpus) == (0 if how.placement == "cpu" else len(machine.gpus)), where
        for gpu in found.gpus:
            assert sum(line.bytes for line in gpu.components) == gpu.allocated_peak_bytes, where
            assert all(line.bytes > 0 for line in gpu.components), where
            assert gpu.load_bytes <= gpu.required_bytes < gpu.process_bytes, where
            assert gpu.low_bytes <= gpu.process_bytes <= gpu.high_bytes, where
            # a model is no larger than its parameters in the compute dtype, and a few percent for rounding
            if model.parameters and len(machine.gpus) == 1 and how.placement == "full_gpu":
                assert gpu.load_bytes < 2.2 * model.parameters + 2**27, where
        if found.gpus and work.task == "infer" and how == Strategy(quant=how.quant):
            loaded.setdefault(how.quant, found.gpus[0].load_bytes)
    assert loaded["nf4"] <= loaded["int8"] <= loaded["none"], model.id


def test_the_catalogue_is_whole() -> None:
    assert len(all_models()) >= 245


def test_every_model_and_every_job() -> None:
    before = time.process_time()
    for turn, model in enumerate(MODELS):
        check(model, (*JOBS[:3], *JOBS[3 + turn % EVERY :: EVERY]))
    assert time.process_time() - before < SECONDS


@pytest.mark.parametrize("name", ["h200", "rtx-3060-12gb", "mi300x"])
def test_two_bytes_a_parameter_decide_what_loads(name: str) -> None:
    machine = machine_from_gpus([(load_gpu(name), 1)])
    for model in MODELS:
        if not model.parameters:
            continue
        gpu = estimate(model, machine, Workload(task="infer"), Strategy()).gpus[0]
        assert gpu.budget_bytes is not None
        if 2 * model.parameters > 1.05 * gpu.budget_bytes:
            assert gpu.low_bytes > gpu.budget_bytes, model.id


def test_mixers_nobody_followed_are_never_said_to_fit():
    unfollowed = [
        model for model in MODELS if not all(is_followed(x.attention) for x in architecture_of(model).kinds)
    ]
    assert {"nvidia-nemotron-3-nano-30b-a3b-bf16", "nemotron-h-56b-base-8k"} <= {m.id for m in unfollowed}
    assert all(not m.id.startswith("qwen3") for m in unfollowed)
