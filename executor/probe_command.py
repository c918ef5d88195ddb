"""`executor probe`: measure this machine once and keep the figures where `inspect`, `check` and `plan` find
them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from executor import ui
from executor.errors import CannotHonour, FitwrightError, MissingPackage
from executor.memory_errors import is_out_of_memory
from executor.probe import empty_result, probe_steps
from executor.quiet import silence
from executor.surroundings import read_machine
from planner.files import write_atomically
from planner.inspect.probes import StoredProbe, probe_file
from planner.inspect.system import System
from planner.types import Gpu, Machine, ProbeResult

LEAST_FREE_BYTES = 512 * 2**20
"""A quarter of what is free is read and written: less than 128 MiB would measure the caches of the disk."""


def probe(folder: Path | None, as_json: bool, debug: bool = False) -> int:
    """Measure, store, print; exit 0.

    Errors: `FitwrightError` where the result or the disk's test file cannot be written, `CannotHonour` where
    torch does not see the card that the driver shows.
    """
    silence(debug)
    system = System()
    target = folder or Path.cwd()
    machine = read_machine(system)
    card = machine.gpus[0] if machine.gpus else None
    path = _require_store(system, card)
    _require_room(target)
    device = _device(card)
    result = measure(device, card.driver if card else None, target)
    stored = StoredProbe(
        card=card.profile.name if card else None,
        uuid=card.uuid if card else None,
        **{name: getattr(result, name) for name in ProbeResult.__struct_fields__},
    )
    _store(path, stored)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(stored), indent=2).decode())
    else:
        _print(stored, machine, path)
    return 0


def measure(device: Any, driver: str | None, folder: Path) -> ProbeResult:
    """Every measurement in turn; one that the card has no memory left for stays unknown.

    Errors: `FitwrightError` when the disk fills up or refuses.
    """
    result = empty_result(driver)
    steps = list(probe_steps(device, folder))
    with _progress(len(steps)) as begin:
        for name, step in steps:
            begin(name)
            try:
                result = step(result)
            except OSError as error:
                raise FitwrightError(
                    f"the probe of {name} failed in {folder}: {error.strerror or error}",
                    "name another folder with --folder",
                ) from None
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                ui.say(f"note: {name} is not measured: the card has no memory free for it")
    return result


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on a terminal, one line a measurement elsewhere; yields what is told that one begins."""
    if not ui.is_terminal():
        yield lambda name: ui.say(f"measuring {name}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = 0

        def begin(name: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=name)
            begun += 1

        yield begin
        bar.update(task, completed=total)


# --------------------------------------------------------------------------- before anything is measured


def _require_store(system: System, card: Gpu | None) -> Path:
    """The file of the result, in a folder that can be written. Errors: `FitwrightError`."""
    path = probe_file(system, card.uuid if card else None)
    hint = "set FITWRIGHT_HOME to a folder you may write"
    if path is None:
        raise FitwrightError("there is no home folder to keep the result in", hint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise FitwrightError(f"cannot write to {path.parent}: {error.strerror}", hint) from None
    return path


def _require_room(folder: Path) -> None:
    """Errors: `FitwrightError` where the disk's test file cannot be made."""
    hint = "name a folder on the disk with the weights: --folder DIR"
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        space = os.statvfs(folder)
    except OSError as error:
        raise FitwrightError(f"cannot write to {folder}: {error.strerror}", hint) from None
    if space.f_bavail * space.f_frsize < LEAST_FREE_BYTES:
        raise FitwrightError(f"{folder} has no disk space: the test needs 512 MiB free", hint)


def _device(card: Gpu | None) -> Any:
    """The CUDA device of the first card, None without a card.

    Errors: `MissingPackage` without torch; `CannotHonour` where torch cannot use the card.
    """
    # the order in which the driver's library lists cards, so that both speak of the same one
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    try:
        import torch
    except ImportError:
        raise MissingPackage("torch not installed", "pip install 'fitwright[executor]'") from None
    if card is None:
        return None
    if not torch.cuda.is_available():
        raise CannotHonour(
            f"the driver shows {card.profile.name} and torch {torch.__version__} cannot use it",
            "install a torch with CUDA; see https://pytorch.org/get-started/locally/",
        )
    return torch.device("cuda", 0)


# --------------------------------------------------------------------------- after


def _store(path: Path, stored: StoredProbe) -> None:
    try:
        write_atomically(path, msgspec.json.format(msgspec.json.encode(stored), indent=1) + b"\n")
    except OSError as error:
        raise FitwrightError(
            f"cannot write {path}: {error.strerror}", "set FITWRIGHT_HOME to a folder you may write"
        ) from None


def _print(stored: StoredProbe, machine: Machine, path: Path) -> None:
    from planner.render.console import make_console
    from planner.render.probe import probe_table

    out = make_console()
    out.print(f"{stored.card or machine.host.cpu or 'CPU'}, {stored.date}")
    out.print(probe_table(stored, machine.gpus[0] if machine.gpus else None))
    out.print(f"kept in {path}; `planner check` and `planner plan` use it from now on", soft_wrap=True)
