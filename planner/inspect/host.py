"""RAM, swap and processors as this process may use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from planner.inspect.cgroup import MemoryLimit, Mount, cpu_limit, memory_limit
from planner.inspect.system import System
from planner.types import Host

T = TypeVar("T")


def inspect_host(system: System, mounts: list[Mount], notes: list[str]) -> Host:
    """The host inside the container's limits; what cannot be read stays None and leaves a note."""
    memory = attempt("RAM", system.memory, notes)
    swap = attempt("swap space", system.swap, notes)
    none = MemoryLimit(None, None, None)
    limit = attempt("the container's memory limit", lambda: memory_limit(system, mounts), notes) or none
    quota = attempt("the container's CPU limit", lambda: cpu_limit(system, mounts), notes)
    cores = attempt("the number of processors", system.cores, notes)
    if quota is not None:
        cores = max(1, min(cores or int(quota), int(quota)))
    return Host(
        ram_total_bytes=_least(memory and memory[0], limit.total),
        ram_available_bytes=_least(memory and memory[1], limit.available),
        swap_total_bytes=_least(swap and swap[0], limit.swap if swap else None),
        swap_free_bytes=_least(swap and swap[1], limit.swap if swap else None),
        locked_limit_bytes=attempt("the limit of locked memory", system.locked_limit, notes),
        cpu=attempt("the processor's name", lambda: cpu_name(system), notes),
        cores=cores,
        system=attempt("the operating system's name", system.describe, notes),
    )


def cpu_name(system: System) -> str | None:
    """The processor's name from the system's own tables, else what Python knows."""
    if system.platform == "darwin":
        return system.sysctl("machdep.cpu.brand_string") or system.processor()
    # The whole file is slow to make on machines with many cores; the name stands in its first lines.
    for line in (system.read("/proc/cpuinfo", 4096) or "").splitlines():
        field, _, value = line.partition(":")
        if field.strip() in ("model name", "Model", "cpu model") and value.strip():
            return " ".join(value.split())
    return system.processor()


def attempt(what: str, read: Callable[[], T], notes: list[str]) -> T | None:
    """What `read` gives, or None and a note that says what could not be read and why."""
    try:
        return read()
    except Exception as error:
        notes.append(f"cannot read {what}: {reason(error)}")
        return None


def reason(error: BaseException) -> str:
    """An exception as part of a line."""
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)
