"""NVIDIA cards through NVML. What a driver refuses to say becomes a note or stays None, never an error."""

from __future__ import annotations

from typing import Any

from planner.inspect.host import reason
from planner.inspect.live import LiveFacts, listed_profile, unlisted_profile
from planner.inspect.system import System
from planner.inspect.visible import Device, visible_devices
from planner.machine import default_reserve_bytes
from planner.types import Gpu, GpuProcess, Host
from planner.units import format_bytes
from profiles.hardware import find_gpus
from profiles.schema import GpuProfile

_NOT_AVAILABLE = 1 << 63
_UNSUPPORTED = ("NVMLError_NotSupported", "NVMLError_NotFound")


def inspect_nvidia(system: System, host: Host, notes: list[str]) -> tuple[Gpu, ...]:
    """The cards CUDA will show to this process, numbered as CUDA numbers them under
    CUDA_DEVICE_ORDER=PCI_BUS_ID; none, and a note why, without driver or library."""
    try:
        library = system.nvml()
    except Exception as error:
        notes.append(f"no NVIDIA cards read: the library pynvml cannot be loaded ({reason(error)})")
        return ()
    try:
        library.nvmlInit()
    except Exception as error:
        notes.append(f"no NVIDIA driver: {reason(error)}")
        return ()
    nvml = _Nvml(library, notes)
    try:
        return _read_cards(nvml, system, host)
    except Exception as error:
        notes.append(f"NVML failed: {reason(error)}")
        return ()
    finally:
        nvml.ask("nvmlShutdown")


class _Nvml:
    """NVML with errors turned into None, and into one note each unless the card merely lacks the feature."""

    def __init__(self, library: Any, notes: list[str]) -> None:
        self.library = library
        self.notes = notes

    def ask(self, function: str, *arguments: Any) -> Any:
        try:
            answer = getattr(self.library, function)(*arguments)
        except Exception as error:
            note = f"NVML {function}: {reason(error)}"
            if type(error).__name__ not in _UNSUPPORTED and note not in self.notes:
                self.notes.append(note)
            return None
        return answer.decode(errors="replace") if isinstance(answer, bytes) else answer

    def number(self, function: str, *arguments: Any) -> int | None:
        """A positive number; zero is how some drivers say that they do not know."""
        answer = self.ask(function, *arguments)
        return answer if isinstance(answer, int) and answer > 0 else None


def _read_cards(nvml: _Nvml, system: System, host: Host) -> tuple[Gpu, ...]:
    count = nvml.number("nvmlDeviceGetCount") or 0
    devices = [
        _device(nvml, handle) for index in range(count) if (handle := _handle(nvml, index)) is not None
    ]
    chosen = visible_devices(system.environment("CUDA_VISIBLE_DEVICES"), devices, nvml.notes)
    driver = nvml.ask("nvmlSystemGetDriverVersion")
    gpus: list[Gpu] = []
    for device in chosen:
        instance = not any(device is whole for whole in devices)
        gpu = _read_card(nvml, system, host, device, len(gpus), driver, instance)
        if gpu is not None:
            gpus.append(gpu)
    if not count:
        nvml.notes.append("the NVIDIA driver sees no card")
    order = system.environment("CUDA_DEVICE_ORDER")
    if len({gpu.profile.id for gpu in gpus}) > 1 and order != "PCI_BUS_ID":
        nvml.notes.append(
            "the cards differ: CUDA may number them otherwise; set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    if any(device.instances for device in devices):
        nvml.notes.append(
            "a card is split by MIG: each instance is listed; CUDA uses one of them per process"
        )
    return tuple(gpus)


def _handle(nvml: _Nvml, index: int) -> Any:
    handle = nvml.ask("nvmlDeviceGetHandleByIndex", index)
    if handle is None:
        nvml.notes.append(f"card {index} cannot be read and is left out")
    return handle


def _device(nvml: _Nvml, handle: Any) -> Device:
    mode = nvml.ask("nvmlDeviceGetMigMode", handle)
    instances: list[Device] = []
    if mode and mode[0] == 1:
        for index in range(nvml.number("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            part = nvml.ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            if part is not None:
                instances.append(Device(part, nvml.ask("nvmlDeviceGetUUID", part)))
    return Device(handle, nvml.ask("nvmlDeviceGetUUID", handle), tuple(instances))


def _read_card(
    nvml: _Nvml, system: System, host: Host, device: Device, index: int, driver: str | None, instance: bool
) -> Gpu | None:
    handle = device.handle
    name = nvml.ask("nvmlDeviceGetName", handle) or "unnamed NVIDIA card"
    memory = _memory(nvml, host, handle, name)
    if memory is None:
        nvml.notes.append(f"{name} is left out: its memory cannot be read")
        return None
    facts = _facts(nvml, handle, name, memory, instance)
    profile = _profile(facts, instance, nvml.notes)
    return Gpu(
        index=index,
        profile=profile,
        total_bytes=memory[0],
        free_bytes=memory[1],
        reserve_bytes=0 if facts.display is False else default_reserve_bytes(profile),
        pcie_generation=nvml.number("nvmlDeviceGetCurrPcieLinkGeneration", handle),
        pcie_generation_max=facts.pcie_generation,
        pcie_lanes=nvml.number("nvmlDeviceGetCurrPcieLinkWidth", handle),
        pcie_lanes_max=facts.pcie_lanes,
        power_limit_watts=facts.power_watts,
        driver=driver,
        uuid=device.uuid,
        processes=_processes(nvml, handle, system.pid()),
    )


def _memory(nvml: _Nvml, host: Host, handle: Any, name: str) -> tuple[int, int] | None:
    """Total and free bytes. Cards that share the host's memory have no figure of their own in NVML."""
    memory = nvml.ask("nvmlDeviceGetMemoryInfo", handle)
    if memory is not None and memory.total > 0:
        return int(memory.total), int(memory.free)
    shared = any(card.unified_memory for card in find_gpus(name))
    if shared and host.ram_total_bytes is not None:
        nvml.notes.append(f"{name} shares the host's memory: its free memory is the RAM that is available")
        return host.ram_total_bytes, host.ram_available_bytes or host.ram_total_bytes
    return None


def _facts(nvml: _Nvml, handle: Any, name: str, memory: tuple[int, int], instance: bool) -> LiveFacts:
    capability = nvml.ask("nvmlDeviceGetCudaComputeCapability", handle)
    displays = [nvml.ask(f"nvmlDeviceGetDisplay{what}", handle) for what in ("Mode", "Active")]
    known = [bool(answer) for answer in displays if answer is not None]
    limit = nvml.number("nvmlDeviceGetPowerManagementLimit", handle)
    return LiveFacts(
        name=name,
        total_bytes=memory[0],
        capability=".".join(map(str, capability)) if capability else None,
        # An instance has a part of the card's cores and bandwidth, and NVML tells those of the whole.
        cores=None if instance else nvml.number("nvmlDeviceGetNumGpuCores", handle),
        sm_clock_mhz=None if instance else nvml.number("nvmlDeviceGetMaxClockInfo", handle, 1),
        memory_clock_mhz=None if instance else nvml.number("nvmlDeviceGetMaxClockInfo", handle, 2),
        bus_bits=None if instance else nvml.number("nvmlDeviceGetMemoryBusWidth", handle),
        pcie_generation=nvml.number("nvmlDeviceGetMaxPcieLinkGeneration", handle),
        pcie_lanes=nvml.number("nvmlDeviceGetMaxPcieLinkWidth", handle),
        power_watts=limit // 1000 if limit else None,
        display=any(known) if known else None,
        integrated=any(card.unified_memory for card in find_gpus(name)),
    )


def _profile(facts: LiveFacts, instance: bool, notes: list[str]) -> GpuProfile:
    listed = None if instance else listed_profile(facts)
    if listed is not None:
        return listed
    profile = unlisted_profile(facts)
    total = format_bytes(facts.total_bytes)
    rates = "" if profile.bandwidth_bytes_per_s else ", its speed is not known"
    notes.append(f"{facts.name} with {total} is not in the catalogue: its profile is what NVML says{rates}")
    return profile


def _processes(nvml: _Nvml, handle: Any, own_pid: int) -> tuple[GpuProcess, ...]:
    """Other processes on the card, by pid."""
    found: dict[int, GpuProcess] = {}
    for kind in ("Compute", "Graphics"):
        for process in nvml.ask(f"nvmlDeviceGet{kind}RunningProcesses", handle) or ():
            if process.pid == own_pid:
                continue
            used = process.usedGpuMemory
            known = used if isinstance(used, int) and 0 <= used < _NOT_AVAILABLE else None
            name = _process_name(nvml, process.pid)
            found.setdefault(process.pid, GpuProcess(process.pid, name, known))
    return tuple(found[pid] for pid in sorted(found))


def _process_name(nvml: _Nvml, pid: int) -> str | None:
    """The program's file name; None for a process of another user or outside the container."""
    try:
        name = nvml.library.nvmlSystemGetProcessName(pid)
    except Exception:
        return None
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return text.replace("\\", "/").rpartition("/")[2] or None
