"""Rates a job can really reach: catalogue or probed figures times measured efficiencies.

Efficiencies are data (`profiles/efficiency.json`), each with the measurement it came from; three levels bound
what is not known: `low` and `high` name the speed that follows, so a time has its larger value at `low`.
A probe of the machine replaces the catalogue's figure and the efficiency that goes with it. A rate nobody
knows is None, and so is every speed that needs it.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import msgspec
from msgspec import Struct

from planner.identity import identity_cache
from planner.types import Dtype, Gpu, Machine
from profiles.data import read_table
from profiles.hardware import parse_capability

Level = Literal["low", "typical", "high"]
LEVELS: tuple[Level, ...] = ("low", "typical", "high")

# Raw bytes per second of one PCIe lane after line coding, by generation (PCI-SIG base specifications).
PCIE_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}


class Efficiency(Struct, frozen=True):
    """One entry of `profiles/efficiency.json`."""

    id: str
    low: float
    typical: float
    high: float
    of: str
    """What it is a share of, or what takes that long."""
    source: str
    measured: bool


class Rates(Struct, frozen=True, kw_only=True):
    """What one card (or the CPU) does in a second, at one level."""

    bandwidth: float | None
    """Bytes of device memory."""
    compute: float | None
    """Operations in the job's dtype."""
    vector: float | None
    """Operations in fp32."""
    link: float | None
    """Bytes from pinned host memory."""
    pageable: float | None
    """Bytes from pageable host memory."""
    disk: float
    """Bytes read from the disk with the weights."""
    direct: float
    """The same past the page cache, by several threads."""


@cache
def load_efficiencies() -> dict[str, Efficiency]:
    """Every efficiency by id."""
    found = msgspec.json.decode(read_table("efficiency.json"), type=tuple[Efficiency, ...])
    return {entry.id: entry for entry in found}


@cache
def efficiency(name: str, level: Level) -> float:
    """One efficiency at one level."""
    value: float = getattr(load_efficiencies()[name], level)
    return value


def capability(gpu: Gpu) -> tuple[int, int] | None:
    """CUDA compute capability as numbers; None where it is not known or the card has none."""
    return parse_capability(gpu.profile.compute_capability)


def has_bf16(gpu: Gpu) -> bool:
    """Whether the card computes in bf16: as its profile says, else NVIDIA from capability 8.0 on, else where
    a rate is known.

    A card of which nothing is known (`--vram` alone) is taken to have it, as every card since 2020 does.
    """
    known = capability(gpu)
    if gpu.profile.bf16 is not None:
        return gpu.profile.bf16
    if known is not None:
        return known >= (8, 0)
    return gpu.profile.bf16_flops_per_s is not None or gpu.profile.fp16_flops_per_s is None


def auto_dtype(machine: Machine) -> Dtype:
    """bf16 where every card has it, else fp16; bf16 without a card."""
    return "bf16" if all(has_bf16(gpu) for gpu in machine.gpus) else "fp16"


def link_bytes_per_s(gpu: Gpu) -> float | None:
    """Raw rate of the card's link to the host. The fastest generation counts: cards slow an idle link."""
    generation = gpu.pcie_generation_max or gpu.profile.pcie_generation
    lanes = gpu.pcie_lanes or gpu.pcie_lanes_max or gpu.profile.pcie_lanes
    if generation is None or lanes is None or generation not in PCIE_LANE_BYTES_PER_S:
        return None
    return PCIE_LANE_BYTES_PER_S[generation] * lanes


def _scaled(rate: float | None, name: str, level: Level) -> float | None:
    return None if rate is None else rate * efficiency(name, level)


def _compute(gpu: Gpu, machine: Machine, dtype: Dtype, level: Level) -> float | None:
    probed = getattr(machine.probe, f"{dtype}_flops_per_s", None)
    if probed is not None:
        return float(probed)
    card = gpu.profile
    by_dtype = {"bf16": card.bf16_flops_per_s, "fp16": card.fp16_flops_per_s, "fp32": card.fp32_flops_per_s}
    rate = by_dtype[dtype]
    if dtype == "fp32" or rate is None:
        # Without a rate of its own, 16-bit arithmetic is at least as fast as fp32.
        return _scaled(card.fp32_flops_per_s, "vector_compute_achievable", level)
    return _scaled(rate, "compute_achievable", level)


def disk_rate(machine: Machine, level: Level) -> float:
    """Bytes per second that weights are read with: a wide range where the disk's kind is not known."""
    if machine.probe and machine.probe.disk_read_bytes_per_s:
        return float(machine.probe.disk_read_bytes_per_s)
    kind = max(machine.disks, key=lambda disk: disk.free_bytes).kind if machine.disks else "unknown"
    known = kind if kind in ("nvme", "ssd", "hdd", "memory") else "unknown"
    return efficiency(f"disk_{known}_bytes_per_s", level)


def direct_rate(machine: Machine, level: Level) -> float:
    """Bytes per second of direct reads by several threads."""
    if machine.probe and machine.probe.disk_direct_bytes_per_s:
        return float(machine.probe.disk_direct_bytes_per_s)
    return disk_rate(machine, level) * efficiency("direct_reads", level)


def card_rates(machine: Machine, dtype: Dtype, level: Level) -> Rates:
    """Rates of the slowest card of a machine that has one."""
    known = _known_rates(machine)
    if (dtype, level) not in known:
        known[dtype, level] = _card_rates(machine, dtype, level)
    return known[dtype, level]


@identity_cache
def _known_rates(machine: Machine) -> dict[tuple[Dtype, Level], Rates]:
    return {}


def _card_rates(machine: Machine, dtype: Dtype, level: Level) -> Rates:
    gpu = min(machine.gpus, key=lambda g: g.profile.bandwidth_bytes_per_s or 0)
    probe = machine.probe
    vendor = 1.0 if gpu.profile.vendor == "nvidia" else efficiency("other_vendor", level)
    bandwidth = (
        float(probe.device_bandwidth_bytes_per_s)
        if probe and probe.device_bandwidth_bytes_per_s
        else _scaled(gpu.profile.bandwidth_bytes_per_s, "bandwidth_achievable", level)
    )
    link = (
        float(probe.host_to_device_bytes_per_s)
        if probe and probe.host_to_device_bytes_per_s
        else _scaled(link_bytes_per_s(gpu), "link_achievable", level)
    )
    pageable = efficiency("pageable_bytes_per_s", level)
    if probe and probe.pageable_bytes_per_s:
        pageable = float(probe.pageable_bytes_per_s)
    compute, vector = _compute(gpu, machine, dtype, level), _compute(gpu, machine, "fp32", level)
    return Rates(
        bandwidth=bandwidth and bandwidth * vendor,
        compute=compute and compute * vendor,
        vector=vector and vector * vendor,
        link=link,
        # Pageable copies cannot outrun the link.
        pageable=min(pageable, link) if link else pageable,
        disk=disk_rate(machine, level),
        direct=direct_rate(machine, level),
    )


def cpu_rates(machine: Machine, dtype: Dtype, level: Level) -> Rates:
    """Rates of the CPU, from the range that CPUs span: nobody measured this one."""
    cores = machine.host.cores
    per_core = "cpu_bf16_flops_per_core_per_s" if dtype == "bf16" else "cpu_fp32_flops_per_core_per_s"
    return Rates(
        bandwidth=efficiency("cpu_bandwidth_bytes_per_s", level) if cores else None,
        compute=cores * efficiency(per_core, level) if cores else None,
        vector=cores * efficiency("cpu_fp32_flops_per_core_per_s", level) if cores else None,
        link=None,
        pageable=None,
        disk=disk_rate(machine, level),
        direct=direct_rate(machine, level),
    )
