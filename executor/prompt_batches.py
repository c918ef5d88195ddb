"""Prompts into batches that fill the card as planned.

Prompts of like length go together, so that little is padded, and the longest go first, so that what does not
fit is known at once. A batch holds as many sequences as need no more memory than the planned batch of
planned lengths: shorter prompts make larger batches, longer ones smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from planner.errors import FitwrightError
from planner.memory.infer import inference_memory
from planner.types import Strategy, Workload
from profiles.architecture import loaded_architecture
from profiles.schema import Architecture


def schedule(tokens: Sequence[int], most: Callable[[int], int]) -> list[list[int]]:
    """Batches of prompt numbers. `tokens`: of each prompt; `most`: sequences of a batch, by its longest one.

    >>> schedule([5, 90, 7, 80], lambda longest: 1 if longest > 50 else 8)
    [[1], [3], [2, 0]]
    """
    order = sorted(range(len(tokens)), key=lambda number: -tokens[number])
    batches: list[list[int]] = []
    while order:
        size = most(tokens[order[0]])
        batches.append(order[:size])
        order = order[size:]
    return batches


def largest_batch(
    facts: Mapping[str, Any], work: Workload, how: Strategy, prompt_tokens: int, new_tokens: int
) -> int:
    """Sequences of so many tokens that need no more memory than the planned batch, by the same estimate that
    the plan was made with; at least 1. `facts`: the model's config.

    The planned size where the facts describe no architecture that can be estimated.
    """
    try:
        arch = loaded_architecture(facts)
    except FitwrightError:
        return work.sequences
    room = _needed(arch, work, how)
    asked = replace(work, prompt_tokens=prompt_tokens, new_tokens=new_tokens, concurrency=1)

    def fits(size: int) -> bool:
        needed = _needed(arch, replace(asked, batch_size=size), how)
        return all(a <= b for a, b in zip(needed, room, strict=True))

    low, high = 1, 2  # the first is taken whether it fits or not
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _needed(arch: Architecture, work: Workload, how: Strategy) -> tuple[int, int]:
    """Bytes on the card and in RAM, apart from where weights are kept: that is the same for every batch."""
    memory = inference_memory(arch, work, replace(how, placement="full_gpu", engine="resident"), 0)
    return memory.peak.bytes, memory.host_bytes
