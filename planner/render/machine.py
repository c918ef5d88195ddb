"""The screen of `planner inspect`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.machine import budget
from planner.render.catalogue import new_table
from planner.render.console import print_item
from planner.render.probe import probe_table
from planner.render.text import UNKNOWN, gib, one_line
from planner.types import Disk, Gpu, Host, Machine
from planner.units import format_bytes


def print_machine(out: Console, machine: Machine) -> None:
    """Draw cards, host, disks, and what could not be read."""
    for gpu in machine.gpus:
        _print_gpu(out, gpu)
    if not machine.gpus:
        out.print(Text("no GPU in sight", "bold"))
    out.print()
    _print_host(out, machine.host)
    if machine.probe is not None:
        out.print()
        out.print(f"measured by `executor probe` on {machine.probe.date}; these rates are used")
        out.print(probe_table(machine.probe, machine.gpus[0] if machine.gpus else None))
    if machine.disks:
        out.print()
        out.print(_disks(machine.disks))
    for note in machine.notes:
        out.print(f"note: {one_line(note)}")


def _print_gpu(out: Console, gpu: Gpu) -> None:
    profile = gpu.profile
    out.print(Text(f"GPU {gpu.index}  {one_line(profile.name)}", "bold"))
    usable, reason = budget(gpu)
    print_item(out, f"{gib(gpu.total_bytes)} GiB, {gib(usable)} usable ({reason})", "memory   ")
    capability = f"compute capability {profile.compute_capability}" if profile.compute_capability else ""
    dtype = {True: "bf16", False: "no bf16", None: "bf16 not known"}[profile.bf16]
    out.print("  can      " + ", ".join(part for part in (capability, dtype) if part))
    if gpu.pcie_generation or gpu.pcie_generation_max:
        now, most = (
            _link(gpu.pcie_generation, gpu.pcie_lanes),
            _link(gpu.pcie_generation_max, gpu.pcie_lanes_max),
        )
        out.print(f"  link     {now} now, {most} at most")
    power = f"{gpu.power_limit_watts} W limit" if gpu.power_limit_watts else UNKNOWN
    out.print(f"  power    {power}, driver {gpu.driver or UNKNOWN}, catalogue id {profile.id}")
    for process in gpu.processes:
        used = f"{gib(process.used_bytes)} GiB" if process.used_bytes is not None else "an unknown part"
        out.print(f"  in use   {used} by {one_line(process.name or 'a process')} (pid {process.pid})")


def _link(generation: int | None, lanes: int | None) -> str:
    return f"PCIe {generation or '?'} x{lanes or '?'}"


def _print_host(out: Console, host: Host) -> None:
    cores = f", {host.cores} cores" if host.cores else ""
    out.print(Text.assemble(("CPU      ", "bold"), f"{one_line(host.cpu or 'unknown')}{cores}"))
    out.print(
        Text.assemble(
            ("RAM      ", "bold"),
            f"{gib(host.ram_total_bytes)} GiB, {gib(host.ram_available_bytes)} available",
        )
    )
    swap = (
        f"{gib(host.swap_total_bytes)} GiB, {gib(host.swap_free_bytes)} free"
        if host.swap_total_bytes
        else "none"
    )
    locked = "unlimited" if host.locked_limit_bytes is None else f"{format_bytes(host.locked_limit_bytes)}"
    out.print(f"swap     {swap}; memory that may be locked: {locked}")
    if host.system:
        out.print(f"system   {one_line(host.system)}")


def _disks(disks: tuple[Disk, ...]) -> Table:
    table = new_table("disk", "kind", "free GiB", "of GiB")
    for disk in disks:
        table.add_row(one_line(disk.path, 60), disk.kind, gib(disk.free_bytes), gib(disk.total_bytes))
    return table
