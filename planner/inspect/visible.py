"""Which cards CUDA will show to this process, and in which order: CUDA_VISIBLE_DEVICES.

Rules of the CUDA programming guide: a list of indices or UUIDs (a beginning that only one device has is
enough), `MIG-` names for instances; the list ends at the first entry that names no device; an empty list
hides all.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class Device(Struct, frozen=True):
    """A card as NVML numbers it, with its MIG instances where it is split."""

    handle: Any
    uuid: str | None
    instances: tuple[Device, ...] = ()

    @property
    def parts(self) -> tuple[Device, ...]:
        """What CUDA can run on: the instances of a split card, else the card."""
        return self.instances or (self,)


def visible_devices(setting: str | None, devices: list[Device], notes: list[str]) -> list[Device]:
    """The devices in CUDA's order. `setting` is the variable's value, None where it is not set."""
    everything = [part for device in devices for part in device.parts]
    if setting is None:
        return everything
    chosen: list[Device] = []
    for entry in filter(None, (part.strip() for part in setting.split(","))):
        found = _named(entry, devices, everything)
        if found is None or found in chosen:
            if entry != "-1":
                notes.append(f"CUDA_VISIBLE_DEVICES names no device by {entry[:60]!a}: the list ends there")
            break
        chosen.append(found)
    hidden = len(everything) - len(chosen)
    if hidden:
        notes.append(f"CUDA_VISIBLE_DEVICES hides {hidden} of {len(everything)} cards")
    return chosen


def _named(entry: str, devices: list[Device], everything: list[Device]) -> Device | None:
    if entry.isascii() and entry.isdecimal() and len(entry) < 6:
        index = int(entry)
        return devices[index].parts[0] if index < len(devices) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    whole = [device.parts[0] for device in devices if device.uuid and device.uuid.startswith(entry)]
    parts = [part for part in everything if part.uuid and part.uuid.startswith(entry)]
    found = parts or whole
    return found[0] if len(found) == 1 else None
