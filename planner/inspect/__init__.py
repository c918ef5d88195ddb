"""What this computer is: cards, RAM, processors, disks. The only part of the planner that looks.

Works without a card, a driver or NVML, on Linux, macOS and Windows. Nothing here raises: what cannot be
read is missing from the answer and named in its notes.
"""

from __future__ import annotations

from planner.inspect.apple import inspect_apple
from planner.inspect.cgroup import read_mounts
from planner.inspect.disks import inspect_disks
from planner.inspect.host import attempt, inspect_host
from planner.inspect.nvidia import inspect_nvidia
from planner.inspect.probes import read_probe
from planner.inspect.system import System
from planner.types import Machine

__all__ = ["System", "inspect_machine"]


def inspect_machine(system: System | None = None) -> Machine:
    """This computer now, or the one that a `System` of the caller's describes. Writes nothing."""
    system = system or System()
    notes: list[str] = []
    mounts = attempt("the mounts", lambda: read_mounts(system), notes) or []
    host = inspect_host(system, mounts, notes)
    cards = inspect_apple if system.platform == "darwin" else inspect_nvidia
    gpus = attempt("the cards", lambda: cards(system, host, notes), notes) or ()
    disks = inspect_disks(system, mounts, notes)
    probe = attempt("the probe", lambda: read_probe(system, gpus, notes), notes)
    return Machine(origin="live", gpus=gpus, host=host, disks=disks, probe=probe, notes=tuple(notes))
