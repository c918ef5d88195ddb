"""Reading the machine as it is now, for `executor.preflight` and the ledger. Loads nothing heavy."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path

from executor.preflight import Now, Place
from planner.inspect.cgroup import read_mounts
from planner.inspect.host import inspect_host
from planner.inspect.installed import installed_libraries
from planner.inspect.nvidia import inspect_nvidia
from planner.inspect.system import System
from planner.types import Machine, PlanModel


def look(model: PlanModel, output: Path, rehearse: bool, system: System | None = None) -> Now:
    """Cards, RAM, libraries, and the file systems that a run fills. What cannot be read is left out."""
    return Now(
        machine=read_machine(system or System()),
        output=place(output),
        cache=None if rehearse or not _has_to_download(model) else place(_hub_cache()),
        libraries=installed_libraries(),
        least_versions=least_versions(),
    )


def read_machine(system: System) -> Machine:
    """Cards and host now; disks are not looked at."""
    notes: list[str] = []
    host = inspect_host(system, read_mounts(system), notes)
    return Machine(origin="live", gpus=inspect_nvidia(system, host, notes), host=host, notes=tuple(notes))


def place(folder: Path) -> Place | None:
    """The file system of a folder, or of where it will be made."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        space = os.statvfs(there)
        return Place(str(folder), space.f_bavail * space.f_frsize, there.stat().st_dev)
    except OSError:
        return None


def least_versions() -> dict[str, str]:
    """The oldest release of each library that this distribution asks for."""
    try:
        asked = metadata.requires("fitwright") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)", line) for line in asked)
    return {match[1].lower(): match[2] for match in found if match}


def _has_to_download(model: PlanModel) -> bool:
    """Whether no weights of the model lie in the Hub's cache. A download that broke off counts as there: what
    is left of it is compared with the disk before it goes on."""
    if model.path is not None or model.repo_id is None:
        return False
    folder = _hub_cache() / f"models--{model.repo_id.replace('/', '--')}"
    return not any(folder.glob("snapshots/*/*.safetensors"))


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
