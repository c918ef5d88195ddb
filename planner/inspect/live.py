"""From what a driver says of a card to its profile: the catalogue's where it lists the card, else NVML's.

Pure. Rates of an unlisted card: bandwidth = memory clock x 2 transfers x bus width / 8 (RTX 4090: 10501 MHz
x 2 x 384 / 8 = 1008 GB/s); fp32 = cores x 2 x SM clock. Its tensor rate is not known to NVML; the least ratio
of tensor to fp32 rate among listed cards of the same compute capability stands in and errs on the slow side.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from msgspec import Struct

from profiles.hardware import all_gpus, find_gpus, parse_capability
from profiles.schema import GpuProfile

MEMORY_TOLERANCE = 0.08
"""Error correction takes 1/16 of GDDR memory, and can be switched on and off."""


class LiveFacts(Struct, frozen=True, kw_only=True):
    """What NVML says of a card; None where it does not."""

    name: str
    total_bytes: int
    capability: str | None = None
    cores: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    bus_bits: int | None = None
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    power_watts: int | None = None
    display: bool | None = None
    """A display is connected or active."""
    integrated: bool = False
    """Memory shared with the CPU."""


def listed_profile(facts: LiveFacts) -> GpuProfile | None:
    """The card of the catalogue that goes by this name, with this memory (within 8 %) and compute capability;
    None where there is none or several that differ in speed."""
    fitting = [card for card in find_gpus(facts.name, modified=True) if _agrees(card, facts)]
    distance = {card.id: abs(card.memory_bytes - facts.total_bytes) for card in fitting}
    nearest = [card for card in fitting if distance[card.id] == min(distance.values())]
    same = {(card.bandwidth_bytes_per_s, card.bf16_flops_per_s, card.fp16_flops_per_s) for card in nearest}
    return nearest[0] if len(same) == 1 else None


def unlisted_profile(facts: LiveFacts) -> GpuProfile:
    """A profile from NVML alone. Unknown rates stay None."""
    capability = parse_capability(facts.capability)
    fp32 = _product(facts.cores, 2, facts.sm_clock_mhz, 10**6)
    fp16 = _scaled(fp32, _least_ratio(facts.capability, lambda card: card.fp16_flops_per_s))
    return GpuProfile(
        id=slug(facts.name),
        name=facts.name,
        vendor="nvidia",
        memory_bytes=facts.total_bytes,
        memory_basis="live",
        unified_memory=facts.integrated,
        bandwidth_bytes_per_s=_product(facts.memory_clock_mhz, 2 * 10**6, facts.bus_bits, divisor=8),
        bf16=None if capability is None else capability >= (8, 0),
        bf16_flops_per_s=fp16 if capability is not None and capability >= (8, 0) else None,
        fp16_flops_per_s=fp16,
        fp32_flops_per_s=fp32,
        fp8=capability is not None and capability >= (8, 9),
        fp4=capability is not None and capability >= (10, 0),
        compute_capability=facts.capability,
        pcie_generation=facts.pcie_generation,
        pcie_lanes=facts.pcie_lanes,
        power_watts=facts.power_watts,
        display=facts.display is not False,
    )


def slug(name: str) -> str:
    """An id from a name: `NVIDIA Foo 42 (rev B)` -> `nvidia-foo-42-rev-b`."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower())) or "unnamed"


def _agrees(card: GpuProfile, facts: LiveFacts) -> bool:
    if card.compute_capability and facts.capability and card.compute_capability != facts.capability:
        return False
    return abs(facts.total_bytes - card.memory_bytes) <= MEMORY_TOLERANCE * card.memory_bytes


def _least_ratio(capability: str | None, rate: Callable[[GpuProfile], int | None]) -> float | None:
    ratios = [
        value / card.fp32_flops_per_s
        for card in all_gpus()
        if capability and card.compute_capability == capability and card.fp32_flops_per_s
        if (value := rate(card)) is not None
    ]
    return min(ratios, default=None)


def _product(*factors: int | None, divisor: int = 1) -> int | None:
    product = 1
    for factor in factors:
        if not factor:
            return None
        product *= factor
    return product // divisor


def _scaled(value: int | None, ratio: float | None) -> int | None:
    return None if value is None or ratio is None else int(value * ratio)
