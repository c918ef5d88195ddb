"""The screen of `planner estimate`: components of the peak, the totals they lead to, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from planner.energy import Cost, training_cost
from planner.render import describe
from planner.render.catalogue import new_table
from planner.render.console import print_item
from planner.render.text import (
    STYLES,
    duration,
    gib,
    interval,
    one_line,
    parameters,
    rate,
    tokens_per_s,
    verdict,
)
from planner.types import Estimate, GpuEstimate, Machine, MemoryLine, Speed, Strategy, Workload
from profiles.schema import Architecture


def print_estimate(
    out: Console,
    estimate: Estimate,
    target: Machine,
    work: Workload,
    how: Strategy,
    arch: Architecture | None = None,
) -> None:
    """Draw the whole screen. `arch`: the model's, as far as the head of the page tells of it."""
    out.print(
        Text(f"{one_line(estimate.model.id)} · {parameters(estimate.model.parameters)} parameters", "bold")
    )
    out.print(describe.job(work))
    out.print(describe.strategy(how, work, arch))
    out.print(f"on {describe.machine(target)}")
    if estimate.defaulted:
        out.print("filled from transformers' defaults: " + ", ".join(estimate.defaulted))
    for gpu in estimate.gpus:
        out.print()
        out.print(*_gpu(gpu), sep="\n")
    out.print()
    if estimate.host.components:
        out.print(components(estimate.host.components, "host RAM"))
        out.print()
    if estimate.disk.components:
        out.print(components(estimate.disk.components, "disk"))
        out.print()
    out.print(_needs(estimate))
    if estimate.measured_here is not None:
        print_item(out, describe.measured(estimate.measured_here), "measured here: ", indent=0)
    cost = training_cost(target, work, how, estimate.speed)
    if cost is not None:
        out.print(_cost(cost))
    out.print(Text.assemble(("verdict  ", "bold"), (verdict(estimate.verdict), STYLES[estimate.verdict])))
    for reason in estimate.reasons:
        print_item(out, reason)


def components(lines: tuple[MemoryLine, ...], title: str) -> Table:
    """Memory line by line with formula and basis."""
    table = new_table(title, "GiB", "basis", "formula")
    table.columns[0].max_width = 28
    for column in table.columns[2:]:
        column.justify, column.no_wrap, column.overflow = "left", False, "fold"
    for line in lines:
        table.add_row(line.name, gib(line.bytes, digits=2), line.basis, one_line(line.formula))
    return table


def _gpu(gpu: GpuEstimate) -> Iterator[RenderableType]:
    yield components(gpu.components, f"card {gpu.index} at its peak: {gpu.peak_moment.replace('_', ' ')}")
    yield ""
    table = new_table(f"card {gpu.index}", "GiB", "meaning")
    table.columns[2].justify, table.columns[2].no_wrap = "left", False
    rows = (
        ("after loading", gpu.load_bytes, "allocated when the weights are there"),
        ("allocated peak", gpu.allocated_peak_bytes, "what torch.cuda.max_memory_allocated() will say"),
        ("required", gpu.required_bytes, "smallest allocator cap that works"),
        ("context", gpu.context_bytes, "CUDA context and libraries"),
        (
            "process",
            gpu.process_bytes,
            f"must be free; 90 % interval {interval(gpu.low_bytes, gpu.high_bytes)}",
        ),
    )
    for name, n, meaning in rows:
        table.add_row(name, gib(n, digits=2), meaning, style="bold" if name == "process" else None)
    if gpu.managed_bytes:
        table.add_row(
            "managed", gib(gpu.managed_bytes, digits=2), "paged memory, kept in RAM when the card is full"
        )
    table.add_row("budget", gib(gpu.budget_bytes, digits=2), gpu.budget_basis)
    yield table
    if gpu.moments:
        peaks = [f"{name.replace('_', ' ')} {gib(n, digits=2)}" for name, n in gpu.moments.items()]
        yield ""
        yield "peak of each moment, GiB: " + " · ".join(peaks)


def _needs(estimate: Estimate) -> str:
    host, disk = estimate.host, estimate.disk
    pinned = f" ({gib(host.pinned_bytes)} pinned)" if host.pinned_bytes else ""
    lines = [
        f"RAM      {gib(host.ram_bytes)} GiB{pinned}, disk {gib(disk.bytes)} GiB",
        f"speed    {speeds(estimate.speed)}",
    ]
    return "\n".join(lines)


def _cost(cost: Cost) -> str:
    """Time and energy of the whole training, with their ranges."""
    hours = [duration(3600 * each) for each in (cost.hours.typical, cost.hours.low, cost.hours.high)]
    text = f"time     {hours[0]} ({hours[1]} to {hours[2]})"
    if cost.kwh is None:
        return text
    low, typical, high = (f"{each:.3g}" for each in (cost.kwh.low, cost.kwh.typical, cost.kwh.high))
    return f"{text}, {typical} kWh ({low} to {high}) on the card at {cost.watts} W"


def speeds(speed: Speed) -> str:
    """Every known speed with its range and what limits it."""
    known = (
        ("prefill", speed.prefill_tokens_per_s),
        ("decode", speed.decode_tokens_per_s),
        ("training", speed.train_tokens_per_s),
    )
    parts = [
        f"{name} {tokens_per_s(value)} ({rate(value.low)}–{rate(value.high)})"
        for name, value in known
        if value is not None
    ]
    if not parts:
        return "not known for this card"
    bound = f"; limited by {speed.bound}" if speed.bound else ""
    return ", ".join(parts) + bound + (f"; rates: {speed.basis}" if describe.probed(speed) else "")
