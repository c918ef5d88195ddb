"""Machines that are described rather than read: cards of the catalogue, sizes the user names, saved files.

Nothing here looks at this computer (`planner.inspect` does). `budget` turns a card into the bytes a process
may use, and says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from planner.errors import BadOption
from planner.identity import identity_cache
from planner.machine_file import load_machine_file
from planner.types import Disk, Gpu, Host, Machine
from planner.units import GIB, MIB, format_bytes
from profiles.hardware import LARGEST_COUNT
from profiles.schema import GpuProfile

__all__ = [
    "budget",
    "default_reserve_bytes",
    "free_ram",
    "load_machine_file",
    "machine_from_gpus",
    "override",
    "unified_share",
]

DISPLAY_RESERVE_BYTES = 512 * MIB
NOMINAL_SHARE = 0.98
"""Part of a card's nominal capacity that its driver reports, where nobody recorded the figure. GeForce cards
whose figure is recorded report 99 % or more."""


@dataclass(frozen=True)
class _Share:
    """Part of a unified memory that the GPU may use, and who says so."""

    fraction: float
    reason: str


_APPLE_SMALL = _Share(2 / 3, "macOS lets the GPU use two thirds of it")
_APPLE_LARGE = _Share(3 / 4, "macOS lets the GPU use three quarters of it")
_APPLE_LARGE_FROM = 36 * GIB
"""Metal's recommendedMaxWorkingSetSize: 10.7 of 16 GiB and 21.3 of 32 GiB, but 27 of 36 GiB and 48 of 64 GiB
(logs of llama.cpp; newer versions of macOS allow up to 78 %)."""
_AMD = _Share(1 / 2, "Linux lets the GPU map half of it: amdgpu's gttsize")
"""docs.kernel.org/gpu/amdgpu/module-parameters.html; a part set aside in firmware comes on top."""
_OTHER = _Share(9 / 10, "the operating system keeps about a tenth")


def machine_from_gpus(
    gpus: Sequence[tuple[GpuProfile, int]],
    *,
    vram_bytes: int | None = None,
    reserve_bytes: int | None = None,
    ram_bytes: int | None = None,
    disk_bytes: int | None = None,
) -> Machine:
    """A machine of catalogue cards, `(profile, count)` each, with sizes as `override` applies them. Without
    cards and with `vram_bytes`: one anonymous card of that memory, its speed unknown.

    RAM and disk are unknown unless named; with unified memory, RAM is what the GPU may not use.
    Errors: `BadOption` as `override`, and for more than 64 cards.
    """
    profiles = [profile for profile, count in gpus for _ in range(min(count, LARGEST_COUNT + 1))]
    if len(profiles) > LARGEST_COUNT:
        raise BadOption(f"more than {LARGEST_COUNT} cards in one machine")
    cards = tuple(_catalogue_gpu(index, profile) for index, profile in enumerate(profiles))
    machine = Machine(origin="catalogue", gpus=cards, host=_shared_host(cards))
    return override(
        machine,
        vram_bytes=vram_bytes,
        reserve_bytes=reserve_bytes,
        ram_bytes=ram_bytes,
        disk_bytes=disk_bytes,
    )


def override(
    machine: Machine,
    *,
    vram_bytes: int | None = None,
    reserve_bytes: int | None = None,
    ram_bytes: int | None = None,
    disk_bytes: int | None = None,
) -> Machine:
    """The machine with sizes the user named in place of its own. `vram_bytes` is the total of every card, or
    of one anonymous card where there is none; `reserve_bytes` is what each card holds back; `ram_bytes` and
    `disk_bytes` are what is free.

    Errors: `BadOption` for a reserve that leaves nothing of a card.
    """
    gpus = machine.gpus
    if vram_bytes is not None:
        gpus = tuple(_resized(gpu, vram_bytes) for gpu in gpus) or (_anonymous_gpu(vram_bytes),)
    if reserve_bytes is not None:
        for gpu in gpus:
            if reserve_bytes >= gpu.total_bytes:
                held, total = format_bytes(reserve_bytes), format_bytes(gpu.total_bytes)
                raise BadOption(f"--reserve {held} leaves nothing of the {total} of {gpu.profile.id}")
        gpus = tuple(replace(gpu, reserve_bytes=reserve_bytes) for gpu in gpus)
    host, disks = machine.host, machine.disks
    if ram_bytes is not None:
        host = replace(host, ram_total_bytes=ram_bytes, ram_available_bytes=ram_bytes)
    if disk_bytes is not None:
        disks = (Disk(path="given by --disk", total_bytes=disk_bytes, free_bytes=disk_bytes),)
    return replace(machine, gpus=gpus, host=host, disks=disks)


@identity_cache
def kind_of(machine: Machine) -> Machine:
    """A machine of no more than what decides whether a job is possible on it, so that all cards of a kind are
    one: vendor, compute capability and 16-bit arithmetic of each card, and the operating system."""

    def bare(gpu: Gpu) -> Gpu:
        card = gpu.profile
        profile = GpuProfile(
            id="",
            name="",
            vendor=card.vendor,
            memory_bytes=0,
            memory_basis="nominal",
            compute_capability=card.compute_capability,
            bf16=card.bf16,
            bf16_flops_per_s=None if card.bf16_flops_per_s is None else 1,
            fp16_flops_per_s=None if card.fp16_flops_per_s is None else 1,
        )
        return Gpu(index=0, profile=profile, total_bytes=0)

    return Machine(gpus=tuple(map(bare, machine.gpus)), host=Host(system=machine.host.system))


def budget(gpu: Gpu) -> tuple[int, str]:
    """Bytes a process may use on a card, and the reason as text: what is free where the card is live, the
    driver's total where the catalogue holds it, 98 % of the nominal capacity otherwise, the GPU's share of a
    unified memory, or the size the user named; minus the reserve. Never negative.

    >>> from profiles.hardware import load_gpu
    >>> budget(machine_from_gpus([(load_gpu("rtx-3090"), 1)]).gpus[0])
    (25232932864, 'nvidia-smi total 24 GiB, minus 512 MiB for the display')
    """
    return _budget(gpu)


@identity_cache
def _budget(gpu: Gpu) -> tuple[int, str]:
    usable, reason = _usable(gpu)
    if gpu.reserve_bytes:
        held = format_bytes(gpu.reserve_bytes)
        default = gpu.reserve_bytes == DISPLAY_RESERVE_BYTES == default_reserve_bytes(gpu.profile)
        reason += f", minus {held} for the display" if default else f", minus {held} reserve"
    return max(0, usable - gpu.reserve_bytes), reason


def free_ram(machine: Machine) -> int | None:
    """RAM a process may use; None where it is not known."""
    host = machine.host
    return host.ram_total_bytes if host.ram_available_bytes is None else host.ram_available_bytes


def default_reserve_bytes(profile: GpuProfile) -> int:
    """Held back unless `--reserve` says otherwise: 512 MiB where a display is usual, nothing elsewhere."""
    return DISPLAY_RESERVE_BYTES if profile.display else 0


def unified_share(vendor: str, total_bytes: int) -> tuple[int, str]:
    """Bytes of a unified memory that the GPU may use by default, and who says so."""
    if vendor == "apple":
        share = _APPLE_LARGE if total_bytes >= _APPLE_LARGE_FROM else _APPLE_SMALL
    else:
        share = _AMD if vendor == "amd" else _OTHER
    return int(total_bytes * share.fraction), share.reason


def _usable(gpu: Gpu) -> tuple[int, str]:
    """Bytes before the reserve, and where they come from."""
    total = format_bytes(gpu.total_bytes)
    if gpu.free_bytes is not None:
        return gpu.free_bytes, f"{format_bytes(gpu.free_bytes)} free of {total} when read"
    if gpu.profile.memory_basis == "given":
        return gpu.total_bytes, f"{total} given by --vram"
    if gpu.profile.unified_memory:
        usable, reason = unified_share(gpu.profile.vendor, gpu.total_bytes)
        return usable, f"{format_bytes(usable)} of {total} unified memory ({reason})"
    if gpu.profile.memory_basis == "nominal":
        return int(gpu.total_bytes * NOMINAL_SHARE), f"98 % of the nominal {total}"
    source = "nvidia-smi" if gpu.profile.memory_basis == "nvidia_smi" else "the driver's"
    return gpu.total_bytes, f"{source} total {total}"


def _catalogue_gpu(index: int, profile: GpuProfile) -> Gpu:
    return Gpu(
        index=index,
        profile=profile,
        total_bytes=profile.memory_bytes,
        reserve_bytes=default_reserve_bytes(profile),
        pcie_generation_max=profile.pcie_generation,
        pcie_lanes_max=profile.pcie_lanes,
    )


def _anonymous_gpu(vram_bytes: int) -> Gpu:
    # The software whose memory is estimated runs on CUDA: a card without a name is taken for one of NVIDIA.
    profile = GpuProfile(
        id="vram",
        name=f"any card with {format_bytes(vram_bytes)}",
        vendor="nvidia",
        memory_bytes=vram_bytes,
        memory_basis="given",
        display=False,
    )
    return Gpu(index=0, profile=profile, total_bytes=vram_bytes)


def _resized(gpu: Gpu, vram_bytes: int) -> Gpu:
    profile = replace(gpu.profile, memory_bytes=vram_bytes, memory_basis="given")
    return replace(gpu, profile=profile, total_bytes=vram_bytes, free_bytes=None)


def _shared_host(gpus: Sequence[Gpu]) -> Host:
    """RAM beside the GPU's share where both are one memory; unknown otherwise."""
    if len(gpus) != 1 or not gpus[0].profile.unified_memory:
        return Host()
    total = gpus[0].total_bytes
    return Host(ram_total_bytes=total, ram_available_bytes=total - _usable(gpus[0])[0])
