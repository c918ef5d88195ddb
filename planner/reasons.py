"""Why a candidate stands where it does, as text a user can read."""

from __future__ import annotations

from planner.machine import free_ram
from planner.rank import (
    INFER_WEIGHTS,
    LEAST_DECODE_TOKENS_PER_S,
    LEAST_TRAIN_SHARE,
    TRAIN_WEIGHTS,
    Field,
    Scored,
    footprint,
    rank_key,
    share_left,
    usable,
)
from planner.rules import has_sinks, lacks_sdpa
from planner.strategies import Prefer, departures
from planner.streaming_reasons import streaming_reasons
from planner.types import GOOD, Estimate, Machine, Strategy, Workload
from planner.units import format_bytes, format_gib


def reasons(field: Field, scored: Scored, fastest: float | None) -> tuple[str, ...]:
    """Why a candidate stands where it does, as sentences a user can read."""
    strategy, workload = scored.strategy, field.workload
    lines = [_fit_text(scored.estimate, field.machine), _weights_text(field, strategy)]
    lines.append(speed_text(scored, workload))
    if usable(scored, workload, fastest) == 2:
        lines.append(_slow_text(workload))
    lines += [lever.reason for lever in departures(field.machine, workload, strategy)]
    if workload.task == "infer" and strategy.speculate != "none":
        lines.append(SPECULATES)
    lines += streaming_reasons(field, strategy, scored.estimate)
    return (*lines, *notes(field, strategy))


SPECULATES = (
    "the speed is the one without speculation: a pass that accepts n drafted tokens gives n + 1 of them"
)
_WORTHWHILE = 1.1
"""A gain in predicted speed below this is within the prediction's error."""
_BOUND = {
    "memory bandwidth": "memory bandwidth",
    "compute": "compute",
    "launch": "the host, which launches kernels one by one",
    "link": "the link between RAM and card",
    "disk": "the disk",
}


def speed_text(scored: Scored, workload: Workload) -> str:
    """Typical speed with its range, and what limits it."""
    speed, bound = scored.speed, scored.estimate.speed.bound
    if speed is None:
        return "speed unknown: the hardware's rates are not known"
    kind = "training" if workload.task == "train" else "decode"
    limit = f", limited by {_BOUND.get(bound, bound)}" if bound else ""
    return f"{_figure(speed.typical)} tokens/s {kind} ({_figure(speed.low)} to {_figure(speed.high)}){limit}"


def static_text(usual: Scored, static: Scored) -> str | None:
    """What `--cache static` would give in place of the usual cache; None where it does not pay or fit."""
    before, after = usual.speed, static.speed
    if before is None or after is None or static.estimate.verdict not in GOOD:
        return None
    if after.typical < _WORTHWHILE * before.typical:
        return None
    more = footprint(static.estimate) - footprint(usual.estimate)
    size = f"{format_bytes(abs(more))} {'more' if more > 0 else 'less'}" if more else "no more memory"
    return (
        f"with --cache static: {_figure(after.typical)} tokens/s, one step recorded and replayed, for {size}"
    )


def _figure(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.2g}"


def notes(field: Field, strategy: Strategy) -> tuple[str, ...]:
    """What a user should know about a strategy on this hardware, whatever its rank."""
    machine, workload = field.machine, field.workload
    lines = []
    if strategy.placement == "cpu":
        if workload.task == "train" and strategy.optimizer.startswith("paged_"):
            lines.append("paged optimizers are not paged on a CPU: bitsandbytes keeps their state in RAM")
    else:
        vendors = {gpu.profile.vendor for gpu in machine.gpus} - {"nvidia"}
        if vendors:
            lines.append(
                f"the executor is not built for {'/'.join(sorted(vendors))} cards yet: an estimate only"
            )
        if len(machine.gpus) > 1:
            lines.append(_cards_text(len(machine.gpus), workload, strategy))
        if strategy.dtype == "fp16":
            lines.append("fp16, since the card has no bf16")
    if lacks_sdpa(field.arch):
        without = "attention sinks" if has_sinks(field.arch) else "its cap on attention logits"
        lines.append(f"eager attention: transformers has no other for this model that keeps {without}")
    tokens = workload.seq_len if workload.task == "train" else workload.prompt_tokens + workload.new_tokens
    longest = field.arch.max_position_embeddings
    if longest is not None and tokens > longest:
        lines.append(f"{tokens} tokens are more than the {longest} this model was made for")
    stored = field.arch.pretrained_quantization
    if stored is not None and not stored.startswith("bitsandbytes-"):
        lines.append(f"the published checkpoint is stored in {stored}; this needs a copy in {strategy.dtype}")
    return tuple(lines)


def _cards_text(cards: int, workload: Workload, strategy: Strategy) -> str:
    if strategy.engine in ("accelerate", "stream"):
        return f"offload uses the first of the {cards} cards"
    if workload.task == "infer":
        return f"layers are split over {cards} cards, which work in turn"
    return f"one full replica a card: {cards} cards train no larger model than one"


def _fit_text(estimate: Estimate, machine: Machine) -> str:
    verdict = estimate.verdict.replace("_", " ")
    if not estimate.gpus:
        free = free_ram(machine)
        return f"{verdict}: {format_gib(estimate.host.ram_bytes)} of {format_gib(free)} RAM"
    gpu = min(estimate.gpus, key=lambda g: share_left(g.high_bytes, g.budget_bytes))
    left = (gpu.budget_bytes or 0) - gpu.high_bytes
    spare = f", at least {format_gib(left)} to spare" if left > 0 else ""
    needed = format_gib(gpu.process_bytes)
    return f"{verdict}: {needed} of {format_gib(gpu.budget_bytes)} on card {gpu.index}{spare}"


def _weights_text(field: Field, strategy: Strategy) -> str:
    table = TRAIN_WEIGHTS if field.workload.task == "train" else INFER_WEIGHTS
    if strategy.quant == "none":
        return f"{strategy.dtype} weights: nothing is lost"
    return table[strategy.quant].reason


def _slow_text(workload: Workload) -> str:
    if workload.task == "infer":
        return f"too slow to use: under {LEAST_DECODE_TOKENS_PER_S:g} tokens/s"
    return f"too slow to use: under {LEAST_TRAIN_SHARE:.0%} of the fastest way that fits"


def compared(field: Field, better: Scored, worse: Scored, fastest: float | None) -> str:
    """The first thing that puts one candidate behind another, as a clause."""
    mine, theirs = rank_key(field, worse, fastest), rank_key(field, better, fastest)
    names: dict[Prefer, tuple[str, ...]] = {
        "quality": ("keeps less quality", "slower", "further from the defaults", "less to spare"),
        "speed": ("slower", "keeps less quality", "further from the defaults", "less to spare"),
        "headroom": ("less to spare", "keeps less quality", "slower", "further from the defaults"),
    }
    clauses = (
        "fits less well",
        "too slow to use",
        *names[field.prefer],
        "a less simple placement",
        "the same in all that counts",
    )
    return next(clause for clause, a, b in zip(clauses, mine, theirs, strict=True) if a != b)
