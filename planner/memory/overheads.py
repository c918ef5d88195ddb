"""Memory that no tensor accounts for: the CUDA context, library workspaces, fragmentation of the allocator.

Contexts, workspaces and the RAM of a process are data (`profiles/overheads.json`), each with its measurement.
What was measured on one card is applied to others with a wider interval, never as if it had been measured
there. The shares of `slack` are a model, held against benchmarks/calibration.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from msgspec import Struct

from planner.memory.moments import CardMemory, Snapshot
from planner.memory.steady import Holes
from planner.types import Strategy, Workload
from planner.units import MIB
from profiles.data import read_table
from profiles.schema import Architecture, GpuProfile


class Context(Struct, frozen=True):
    """CUDA context and loaded kernels: bytes of a process beside its allocator."""

    low: int
    typical: int
    high: int
    measured: bool


class Slack(Struct, frozen=True):
    """Bytes an allocator cap must leave above the allocated peak."""

    low: int
    typical: int
    high: int
    formula: str


@cache
def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.json.decode(read_table("overheads.json"))
    return facts


def cublas_workspace(card: GpuProfile | None) -> int:
    """Bytes of one cuBLAS workspace: by the major version of the card's compute capability."""
    facts = _facts()["cublas_workspace"]
    major = (card.compute_capability or "").split(".")[0] if card else ""
    return int(facts["by_major"].get(major, facts["default_bytes"]))


def context_additions(work: Workload, how: Strategy) -> tuple[str, ...]:
    """What a job loads into the context beside what its task loads, by the names in `overheads.json`: kernels
    of LLM.int8; those of a cache that is written in place or on a stream of its own; engine stream's."""
    apart = work.task == "infer" and how.cache in ("static", "offloaded")
    asked = {
        "int8_adds_bytes": how.quant == "int8",
        "cache_adds_bytes": apart and how.engine != "stream",
        "stream_adds_bytes": how.engine == "stream",
    }
    return tuple(name for name, adds in asked.items() if adds)


def context(card: GpuProfile, arch: Architecture, work: Workload, how: Strategy) -> Context:
    """CUDA context for a job: more kernels are loaded for training, for int8 and for some caches."""
    facts = _facts()["context"]
    measured = facts["measured"]
    base = measured[f"{work.task}_bytes"] + sum(measured[name] for name in context_additions(work, how))
    here = card.compute_capability == measured["compute_capability"]
    scale = measured if here else facts["elsewhere"]
    typical = base if here else int(base * facts["elsewhere"]["factor"])
    high = base * scale["high_factor"]
    if work.task == "infer" and any(layer.feed_forward.experts is not None for layer in arch.kinds):
        high = max(high, measured["grouped_experts_high_bytes"])
    return Context(int(base * scale["low_factor"]), typical, int(high), here)


def sources() -> dict[str, str]:
    """Which measurement each figure comes from: by table, and `context_elsewhere` for other cards."""
    facts = _facts()
    return {
        "cublas_workspace": facts["cublas_workspace"]["source"],
        "context": facts["context"]["measured"]["source"],
        "context_elsewhere": facts["context"]["elsewhere"]["source"],
        "process_ram": facts["process_ram"]["source"],
    }


def process_ram(on_card: bool) -> int:
    """Anonymous RAM of a process with torch and its friends imported."""
    return int(_facts()["process_ram"]["cuda_bytes" if on_card else "cpu_bytes"])


class Shares(Struct, frozen=True):
    """Bytes as shares of what chance has a part in."""

    peak: float
    holes: float
    beside_weights: float = 0.0
    """Of the peak beside the weights."""
    fixed: int = 0

    def of(self, peak: int, holes: int, beside: int) -> int:
        """Their sum."""
        return int(self.peak * peak + self.holes * holes + self.beside_weights * beside) + self.fixed


class Residual(Struct, frozen=True):
    """What measured caps need beside the played run."""

    typical: float
    """Middle, leaning upwards, as a share of the allocated peak."""
    below: Shares
    above: Shares
    """Room on both sides of the played run: each is passed by one run in twenty."""


_RESIDUALS = {
    "adapters": Residual(0.007, Shares(0.003, 0.3), Shares(0.013, 0.3, fixed=16 * MIB)),
    "adapters, no checkpointing": Residual(
        0.006, Shares(0.007, 0.0, fixed=20 * MIB), Shares(0.013, 0.0, fixed=32 * MIB)
    ),
    "full": Residual(0.0, Shares(0.008, 0.25), Shares(0.01, 0.1)),
    "generation": Residual(0.002, Shares(0.001, 0.1, 0.08), Shares(0.005, 0.18, 0.145)),
}
"""Split conformal, by regime: quantiles over the caps of the half `fit` of the accuracy grid (55 generations;
60 training cells, whose workspaces had been cleared, against a run played alike) and the brackets of
benchmarks/calibration. Beside them 0.3 % of the peak are left open on both sides (`planner.estimate`). What a
played run lacks are blocks of 1 MiB and less, and the chance in where large ones settle: in a generation only
what lies beside the weights takes part in that."""
_EXPANDABLE = (0.005, 14 * MIB), (0.015, 52 * MIB)
"""Engine stream is the executor's own, which has expandable segments: share of the peak and bytes, typical
and high. Six generations on an H200 reserved 0.57 to 0.98 % more than they allocated; of the two others
(benchmarks/streaming/results.jsonl) one was held by its loading, one had filled its cap. A cap leaves 20 MiB
free (`executor.vram_cap`)."""


class Idle(Struct, frozen=True):
    """What a streamed training leaves idle between its tensors: where a layer's largest blocks come and go
    there is room for one that is not there."""

    blocks: float
    """Of the largest block of a layer in work: a weight made whole for its product, or by `_LARGEST` of all
    that there is at once."""
    checkpoint: int
    """Beside each checkpoint that stays on the card, less than a page of 20 MiB."""
    fixed: int


_LARGEST = 0.08
_IDLE = Idle(1.0, 2 * MIB, 0), Idle(1.1, 10 * MIB, 40 * MIB)
"""Typical and high. Seven plans on an H200 reserved 0.9 to 1.1 such blocks above their measured peak with
checkpoints in RAM, and 1 to 5 MiB more a checkpoint on the card. Under caps of 0.3 to 0.8 blocks above it an
8B ran out of memory, a 7B with less than 0.5; with 0.7 the 7B did not (benchmarks/streaming, `results.jsonl`
and `caps.jsonl`)."""
_APART = 0.5
"""Of the difference between the played run's allocated peak and the estimate's, left open above."""


def slack(
    card: CardMemory, arch: Architecture, work: Workload, how: Strategy, holes: Holes | None = None
) -> Slack:
    """Fragmentation: what the smallest working cap adds to the allocated peak.

    `holes`: of the run as it was played on the allocator; without them, shares of the peak and of its largest
    block, as for runs whose layers come and go.
    """
    peak = card.peak.bytes
    if how.engine == "stream":
        if work.task == "train":
            typical, high = (_idle(card, arch, how, left) for left in _IDLE)
        else:
            typical, high = (int(share * peak) + n for share, n in _EXPANDABLE)
        return Slack(0, typical, high, "pages that are in use in part")
    if holes is None:
        return _shares(card, arch, work, how)
    share, beside = _RESIDUALS[_regime(work, how)], peak - card.load_bytes
    apart = int(_APART * abs(holes.peak_share - 1) * peak)
    return Slack(
        max(0, holes.bytes - share.below.of(peak, holes.bytes, beside)),
        holes.bytes + int(share.typical * peak),
        holes.bytes + share.above.of(peak, holes.bytes, beside) + apart,
        "what the step leaves free in segments that are in use",
    )


def _idle(card: CardMemory, arch: Architecture, how: Strategy, left: Idle) -> int:
    in_work = sum(item.bytes for item in card.peak.lines if item.name == "layer in work")
    largest = max(card.dequantized_bytes, _LARGEST * in_work)
    kept = arch.layers if how.gradient_checkpointing and not how.activation_offload else 0
    return int(left.blocks * largest) + kept * left.checkpoint + left.fixed


def _regime(work: Workload, how: Strategy) -> str:
    if work.task == "infer":
        return "generation"
    if work.method == "full":
        return "full"
    return "adapters" if how.gradient_checkpointing else "adapters, no checkpointing"


def _shares(card: CardMemory, arch: Architecture, work: Workload, how: Strategy) -> Slack:
    """Modelled on the brackets of 52 runs (smallest of nine caps that worked, benchmarks/calibration). What
    makes holes is a large block asked for again when smaller lasting ones have settled in its place:
    optimizer states created after the first step's logits, a tied embedding's gradients, the
    feed-forward's activations of a long prefill. `typical` leans to the upper end of the brackets: a cap
    that is too small ends a run. A moment below the peak decides where it leaves more holes: otherwise a
    larger job, whose peak lies in a moment without any, would seem to need less.
    """
    rooms = []
    for shot in card.leading:
        room, below = _slack_at(shot, card, arch, work, how), card.peak.bytes - shot.bytes
        rooms.append(Slack(room.low - below, room.typical - below, room.high - below, room.formula))
    deciding = max(rooms, key=lambda room: room.typical)
    return Slack(
        max(room.low for room in rooms), deciding.typical, max(room.high for room in rooms), deciding.formula
    )


def _slack_at(shot: Snapshot, card: CardMemory, arch: Architecture, work: Workload, how: Strategy) -> Slack:
    """What a cap must leave above the bytes of one moment."""
    if work.task == "infer":
        return _inference_slack(shot, card, how)
    if work.method == "full":
        return _full_slack(shot, arch, how)
    peak = shot.bytes
    share = 0.02 if not how.gradient_checkpointing else 0.03 if how.quant != "none" else 0.022
    # liger's Triton kernels are compiled and loaded while the run goes on, beside the allocator
    loaded = 100 * MIB if how.kernels == "liger" else 0
    high = max(0.035 * peak, 1.3 * share * peak) + 96 * MIB + 0.15 * shot.largest_block + loaded
    return Slack(int(0.005 * peak), int(share * peak) + loaded, int(high), "adapters between large blocks")


def _inference_slack(shot: Snapshot, card: CardMemory, how: Strategy) -> Slack:
    """Holes of the prefill's widest activation, of one dequantized matrix, and of assembling fused
    experts."""
    peak, block = shot.bytes, shot.largest_block
    typical = min(2 * block, 0.5 * block + 450 * MIB)
    if how.quant != "none":
        typical += 0.75 * card.dequantized_bytes
    else:
        typical += 0.9 * (card.load_peak_bytes - card.load_bytes)
    typical = min(typical, 0.12 * peak)
    # keys and values that settle in the holes of a prompt's activations make the next ones need new places:
    # up to 0.48 of what a run takes beside its weights, in two of the 57 caps of the half `fit` 0.52 at most
    # (benchmarks/accuracy/results.jsonl)
    high = max(1.1 * typical, 0.48 * max(0, peak - card.load_bytes), 0.015 * peak + 32 * MIB)
    return Slack(0, int(typical), int(high), f"blocks of {block / MIB:.0f} MiB")


def _full_slack(shot: Snapshot, arch: Architecture, how: Strategy) -> Slack:
    """Full fine-tuning: states that settle where the first logits were, gradients of embeddings."""
    peak, block = shot.bytes, shot.largest_block
    small = 0.015 * peak
    resident = how.optimizer.startswith(("adamw_torch", "rmsprop", "adagrad"))
    if shot.moment == "loss" and how.gradient_checkpointing and resident:
        return Slack(int(0.4 * block), int(1.2 * block), int(1.6 * block), "states settle where logits were")
    share = (0.7 if arch.head is None else 0.2) if how.gradient_checkpointing else 0.1
    typical = max(small, share * block)
    return Slack(0, int(typical), int(max(0.035 * peak, 1.7 * share * block + small)), "large gradients")
