"""What the smallest allocator cap leaves above the allocated peak of a run that is there, played out."""

from __future__ import annotations

from functools import lru_cache

from msgspec import Struct

from planner.memory.infer import inference_memory, prefill_pass
from planner.memory.lasting import lasting
from planner.memory.replay import TrainingRun
from planner.memory.replay_generation import played_generation
from planner.memory.train import training_memory, training_pass
from planner.types import Strategy, Workload
from profiles.schema import Architecture


class Holes(Struct, frozen=True):
    """Free bytes that a run leaves in segments where others are in use."""

    bytes: int
    peak_share: float
    """The played run's allocated peak over the estimate's: 1 where both hold the same moments."""


@lru_cache(maxsize=2048)
def steady_holes(arch: Architecture, work: Workload, how: Strategy, workspace: int) -> Holes | None:
    """Play a resident run on one card; None for what is not played (a draft model, parts of a prompt, a share
    of a model)."""
    if how.speculate != "none" or how.prefill_chunk_tokens or not arch.embeddings or arch.final_norm is None:
        return None
    if work.task == "infer":
        return _generation(arch, work, how, workspace)
    return _training(arch, work, how, workspace)


def _training(arch: Architecture, work: Workload, how: Strategy, workspace: int) -> Holes:
    p = training_pass(arch, work, how)
    found = TrainingRun(arch, work, how, p, workspace).play()
    fixed = sum(line.bytes for line in lasting(arch, work, how, p, workspace).lines)
    peak = training_memory(arch, work, how, workspace).peak.bytes
    return Holes(found.holes, (found.allocated_peak - found.lasting + fixed) / peak)


def _generation(arch: Architecture, work: Workload, how: Strategy, workspace: int) -> Holes:
    found = played_generation(arch, work, prefill_pass(arch, work, how), workspace)
    memory = inference_memory(arch, work, how, workspace)
    return Holes(found.holes, (found.allocated_peak + memory.load_bytes) / memory.peak.bytes)
