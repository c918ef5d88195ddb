"""Where measured rates of this machine are kept, and how they are found again.

One file a card under the data folder (`FITWRIGHT_HOME`, else `XDG_DATA_HOME/fitwright`, else
`~/.local/share/fitwright`): `probes/<uuid>.json`, or `probes/cpu.json` without a card. `executor probe`
writes it; inspect reads it for the first card and drops it when the driver has changed since.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from planner.inspect.system import System
from planner.types import Gpu, ProbeResult


class StoredProbe(ProbeResult, frozen=True, kw_only=True):
    """A probe as its file holds it: the rates, and the card they were measured on."""

    schema: Literal["fitwright.probe/1"] = "fitwright.probe/1"
    card: str | None = None
    """The card's name; None without a card."""
    uuid: str | None = None


def data_folder(system: System) -> Path | None:
    """The folder for what Fitwright remembers of this machine; None where no home is known."""
    chosen = system.environment("FITWRIGHT_HOME")
    if chosen:
        return Path(chosen)
    shared = system.environment("XDG_DATA_HOME")
    if shared:
        return Path(shared) / "fitwright"
    home = system.environment("HOME") or system.environment("USERPROFILE")
    return Path(home) / ".local" / "share" / "fitwright" if home else None


def probe_file(system: System, uuid: str | None) -> Path | None:
    """The file of one card's rates, or of the CPU's where there is no card."""
    folder = data_folder(system)
    name = "".join(c for c in (uuid or "cpu") if c.isalnum() or c in "-_")
    return folder / "probes" / f"{name}.json" if folder else None


def read_probe(system: System, gpus: Sequence[Gpu], notes: list[str]) -> ProbeResult | None:
    """Rates measured on this machine, for the card at index 0 and its driver; None where there are none."""
    card = gpus[0] if gpus else None
    path = probe_file(system, card.uuid if card else None)
    text = system.read(os.fspath(path)) if path else None
    if text is None:
        return None
    try:
        found = msgspec.json.decode(text.encode(), type=ProbeResult)
    except msgspec.DecodeError:
        notes.append(f"the probe in {path} cannot be read; `executor probe` writes it anew")
        return None
    if card is not None and found.driver != card.driver:
        notes.append(f"the probe of {found.date} was made with another driver; run `executor probe` again")
        return None
    return found
