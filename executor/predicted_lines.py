"""The lines of an estimate at any moment of a run; the plan holds those of the peak only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from planner.errors import FitwrightError
from planner.estimate import normal, normal_strategy
from planner.memory.infer import inference_memory
from planner.memory.overheads import cublas_workspace
from planner.memory.streamed import parts_of, streamed_memory
from planner.memory.train import training_memory
from planner.placement import tiers_of
from planner.types import Candidate, GpuEstimate, MemoryLine, Plan
from profiles.architecture import loaded_architecture


def is_estimated(candidate: Candidate, resident_layers: int | None = None) -> bool:
    """Whether what runs is what the candidate's estimate is about: not where the command line names another
    engine or, for engine stream, another number of residents."""
    planned = candidate.estimate.placement.layers_on_gpu
    other = candidate.engine == "stream" and resident_layers not in (None, planned)
    return candidate.engine == candidate.strategy.engine and not other


def lines_at(plan: Plan, candidate: Candidate, moment: str) -> dict[str, int]:
    """Predicted bytes by line at `moment` on the first card, or of the host where the run needs no card.

    Empty where the plan does not say: lines that would not add up to the plan's own figure are not shown.
    """
    gpus = candidate.estimate.gpus
    if not is_estimated(candidate):
        return {}
    if not gpus:
        return _summed(candidate.estimate.host.components)
    if moment == "load":
        return {"weights": gpus[0].moments.get("load", gpus[0].load_bytes)}
    if moment == gpus[0].peak_moment:
        return _summed(gpus[0].components)
    lines = _recomputed(plan, candidate, gpus[0], moment)
    return lines if sum(lines.values()) == gpus[0].moments.get(moment) else {}


def _recomputed(plan: Plan, candidate: Candidate, gpu: GpuEstimate, moment: str) -> dict[str, int]:
    """By the planner's own model of a run on one card."""
    card = next((card for card in plan.machine.gpus if card.index == gpu.index), None)
    streams = candidate.engine == "stream"
    if card is None or not plan.model.config or not (streams or candidate.strategy.placement == "full_gpu"):
        return {}
    run = training_memory if plan.workload.task == "train" else inference_memory
    try:
        work = normal(plan.workload)
        how = normal_strategy(candidate.strategy, work)
        arch = loaded_architecture(plan.model.config)
        memory = run(arch, work, how, cublas_workspace(card.profile))
        if streams:
            tiers = tiers_of(arch, candidate.estimate.placement)
            memory = streamed_memory(memory, parts_of(arch, how), tiers)
    except (FitwrightError, TypeError, ValueError, KeyError):
        return {}
    shots = [shot for shot in memory.snapshots if shot.moment == moment]
    return _summed(max(shots, key=lambda shot: shot.bytes).lines) if shots else {}


def _summed(lines: Iterable[MemoryLine]) -> dict[str, int]:
    total: dict[str, int] = defaultdict(int)
    for line in lines:
        total[line.name] += line.bytes
    return dict(total)
