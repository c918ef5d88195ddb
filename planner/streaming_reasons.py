"""What a user should know about a candidate whose layers stream, as sentences."""

from __future__ import annotations

from planner.memory.streamed import Parts, parts_of, traffic
from planner.placement import Tiers, tiers_of
from planner.rank import Field
from planner.speed import free_copies_tokens
from planner.types import Estimate, Strategy
from planner.units import format_bytes

_FEW_DIGITS = 2


def streaming_reasons(field: Field, strategy: Strategy, estimate: Estimate) -> list[str]:
    """Where layers are, what a pass moves, and from how many tokens on that costs no time; none for another
    engine."""
    if strategy.engine != "stream" or not estimate.gpus:
        return []
    parts, tiers = parts_of(field.arch, strategy), tiers_of(field.arch, estimate.placement)
    lines = [_layers_text(parts, tiers, estimate)]
    if tiers.head_away:
        lines.append(
            f"embeddings stay in RAM, and the output projection comes in {len(parts.head_blocks)} blocks"
        )
    elif tiers.embeddings_away:
        lines.append("embeddings stay in RAM: a pass takes only its tokens' rows")
    free = free_copies_tokens(field.arch, field.machine, field.workload, strategy, estimate.placement)
    if free is not None:
        lines.append(_free_text(free, field, strategy))
    return lines


def _layers_text(parts: Parts, tiers: Tiers, estimate: Estimate) -> str:
    placed = estimate.placement
    where = [f"{placed.layers_on_gpu} of {parts.layers} layers stay on the card"]
    if placed.layers_in_ram:
        where.append(f"{placed.layers_in_ram} wait in RAM")
    if placed.layers_on_disk:
        where.append(f"{placed.layers_on_disk} are read from disk")
    moved = format_bytes(traffic(parts, tiers, train=False).link)
    return f"{', '.join(where)}; a pass brings {moved} to the card"


def _free_text(tokens: int, field: Field, strategy: Strategy) -> str:
    about = f"{_rounded(tokens):,}"
    if field.workload.task == "train":
        here = field.workload.batch_size * field.workload.seq_len
        if here >= tokens:
            return f"streaming costs no time: {here:,} tokens a step, and from about {about} on copies hide"
        return f"copies hide behind the computation from about {about} tokens a step on; here it is {here:,}"
    more = "" if strategy.speculate != "none" else ": batches or --speculate lookup give more for it"
    return f"a pass of up to about {about} tokens takes as long as one of a single token{more}"


def _rounded(tokens: int) -> int:
    """To two digits: the rates behind it are no better."""
    return int(float(f"{tokens:.{_FEW_DIGITS}g}"))
