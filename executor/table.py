"""Predicted against measured as a table; plain text where there is no terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from executor.memory_errors import Shortage
from executor.report import pairs
from planner.types import Candidate, RunReport
from planner.units import format_bytes

_LABELS = {
    "load_bytes": "after loading",
    "allocated_peak_bytes": "allocated peak",
    "context_bytes": "context and libraries",
    "process_bytes": "process, spare of the allocator included",
    "managed_bytes": "managed memory",
    "ram_bytes": "host RAM",
    "decode_tokens_per_s": "decode tokens/s",
    "prefill_tokens_per_s": "prefill tokens/s",
    "train_tokens_per_s": "training tokens/s",
}


def show(report: RunReport, candidate: Candidate, folder: Path) -> None:
    """Print the report's table and where things are to stdout."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    answer = (
        None if sys.stdout.isatty() else _only_answer(folder)
    )  # on a terminal it was shown as it was made
    if answer is not None:
        print(answer, end="\n\n")
    console.print(_head(report))
    console.print(_table(report, candidate))
    if report.bytes_streamed:
        console.print(_streamed(report), soft_wrap=True)
    if report.task == "train" and report.losses:
        console.print(f"loss {report.losses[0]:.4f} → {report.losses[-1]:.4f} over {report.steps} steps")
    guessed = report.speculation
    if guessed is not None and guessed.tokens_per_pass is not None:
        drafts = f"{guessed.accepted} of {guessed.drafted} drafted tokens were right"
        console.print(f"speculation: {guessed.tokens_per_pass:.2f} tokens a pass, {drafts}")
    for line in (*report.skipped, *report.notes):
        console.print(f"[dim]note:[/dim] {escape(line)}", soft_wrap=True)
    for name in ("adapter", "model", "outputs.jsonl", "report.json"):
        if (folder / name).exists():
            console.print(f"{name:<14} {escape(str(folder / name))}", soft_wrap=True)


def _only_answer(folder: Path) -> str | None:
    """The text of a run that answered one prompt."""
    try:
        rows = (folder / "outputs.jsonl").read_text().splitlines()
    except OSError:
        return None
    return str(json.loads(rows[0])["text"]) if len(rows) == 1 else None


def show_left(tried: Sequence[tuple[Candidate, Shortage | None, str]], before: Sequence[str]) -> None:
    """Every candidate that was left, on stderr: what was predicted for the moment it failed in, what it asked
    for, what it could have, and the line that was too small."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("candidate", "ran out in", "predicted", "asked for", "room", "line"):
        number = name in ("predicted", "asked for", "room")
        table.add_column(name, justify="right" if number else "left", no_wrap=name != "line")
    for candidate, lack, reason in tried:
        if lack is None:
            table.add_row(_way(candidate), "—", "—", "—", "—", escape(reason))
            continue
        sizes = (lack.predicted_bytes, lack.wanted_bytes, lack.room_bytes)
        line = lack.line or "—"
        if lack.line is not None and lack.line_wanted_bytes is not None:
            predicted, needed = format_bytes(lack.line_predicted_bytes), format_bytes(lack.line_wanted_bytes)
            line = f"{line}: {predicted} predicted, {needed} needed"
        cells = ["—" if n is None else format_bytes(n) for n in sizes]
        table.add_row(_way(candidate), lack.moment.replace("_", " "), *cells, escape(line))
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)
    for reason in before:
        console.print(escape(reason), soft_wrap=True)
    console.print(table)


def _way(candidate: Candidate) -> str:
    how = candidate.strategy
    return f"{candidate.rank}: {how.dtype}, {how.quant}, {how.placement}"


def _head(report: RunReport) -> str:
    from rich.markup import escape

    strategy = report.strategy
    job = report.workload.method if report.task == "train" else "inference"
    return (
        f"[bold]{escape(report.model.id)}[/bold]  {job}, {strategy.dtype}, weights {strategy.quant}, "
        f"engine {report.engine}, on {report.environment.get('gpu') or report.device}"
    )


def _streamed(report: RunReport) -> str:
    """Layers that came to the device for each pass, and how fast."""
    layers = report.layers_resident + report.layers_streamed
    text = (
        f"{report.layers_streamed} of {layers} layers streamed, {format_bytes(report.bytes_streamed)} in all"
    )
    text += _rate(report.link_bytes_per_s)
    if report.layers_on_disk:
        text += f"; {report.layers_on_disk} of them from disk{_rate(report.disk_bytes_per_s)}"
    return text


def _rate(bytes_per_s: float | None) -> str:
    return "" if bytes_per_s is None else f" at {format_bytes(int(bytes_per_s))}/s"


def _table(report: RunReport, candidate: Candidate) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("figure")
    for name in ("predicted", "measured", "error"):
        table.add_column(name, justify="right")
    for name, predicted, measured in table_rows(report, candidate):
        known = predicted and measured is not None
        error = f"{measured / predicted - 1:+.1%}" if known else "—"  # type: ignore[operator]
        table.add_row(name, _value(name, predicted), _value(name, measured), error)
    return table


def table_rows(report: RunReport, candidate: Candidate) -> list[tuple[str, float | None, float | None]]:
    """(label, predicted, measured) of every figure one side knows, components after their totals."""
    rows: list[tuple[str, float | None, float | None]] = []
    components = _component_rows(report, candidate)
    for name, (predicted, measured) in pairs(candidate, report).items():
        if predicted or measured:
            rows.append((_LABELS[name], predicted, measured))
        # on the CPU the parts of the process cannot be told apart as the estimate does
        if name == "allocated_peak_bytes" and report.load_bytes is not None:
            rows += components
    return rows


def _component_rows(report: RunReport, candidate: Candidate) -> list[tuple[str, float | None, float | None]]:
    on_card = report.load_bytes is not None
    gpus = candidate.estimate.gpus
    lines = gpus[0].components if on_card and gpus else candidate.estimate.host.components
    predicted = {line.name: line.bytes for line in lines}
    names = list(dict.fromkeys([*predicted, *report.components]))
    return [(f"  {name}", predicted.get(name), report.components.get(name)) for name in names]


def _value(label: str, value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:,.1f}" if label.endswith("tokens/s") else format_bytes(int(value))
