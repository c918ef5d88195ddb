"""Adding a finished run to the ledger."""

from __future__ import annotations

import datetime
import fcntl
import os
from pathlib import Path

from msgspec.structs import replace

from executor import ui
from executor.options import RunOptions
from executor.preflight import Now
from executor.report import pairs
from planner.estimate import normal, normal_strategy
from planner.inspect.installed import stack_of
from planner.inspect.ledger import ledger_file
from planner.inspect.system import System
from planner.ledger import Entry, Figures, config_hash, line_of, machine_key
from planner.types import Candidate, Machine, Plan, RunReport


def remember(plan: Plan, candidate: Candidate, report: RunReport, now: Now, options: RunOptions) -> None:
    """Add a finished run to this machine's ledger. One that cannot be written is a note, never an error: the
    run has succeeded."""
    entry = entry_of(plan, candidate, report, now.machine, dict(now.libraries), options)
    path = ledger_file(System())
    if entry is None or path is None:
        return
    try:
        append(path, entry)
    except OSError as error:
        ui.say(f"note: the run was not added to {path}: {error.strerror}")


def entry_of(
    plan: Plan,
    candidate: Candidate,
    report: RunReport,
    here: Machine,
    libraries: dict[str, str],
    options: RunOptions,
) -> Entry | None:
    """The ledger's line for a finished run; None where the machine cannot be told from others."""
    on_card = report.load_bytes is not None
    cards = [gpu.index for gpu in candidate.estimate.gpus] if on_card else []
    key = machine_key(here, cards)
    if key is None or (on_card and not cards):
        return None
    work = report.workload
    # what was predicted for another job says nothing about this one
    predicted = _figures(candidate, report, 0) if work == plan.workload else Figures()
    now = datetime.datetime.now(datetime.UTC)
    gpu = next((gpu for gpu in here.gpus if gpu.index == cards[0]), None) if cards else None
    return Entry(
        date=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        kind="rehearsal" if options.rehearse else "run",
        machine=key,
        device=gpu.profile.name if gpu else here.host.cpu or "CPU",
        driver=gpu.driver if gpu else None,
        stack=stack_of(libraries),
        libraries=libraries,
        model=plan.model.id,
        config_hash=plan.model.config_hash or config_hash(plan.model.config),
        workload=normal(work),
        strategy=normal_strategy(replace(report.strategy, engine=candidate.engine), work),
        vram_cap_bytes=options.vram_cap_bytes,
        predicted=predicted,
        measured=replace(_figures(candidate, report, 1), reserved_peak_bytes=report.reserved_peak_bytes),
    )


def _figures(candidate: Candidate, report: RunReport, side: int) -> Figures:
    """One side of the report's pairs: 0 predicted, 1 measured."""
    return Figures(**{name: pair[side] for name, pair in pairs(candidate, report).items()})  # type: ignore


def append(path: Path, entry: Entry) -> None:
    """Add one line; lines of several processes do not mix. Errors: `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        line = line_of(entry)
        # another's line may be half there for a moment; the lock goes with the handle, also after a kill
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line  # what a kill left half-written stays a line of its own
        if os.write(handle, line) != len(line):
            raise OSError(28, "no space left on device")
    finally:
        os.close(handle)
