"""The screen of `planner explain`: moments as bars, the arithmetic of every line, what must be free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.anatomy import WeightGroup
from planner.explain import CardExplanation, ExplainedLine, Explanation, Rates, Step
from planner.render import describe
from planner.render.catalogue import new_table
from planner.render.console import print_item
from planner.render.text import STYLES, gib, one_line, parameters, verdict
from planner.types import Machine, Strategy, Workload
from planner.units import GIB, format_bytes, format_gib
from profiles.schema import Architecture

BAR = 30
"""Columns of the largest bar."""


def print_explanation(
    out: Console,
    shown: Explanation,
    target: Machine,
    work: Workload,
    how: Strategy,
    arch: Architecture | None = None,
) -> None:
    """Draw the whole screen. `arch`: the model's, as far as the head of the page tells of it."""
    out.print(Text(f"{one_line(shown.model.id)} · {parameters(shown.model.parameters)} parameters", "bold"))
    out.print(describe.job(work))
    out.print(describe.strategy(how, work, arch))
    out.print(f"on {describe.machine(target)}")
    for card in shown.cards:
        _print_card(out, card)
    _heading(out, "weights by group")
    out.print(_weights(shown.weights))
    _heading(out, "what one more costs")
    for text in _rates(shown.rates, work):
        print_item(out, text)
    if shown.host:
        _heading(out, "host RAM")
        _print_lines(out, shown.host)
    out.print()
    out.print(Text.assemble(("verdict  ", "bold"), (verdict(shown.verdict), STYLES[shown.verdict])))
    for reason in shown.reasons:
        print_item(out, reason)


def _heading(out: Console, text: str) -> None:
    out.print()
    out.print(Text(text, "bold"))


def _print_card(out: Console, card: CardExplanation) -> None:
    _heading(out, f"card {card.index}: the peak is the moment {card.peak_moment.replace('_', ' ')}")
    print_item(out, card.why, bullet="", indent=0)
    out.print()
    out.print(_moments(card))
    _heading(out, "what is alive then")
    _print_lines(out, card.lines)
    _heading(out, "from there to what must be free")
    out.print(_way(card))
    for step in card.steps[1:]:
        print_item(out, f"{step.name} ({step.basis}): {step.why}")
    budget = "not known" if card.budget_bytes is None else f"{gib(card.budget_bytes, digits=2)} GiB"
    out.print(f"budget: {budget}, {card.budget_basis}")


def _moments(card: CardExplanation) -> Table:
    table = new_table("moment", "GiB", "")
    table.columns[2].justify = "left"
    largest = max((bar.bytes for bar in card.moments), default=1)
    for bar in card.moments:
        peak = bar.name == card.peak_moment
        drawn = "█" * max(1, round(BAR * bar.bytes / largest)) + (" the peak" if peak else "")
        table.add_row(
            bar.name.replace("_", " "), gib(bar.bytes, digits=2), drawn, style="bold" if peak else None
        )
    return table


def _print_lines(out: Console, lines: Sequence[ExplainedLine]) -> None:
    """Name, size and share on one line, the arithmetic under it."""
    for line in lines:
        head = f"{line.name:<30} {line.bytes / GIB:>8.3f} GiB {line.share:>6.1%}  {line.basis}"
        out.print(Text(head))
        print_item(out, one_line(line.arithmetic), bullet="= ", indent=2)
        if line.source is not None:
            print_item(out, one_line(line.source), bullet="measured: ", indent=4)


def _way(card: CardExplanation) -> Table:
    table = new_table("", "low", "typical", "high")
    for step in card.steps:
        table.add_row(step.name, *(_signed(n, step) for n in (step.low, step.typical, step.high)))
    ends = (gib(n, digits=2) for n in (card.low_bytes, card.process_bytes, card.high_bytes))
    table.add_row("process, GiB", *ends, style="bold")
    return table


def _signed(n: int, step: Step) -> str:
    text = f"{n / GIB:.2f}"
    return text if step.name == "allocated peak" else f"+{text}" if n >= 0 else text


def _weights(groups: Sequence[WeightGroup]) -> Table:
    table = new_table("group", "parameters", "GiB", "B each", "stored")
    table.columns[4].justify, table.columns[4].no_wrap = "left", False
    for group in groups:
        each = f"{group.bytes / group.parameters:.3f}" if group.parameters else "–"
        table.add_row(group.group, parameters(group.parameters), gib(group.bytes, digits=3), each, group.note)
    total, count = sum(group.bytes for group in groups), sum(group.parameters for group in groups)
    table.add_row(
        "all", parameters(count), gib(total, digits=3), f"{total / max(count, 1):.3f}", style="bold"
    )
    return table


def _rates(rates: Rates, work: Workload) -> Iterator[str]:
    cache = rates.cache
    if work.task == "infer":
        yield f"token of a sequence in the KV cache: {format_bytes(cache.bytes_per_token)} = {cache.formula}"
        for window, layers in cache.windows.items():
            yield f"{layers} layers keep {window} tokens at most"
        if cache.constant_bytes:
            yield f"sequence, whatever its length: {format_bytes(cache.constant_bytes)} of recurrent state"
        yield f"logits: {format_bytes(rates.logits_copy_bytes)} in float32, of the last position alone"
    else:
        yield f"copy of the logits in float32: {format_gib(rates.logits_copy_bytes)}{_copies(rates)}"
    for kind in rates.layers:
        where = f"one of {kind.layers} layers ({kind.attention})"
        forward = f"input {format_bytes(kind.input)}, at work {format_bytes(kind.forward_peak)}"
        if work.task == "infer":
            yield f"{where}: {forward}"
        else:
            yield (
                f"{where}: {forward}; saved without checkpointing {format_bytes(kind.saved)}; "
                f"in backward {format_bytes(kind.backward_peak)}"
            )
    if rates.trained_parameters and rates.optimizer_bytes_per_parameter is not None:
        managed = rates.managed_bytes_per_parameter or 0
        more = f" and {managed:.2f} B of managed memory" if managed else ""
        yield (
            f"trained parameter: {rates.optimizer_bytes_per_parameter:.2f} B of optimizer state{more}; "
            f"{rates.trained_parameters:,} are trained"
        )


def _copies(rates: Rates) -> str:
    return "" if rates.logits_copies is None else f"; the loss holds {rates.logits_copies:.2f} of them"
