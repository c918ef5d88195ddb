"""Measured rates of a machine beside those of the catalogue."""

from __future__ import annotations

from rich.table import Table

from planner.rates import link_bytes_per_s
from planner.render.catalogue import new_table
from planner.render.text import UNKNOWN
from planner.types import Gpu, ProbeResult

GB, TERA = 10**9, 10**12


def probe_table(probe: ProbeResult, gpu: Gpu | None) -> Table:
    """One row for each figure that was measured; the catalogue's is the card's or the link's peak."""
    table = new_table("rate", "measured", "catalogue", "of it")
    for name, measured, listed, unit, unit_name in _rows(probe, gpu):
        if measured is None:
            continue
        share = f"{measured / listed:.0%}" if listed else UNKNOWN
        table.add_row(name, _value(measured, unit, unit_name), _value(listed, unit, unit_name), share)
    if probe.launch_seconds is not None:
        table.add_row("kernel launch", f"{probe.launch_seconds * 1e6:.1f} µs", UNKNOWN, UNKNOWN)
    return table


def _rows(
    probe: ProbeResult, gpu: Gpu | None
) -> tuple[tuple[str, float | None, float | None, int, str], ...]:
    link = link_bytes_per_s(gpu) if gpu else None
    card = gpu.profile if gpu else None
    both = 2 * link if link else None
    fp32 = "matrix products fp32" if gpu else "matrix products fp32, CPU"
    return (
        ("host to card, pinned", probe.host_to_device_bytes_per_s, link, GB, "GB/s"),
        ("card to host, pinned", probe.device_to_host_bytes_per_s, link, GB, "GB/s"),
        ("host to card, pageable", probe.pageable_bytes_per_s, link, GB, "GB/s"),
        ("both ways at once", probe.duplex_bytes_per_s, both, GB, "GB/s"),
        (
            "card memory",
            probe.device_bandwidth_bytes_per_s,
            card.bandwidth_bytes_per_s if card else None,
            GB,
            "GB/s",
        ),
        (
            "matrix products bf16",
            probe.bf16_flops_per_s,
            card.bf16_flops_per_s if card else None,
            TERA,
            "T/s",
        ),
        (
            "matrix products fp16",
            probe.fp16_flops_per_s,
            card.fp16_flops_per_s if card else None,
            TERA,
            "T/s",
        ),
        (fp32, probe.fp32_flops_per_s, card.fp32_flops_per_s if card else None, TERA, "T/s"),
        ("matrix products int8", probe.int8_ops_per_s, card.int8_ops_per_s if card else None, TERA, "T/s"),
        ("disk, buffered", probe.disk_read_bytes_per_s, None, GB, "GB/s"),
        ("disk, direct", probe.disk_direct_bytes_per_s, None, GB, "GB/s"),
    )


def _value(rate: float | None, unit: int, name: str) -> str:
    return UNKNOWN if rate is None else f"{rate / unit:.3g} {name}"
