"""The lists of models and cards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from planner.render import describe
from planner.render.narrow import TurningTable
from planner.render.text import STYLES, UNKNOWN, gib, parameters, rate, tokens, verdict, with_interval
from planner.reverse import ModelFit
from profiles.schema import GpuProfile, ModelProfile


def new_table(*columns: str, left: int = 1, title: str | None = None) -> Table:
    """A table without frames whose first `left` columns hold names and the others numbers."""
    table = TurningTable(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=title,
        title_justify="left",
        title_style="bold",
    )
    table.names = left
    for i, column in enumerate(columns):
        names = i < left
        table.add_column(
            column,
            justify="left" if names else "right",
            no_wrap=not names,
            overflow="fold" if names else "ellipsis",
        )
    return table


GPUS_NOTE = "TFLOPS: dense bf16, else fp16. USD: price at launch, not of today."


def gpus_table(cards: Iterable[GpuProfile]) -> Table:
    """Memory, rates, power and launch of each card; a dash is what nobody published."""
    table = new_table("card", "GiB", "GB/s", "TFLOPS", "watts", "launched", "then USD")
    for card in cards:
        rate = card.bf16_flops_per_s or card.fp16_flops_per_s
        table.add_row(
            card.id,
            gib(card.memory_bytes),
            scaled(card.bandwidth_bytes_per_s, 10**9),
            scaled(rate, 10**12),
            plain(card.power_watts),
            card.launch_date[:7] if card.launch_date else UNKNOWN,
            plain(card.launch_price_usd),
        )
    return table


MODELS_NOTE = "count ✓: our arithmetic gives the published parameter count, or says why not; ?: not verified."


def models_table(models: Sequence[ModelProfile]) -> Table:
    """Parameters, context and release of each model."""
    table = new_table("model", "parameters", "active", "context", "released", "count")
    for model in models:
        table.add_row(
            model.id,
            parameters(model.parameters),
            parameters(model.active_parameters) if model.active_parameters else "",
            tokens(model.context_tokens),
            model.released or UNKNOWN,
            "?" if model.verification.status == "unverified" else "✓",
        )
    return table


def scaled(value: float | None, unit: int) -> str:
    """A rate in `unit`s with three digits at most, or a dash."""
    if value is None:
        return UNKNOWN
    value /= unit
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plain(value: int | None) -> str:
    """A whole number, or a dash."""
    return UNKNOWN if value is None else str(value)


def fits_table(fits: Sequence[ModelFit]) -> Table:
    """Models a machine can run or train, with the way that suits each best."""
    table = new_table("model", "size", "weights", "card or RAM GiB", "verdict", "tok/s")
    table.columns[4].justify = "left"
    for fit in fits:
        estimate = fit.estimate
        speed = estimate.speed.train_tokens_per_s or estimate.speed.decode_tokens_per_s
        gpu = max(estimate.gpus, key=lambda gpu: gpu.process_bytes, default=None)
        word = verdict(estimate.verdict) + ("" if fit.usable else ", slow")
        table.add_row(
            fit.model.id,
            parameters(fit.model.parameters),
            describe.weights(fit.strategy),
            with_interval(gpu.process_bytes, gpu.low_bytes, gpu.high_bytes)
            if gpu
            else gib(estimate.host.ram_bytes),
            Text(word, STYLES[estimate.verdict] if fit.usable else "yellow"),
            rate(speed.typical if speed else None),
        )
    return table
