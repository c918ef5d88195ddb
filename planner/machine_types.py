"""The machine a job runs on: cards, host, disks, and the rates measured there. All frozen; `planner.types`
has them too, beside the other types that pass between the parts of Fitwright.

Bytes are `int`, rates end in `_per_s`. JSON shape: `fitwright.machine/1`.
"""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct, field

from profiles.schema import GpuProfile

MACHINE_SCHEMA: Final = "fitwright.machine/1"


class GpuProcess(Struct, frozen=True):
    """A process that holds memory on a card now."""

    pid: int
    name: str | None
    used_bytes: int | None


class Gpu(Struct, frozen=True, kw_only=True):
    """One card of a machine: catalogue facts, and what is free now when it is live."""

    index: int
    profile: GpuProfile
    total_bytes: int
    free_bytes: int | None = None
    """NVML free now; None for a card from the catalogue."""
    reserve_bytes: int = 0
    """Held back for a display or by `--reserve`."""
    pcie_generation: int | None = None
    """PCIe generation in use now (cards slow the link when idle)."""
    pcie_generation_max: int | None = None
    pcie_lanes: int | None = None
    pcie_lanes_max: int | None = None
    power_limit_watts: int | None = None
    driver: str | None = None
    uuid: str | None = None
    processes: tuple[GpuProcess, ...] = ()


class Host(Struct, frozen=True, kw_only=True):
    """RAM and CPU as a process may use them (inside the container's cgroup)."""

    ram_total_bytes: int | None = None
    """Physical RAM or the cgroup limit, the smaller; None when not known (a card looked at alone)."""
    ram_available_bytes: int | None = None
    swap_total_bytes: int | None = None
    swap_free_bytes: int | None = None
    locked_limit_bytes: int | None = None
    """RLIMIT_MEMLOCK; None for unlimited."""
    cpu: str | None = None
    cores: int | None = None
    system: str | None = None


class Disk(Struct, frozen=True, kw_only=True):
    """A mounted file system with room for weights."""

    path: str
    total_bytes: int
    free_bytes: int
    kind: Literal["nvme", "ssd", "hdd", "network", "memory", "unknown"] = "unknown"
    device: str | None = None
    filesystem: str | None = None


class ProbeResult(Struct, frozen=True, kw_only=True):
    """Rates measured on this machine by `executor probe`; they replace catalogue figures."""

    date: str
    driver: str | None = None
    host_to_device_bytes_per_s: int | None = None
    device_to_host_bytes_per_s: int | None = None
    pageable_bytes_per_s: int | None = None
    duplex_bytes_per_s: int | None = None
    device_bandwidth_bytes_per_s: int | None = None
    bf16_flops_per_s: int | None = None
    fp16_flops_per_s: int | None = None
    fp32_flops_per_s: int | None = None
    int8_ops_per_s: int | None = None
    launch_seconds: float | None = None
    disk_read_bytes_per_s: int | None = None
    disk_direct_bytes_per_s: int | None = None


class Machine(Struct, frozen=True, kw_only=True):
    """What an estimate is made for. `planner inspect --json` prints one; `--machine FILE` reads it back."""

    schema: Literal["fitwright.machine/1"] = MACHINE_SCHEMA
    origin: Literal["live", "catalogue", "file"] = "catalogue"
    gpus: tuple[Gpu, ...] = ()
    host: Host = field(default_factory=Host)
    disks: tuple[Disk, ...] = ()
    probe: ProbeResult | None = None
    notes: tuple[str, ...] = ()
    """What could not be read and why ("no NVIDIA driver: ...")."""
