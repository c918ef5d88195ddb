"""Apple silicon: the chip's GPU shares the host's memory, up to a limit of macOS."""

from __future__ import annotations

from msgspec.structs import replace

from planner.inspect.host import attempt
from planner.inspect.system import System
from planner.machine import default_reserve_bytes, unified_share
from planner.types import Gpu, Host
from planner.units import MIB
from profiles.hardware import find_gpus
from profiles.schema import GpuProfile


def inspect_apple(system: System, host: Host, notes: list[str]) -> tuple[Gpu, ...]:
    """The chip as one card of unified memory; none on Macs with Intel processors. Free is what macOS lets the
    GPU use (`iogpu.wired_limit_mb` where it is set), as far as RAM is available."""
    chip, total = host.cpu or "", host.ram_total_bytes
    if not chip.startswith("Apple ") or total is None:
        notes.append("no card read: this Mac has no Apple silicon, or its memory cannot be read")
        return ()
    wired = attempt("iogpu.wired_limit_mb", lambda: system.sysctl("iogpu.wired_limit_mb"), notes)
    limit = (
        int(wired) * MIB if wired and wired.isdecimal() and int(wired) else unified_share("apple", total)[0]
    )
    available = host.ram_available_bytes
    profile = _profile(chip, total, notes)
    gpu = Gpu(
        index=0,
        profile=profile,
        total_bytes=total,
        free_bytes=limit if available is None else min(limit, available),
        reserve_bytes=default_reserve_bytes(profile),
    )
    return (gpu,)


def _profile(chip: str, total: int, notes: list[str]) -> GpuProfile:
    """The chip with this memory; where it is listed with other memory sizes only, their common facts."""
    listed = find_gpus(chip)
    for card in listed:
        if card.memory_bytes == total:
            return card
    identity = chip.lower().replace(" ", "-")
    notes.append(f"{chip} with this memory is not in the catalogue")
    if listed:
        return replace(listed[0], id=identity, name=chip, memory_bytes=total, memory_basis="live")
    return GpuProfile(
        id=identity, name=chip, vendor="apple", memory_bytes=total, memory_basis="live", unified_memory=True
    )
