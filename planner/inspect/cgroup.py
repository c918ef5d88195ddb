"""Limits of the container: memory, swap and CPU time of every control group this process is in.

A process belongs to a group and to all groups above it, each with limits of its own; the least one holds.
Both versions are read, since machines with version 1 mount version 2 beside it. Sources: the kernel's
admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from planner.inspect.system import System

_UNLIMITED = 1 << 60
"""Version 1 writes the largest page-aligned number for no limit."""


class MemoryLimit(NamedTuple):
    """Bytes; None for no limit."""

    total: int | None
    available: int | None
    """What is left of it: limit - usage + file cache that can be dropped."""
    swap: int | None


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo."""

    device: str
    root: str
    path: str
    options: frozenset[str]
    filesystem: str
    source: str
    super_options: frozenset[str]


def read_mounts(system: System) -> list[Mount]:
    """The mounts of this process; empty where there is no /proc."""
    mounts = []
    for line in (system.read("/proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) >= 6 and len(right) >= 3:
            options, super_options = frozenset(left[5].split(",")), frozenset(right[2].split(","))
            root, path = _unescaped(left[3]), _unescaped(left[4])
            mounts.append(Mount(left[2], root, path, options, right[0], _unescaped(right[1]), super_options))
    return mounts


def memory_limit(system: System, mounts: list[Mount]) -> MemoryLimit:
    """The least memory and swap limit over all groups, and the least that is left."""
    groups = [
        *(_memory_v2(system, folder) for folder in _folders(system, mounts, None)),
        *(_memory_v1(system, folder) for folder in _folders(system, mounts, "memory")),
    ]
    return MemoryLimit(
        _least(group.total for group in groups),
        _least(group.available for group in groups),
        _least(group.swap for group in groups),
    )


def cpu_limit(system: System, mounts: list[Mount]) -> float | None:
    """Processors' worth of time this process may use: the least quota / period; None for no limit."""
    shares = []
    for folder in _folders(system, mounts, None):
        quota, _, period = (system.read(f"{folder}/cpu.max") or "").strip().partition(" ")
        shares.append(_ratio(_number(quota), _number(period)))
    for folder in _folders(system, mounts, "cpu"):
        quota_us = _number(system.read(f"{folder}/cpu.cfs_quota_us"))
        shares.append(_ratio(quota_us, _number(system.read(f"{folder}/cpu.cfs_period_us"))))
    return min((share for share in shares if share is not None), default=None)


def _memory_v2(system: System, folder: str) -> MemoryLimit:
    read = _reader(system, folder)
    # Above memory.high a group is slowed down until it is of no use, so it counts as a limit.
    limit = _least((read("memory.max"), read("memory.high")))
    used = read("memory.current")
    cache = _field(system.read(f"{folder}/memory.stat"), "inactive_file") or 0
    return MemoryLimit(limit, _left(limit, used, cache), read("memory.swap.max"))


def _memory_v1(system: System, folder: str) -> MemoryLimit:
    read = _reader(system, folder)
    stat = system.read(f"{folder}/memory.stat")
    limit = _least((read("memory.limit_in_bytes"), _bounded(_field(stat, "hierarchical_memory_limit"))))
    used = read("memory.usage_in_bytes")
    both = read("memory.memsw.limit_in_bytes")
    swap = max(0, both - limit) if both is not None and limit is not None else None
    return MemoryLimit(limit, _left(limit, used, _field(stat, "total_inactive_file") or 0), swap)


def _folders(system: System, mounts: list[Mount], controller: str | None) -> Iterator[str]:
    """Folders of this process's group and of those above it, up to where the hierarchy is mounted.
    `controller` names one of version 1; None is version 2."""
    for mount in mounts:
        if mount.filesystem != ("cgroup2" if controller is None else "cgroup"):
            continue
        if controller is not None and controller not in mount.super_options:
            continue
        below = _below(mount.root, _group(system, controller))
        while below:
            yield mount.path.rstrip("/") + below
            below = below.rpartition("/")[0]
        yield mount.path


def _group(system: System, controller: str | None) -> str:
    for line in (system.read("/proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if (controller is None and number == "0" and not names) or controller in names.split(","):
            return path.strip()
    return "/"


def _below(root: str, group: str) -> str:
    """The group's path below the mount; one outside of it (`/../x`) is seen as its root."""
    if ".." in group.split("/"):
        return ""
    inside = group.removeprefix(root.rstrip("/")) if (group + "/").startswith(root.rstrip("/") + "/") else ""
    return inside.rstrip("/")


def _reader(system: System, folder: str) -> Callable[[str], int | None]:
    return lambda name: _bounded(_number(system.read(f"{folder}/{name}")))


def _number(text: str | None) -> int | None:
    stripped = (text or "").strip()
    return int(stripped) if re.fullmatch(r"[0-9]{1,20}", stripped) else None


def _bounded(value: int | None) -> int | None:
    return None if value is None or value >= _UNLIMITED else value


def _field(text: str | None, name: str) -> int | None:
    found = re.search(rf"^{name} ([0-9]+)$", text or "", re.MULTILINE)
    return int(found[1]) if found else None


def _left(limit: int | None, used: int | None, cache: int) -> int | None:
    return None if limit is None or used is None else max(0, min(limit, limit - used + cache))


def _ratio(quota: int | None, period: int | None) -> float | None:
    return quota / period if quota and period else None


def _least(values: Iterator[int | None] | tuple[int | None, ...]) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _unescaped(text: str) -> str:
    """mountinfo writes blanks in paths as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
