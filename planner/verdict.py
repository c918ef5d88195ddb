"""Verdicts: fits, tight, does not fit, unknown - each with its reasons as text.

fits: the high end of every card's interval is within its budget. tight: the budget lies inside an interval.
does_not_fit: a budget is under the low end. RAM and disk are judged the same way where they are known.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.machine import free_ram
from planner.types import (
    DiskEstimate,
    GpuEstimate,
    HostEstimate,
    Machine,
    PlacementMap,
    Strategy,
    Verdict,
    Workload,
)
from planner.units import format_gib

_WORST_FIRST: tuple[Verdict, ...] = ("does_not_fit", "unknown", "tight", "fits")

RAM_UNCERTAINTY = 0.15
"""Half-width of the interval put around host RAM: few of its parts have been measured."""


def judge(
    machine: Machine,
    gpus: Sequence[GpuEstimate],
    host: HostEstimate,
    disk: DiskEstimate,
    how: Strategy,
    work: Workload,
    placement: PlacementMap,
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict of a job and why, worst reason first."""
    found = [_card(gpu) for gpu in gpus]
    found.append(_ram(machine, host, decides=not gpus or how.placement == "mixed_offload"))
    found.append(_disk(machine, disk, how, placement))
    if len(gpus) > 1 and work.task == "train":
        found.append(("fits", "training is one full replica a card until sharding is built"))
    if placement.layers_in_ram and gpus:
        found.append(("fits", f"{placement.layers_in_ram} of {_layers(placement)} layers stay in RAM"))
    if placement.layers_on_disk:
        found.append(("fits", f"{placement.layers_on_disk} of {_layers(placement)} layers stay on disk"))
    worst = min((verdict for verdict, _ in found), key=_WORST_FIRST.index)
    ordered = sorted(found, key=lambda item: _WORST_FIRST.index(item[0]))
    return worst, tuple(text for _, text in ordered if text)


def _layers(placement: PlacementMap) -> int:
    return placement.layers_on_gpu + placement.layers_in_ram + placement.layers_on_disk


def _card(gpu: GpuEstimate) -> tuple[Verdict, str]:
    interval = f"{format_gib(gpu.low_bytes)} to {format_gib(gpu.high_bytes)}"
    needs = f"card {gpu.index} needs {format_gib(gpu.process_bytes)} ({interval})"
    if gpu.budget_bytes is None:
        return "unknown", f"{needs}; what is free there is not known"
    has = f"has {format_gib(gpu.budget_bytes)}"
    if gpu.high_bytes <= gpu.budget_bytes:
        return "fits", f"{needs}, {has}: {format_gib(gpu.budget_bytes - gpu.process_bytes)} to spare"
    if gpu.low_bytes <= gpu.budget_bytes:
        return "tight", f"{needs}, {has}: inside the interval, so it may or may not run"
    return "does_not_fit", f"{needs}, {has}: {format_gib(gpu.low_bytes - gpu.budget_bytes)} short at least"


def _ram(machine: Machine, host: HostEstimate, decides: bool) -> tuple[Verdict, str]:
    available = free_ram(machine)
    needs = f"needs {format_gib(host.ram_bytes)} of RAM"
    if available is None:
        return (
            "unknown" if decides and not machine.gpus else "fits"
        ), f"{needs}; how much there is was not said"
    has = f"{format_gib(available)} available"
    if host.ram_bytes * (1 + RAM_UNCERTAINTY) <= available:
        return "fits", f"{needs}, {has}" if decides else ""
    if host.ram_bytes * (1 - RAM_UNCERTAINTY) <= available:
        return "tight", f"{needs}, {has}: within the uncertainty"
    return "does_not_fit", f"{needs}, {has}"


def _disk(
    machine: Machine, disk: DiskEstimate, how: Strategy, placement: PlacementMap
) -> tuple[Verdict, str]:
    free = max((item.free_bytes for item in machine.disks if item.kind != "memory"), default=None)
    if free is None or disk.bytes <= free:
        return "fits", ""
    text = f"needs {format_gib(disk.bytes)} of disk, {format_gib(free)} free"
    # What the offload folder or a slab file cannot take cannot run; a download may be on disk already.
    runs_from_disk = how.placement == "disk_offload" or placement.layers_on_disk
    return ("does_not_fit" if runs_from_disk else "fits"), text
