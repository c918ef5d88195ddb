"""LoRA adapters: which tensors they are and what they weigh.

LoRA (arXiv:2106.09685): each adapted linear of `inputs` x `outputs` gains A (r x inputs) and B (outputs x
r); DoRA (arXiv:2402.09353) adds a magnitude of `outputs`. peft's `all-linear` takes every `nn.Linear`
except the output projection; experts kept as 3-D parameters stay frozen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from planner.memory.weights import layer_linears
from planner.types import Workload
from profiles.schema import Architecture, Linear

EXPERT_NAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Where experts are fused, peft reads these names as the experts' 3-D parameters, which cannot have dropout:
linears called so are left alone there (planner/exact/adapters.py)."""

ROUTER = "router"
"""A router of this name is a linear that answers with scores, weights and indices (Llama 4, Phi-MoE); peft
adapts only those that answer with one tensor."""


def fuses_experts(arch: Architecture) -> bool:
    """Are any experts kept as 3-D parameters?"""
    experts = (layer.feed_forward.experts for layer in arch.kinds)
    return any(item is not None and item.fused for item in experts)


def is_target(linear: Linear, targets: str, fused_experts: bool) -> bool:
    """Does LoRA adapt this linear? `attention`: every linear inside a module called attn or attention."""
    *path, last = linear.name.split(".")
    if fused_experts and (last in EXPERT_NAMES or last == ROUTER):
        return False
    return targets == "all-linear" or any("attn" in part or "attention" in part for part in path)


def _linears(arch: Architecture) -> Iterator[tuple[Linear, int]]:
    """Every `nn.Linear` peft may adapt, with how often it occurs."""
    counts = [0] * len(arch.kinds)
    for kind in arch.order:
        counts[kind] += 1
    for layer, count in zip(arch.kinds, counts, strict=True):
        for item in layer_linears(layer):
            yield item, count
        experts = layer.feed_forward.experts
        if experts is not None:
            for router in experts.router:
                if isinstance(router, Linear):
                    yield router, count
            if not experts.fused:
                for item in experts.linears:
                    yield item, count * experts.count
    for item in arch.linears:
        yield item, 1
    for tower in arch.towers:
        for item in tower.block_linears:
            yield item, tower.blocks
        for item in tower.linears:
            yield item, 1


@lru_cache(maxsize=1024)
def adapter_tensors(arch: Architecture, rank: int, targets: str, variant: str) -> tuple[tuple[int, int], ...]:
    """(elements of a tensor, how many of them) for every tensor LoRA adds."""
    counts: dict[int, int] = {}
    fused = fuses_experts(arch)
    for item, count in _linears(arch):
        if not is_target(item, targets, fused):
            continue
        sizes = [item.inputs * rank, item.outputs * rank]
        if variant == "dora":
            sizes.append(item.outputs)
        for size in sizes:
            counts[size] = counts.get(size, 0) + count
    return tuple(sorted(counts.items()))


def adapter_parameters(arch: Architecture, work: Workload) -> int:
    """Trainable elements of the job's adapters.

    Qwen2.5-7B, r = 8, all-linear: 20,185,088 (measured by peft's own count).
    """
    return sum(
        size * count
        for size, count in adapter_tensors(arch, work.lora_rank, work.lora_targets, work.lora_variant)
    )
