"""What accelerate's offload keeps on the card, in RAM and on disk."""

from __future__ import annotations

from math import prod

import pytest

from planner.estimate import estimate
from planner.memory.offload import passing_bytes
from planner.placement import Split
from planner.types import Gpu, Host, Machine, Strategy, Workload
from planner.units import GIB
from profiles.architecture import architecture
from profiles.catalogue import load_model
from profiles.hardware import load_gpu

JOB = Workload(task="infer", prompt_tokens=512, new_tokens=64)
LAYER = 2 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944 + (3584 + 2 * 512) + 2 * 3584)
"""Bytes of one layer of Qwen2.5-7B in bf16: q and o, k and v, three of the feed-forward, biases, norms."""
PLACEMENTS = ("mixed_offload", "disk_offload")


def machine(vram: float) -> Machine:
    card = load_gpu("rtx-3090")
    return Machine(
        gpus=(Gpu(index=0, profile=card, total_bytes=int(vram * GIB)),),
        host=Host(ram_total_bytes=256 * GIB),
    )


def offloaded(name: str, vram: float, placement: str):
    how = Strategy(placement=placement, engine="accelerate")
    return estimate(load_model(name), machine(vram), JOB, how)


def line(lines, name: str) -> int:
    return sum(item.bytes for item in lines if item.name == name)


def test_one_linear_with_its_bias_passes() -> None:
    arch = architecture(load_model("qwen2.5-14b").config)
    assert passing_bytes(arch, Split(40, 1), 2) == 13824 * 5120 * 2
    head = 152064 * 5120 * 2
    assert passing_bytes(arch, Split(0, 1, True), 2) == head
    assert passing_bytes(arch, Split(48, 0), 2) == 0


def test_fused_experts_of_a_layer_pass_together() -> None:
    arch = architecture(load_model("qwen3-30b-a3b").config)
    experts = arch.kinds[0].feed_forward.experts
    assert experts is not None and experts.fused
    assert passing_bytes(arch, Split(10, 1), 2) == 2 * sum(prod(p.shape) for p in experts.parameters)
    assert 2 * max(prod(p.shape) for p in experts.parameters) < passing_bytes(arch, Split(10, 1), 2)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("vram", [4, 6, 9, 12, 14])
def test_as_many_layers_stay_as_fit(placement: str, vram: float) -> None:
    found = offloaded("qwen2.5-7b", vram, placement)
    (card,) = found.gpus
    stay = found.placement.layers_on_gpu
    assert card.high_bytes <= card.budget_bytes < card.high_bytes + 1.1 * LAYER
    assert 0 < stay < 28
    assert line(card.components, "weights") == 2 * 152064 * 3584 * 2 + stay * LAYER + 3584 * 2
    assert line(card.components, "offload buffer") == 18944 * 3584 * 2
    assert sum(item.bytes for item in card.components) == card.allocated_peak_bytes


def test_ram_holds_what_leaves_for_it_and_disk_is_read_in_place() -> None:
    ram, disk = (offloaded("qwen2.5-7b", 8, placement) for placement in PLACEMENTS)
    gone = 28 - ram.placement.layers_on_gpu
    assert line(ram.host.components, "offloaded weights") == gone * LAYER
    assert line(disk.host.components, "offloaded weights") == 0
    assert line(disk.disk.components, "offload folder") == 0, "the checkpoint's own files are read"


def test_experts_put_together_are_written() -> None:
    found = offloaded("qwen3-30b-a3b", 24, "disk_offload")
    away = found.placement.layers_on_disk
    assert away > 0
    assert line(found.disk.components, "offload folder") == away * 128 * 3 * 768 * 2048 * 2


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_something_computes_on_the_card_even_when_everything_leaves(placement: str) -> None:
    found = offloaded("qwen2.5-7b", 2.2, placement)
    assert found.placement.layers_on_gpu == 0
    assert 0 in found.placement.device_map.values()
    assert line(found.gpus[0].components, "weights") == 3584 * 2
    assert line(found.gpus[0].components, "offload buffer") == 152064 * 3584 * 2
