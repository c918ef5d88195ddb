"""`executor report [RUN_DIR]`: one run's table, or predicted against measured of every run in the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from executor import ui
from executor.errors import FitwrightError
from planner.inspect.ledger import ledger_file, read_ledger
from planner.inspect.system import System
from planner.ledger import Entry, accuracy, errors
from planner.render.text import gib, one_line, rate
from planner.types import RunReport
from planner.units import format_bytes

REPORT_SCHEMA = "fitwright.report/1"
LABELS = {
    "load_bytes": "after loading",
    "allocated_peak_bytes": "allocated peak",
    "context_bytes": "context",
    "process_bytes": "process",
    "managed_bytes": "managed",
    "ram_bytes": "RAM",
    "decode_tokens_per_s": "decode tok/s",
    "prefill_tokens_per_s": "prefill tok/s",
    "train_tokens_per_s": "training tok/s",
}
_IN_REPORT = {"process_bytes": "process_peak_bytes", "ram_bytes": "host_peak_bytes"}


def report(run_dir: Path | None, as_json: bool) -> int:
    """Print the table, or JSON alone on stdout; exit 0.

    Errors: `FitwrightError` for a folder without a report.
    """
    return _one(run_dir, as_json) if run_dir is not None else _all(as_json)


# --------------------------------------------------------------------------- one run


def _one(folder: Path, as_json: bool) -> int:
    file = folder / "report.json" if folder.is_dir() else folder
    try:
        raw = file.read_bytes()
        run = msgspec.json.decode(raw, type=RunReport)
    except FileNotFoundError:
        raise FitwrightError(
            f"{folder} holds no report.json",
            "give the --output folder of a run; one that goes on has none yet",
        ) from None
    except OSError as error:
        raise FitwrightError(f"cannot read {file}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        reason = one_line(str(error), 200)
        raise FitwrightError(f"{file} is no report of this version: {reason}") from None
    if as_json:
        print(raw.decode().rstrip())
    else:
        _print_one(run)
    return 0


def _print_one(run: RunReport) -> None:
    from planner.render import describe
    from planner.render.catalogue import new_table
    from planner.render.console import make_console, print_item

    out = make_console()
    out.print(f"{one_line(run.model.id)}: {describe.job(run.workload)}")
    out.print(describe.strategy(run.strategy, run.workload))
    out.print(f"{run.status} on {one_line(str(run.environment.get('gpu') or run.device))}")
    table = new_table("figure", "predicted", "measured", "error")
    for name, label in LABELS.items():
        measured = getattr(run, _IN_REPORT.get(name, name))
        error = run.error.get(name)
        if measured is None:
            continue
        # the report keeps the error; the prediction follows from it
        predicted = None if error is None or error <= -1 else measured / (1 + error)
        table.add_row(label, shown(name, predicted), shown(name, measured), percent(error))
    out.print("", table, sep="\n")
    if run.losses:
        out.print(f"loss {run.losses[0]:.4f} → {run.losses[-1]:.4f} over {run.steps} steps")
    for line in (*run.skipped, *run.notes):
        print_item(out, line, "note: ", indent=0)


# --------------------------------------------------------------------------- the ledger


def _all(as_json: bool) -> int:
    entries, bad = read_ledger(System())
    if bad:
        ui.say(f"note: {bad} lines of {ledger_file(System())} cannot be read and are left out")
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(as_object(entries)), indent=2).decode())
    elif entries:
        _print_all(entries)
    else:
        print("no run has finished here yet: `executor rehearse plan.json` needs no weights")
    return 0


def as_object(entries: Sequence[Entry]) -> dict[str, Any]:
    """The ledger with the error of each figure, and how good each figure's predictions were."""
    return {
        "schema": REPORT_SCHEMA,
        "runs": [{**msgspec.to_builtins(entry), "error": errors(entry)} for entry in entries],
        "figures": accuracy(entries),
    }


def _print_all(entries: Sequence[Entry]) -> None:
    from planner.render.catalogue import new_table
    from planner.render.console import make_console

    out = make_console()
    table = new_table("run", "figure", "predicted", "measured", "error", left=2)
    for entry in entries:
        rows = _rows(entry)
        for number, row in enumerate(rows):
            table.add_row(_head(entry) if number == 0 else "", *row, end_section=number == len(rows) - 1)
    out.print(table)
    summary = new_table("figure", "runs", "median error", "worst")
    for name, found in accuracy(entries).items():
        summary.add_row(
            LABELS[name], str(found.runs), f"{found.median_error:.1%}", percent(found.worst_error)
        )
    out.print("", summary, sep="\n")


def _head(entry: Entry) -> str:
    from planner.render import describe

    cap = f", cap {format_bytes(entry.vram_cap_bytes)}" if entry.vram_cap_bytes else ""
    how = f"{describe.weights(entry.strategy)} {describe.PLACEMENTS[entry.strategy.placement]}"
    return (
        f"{entry.date[:10]} {entry.kind} of {one_line(entry.model, 60)}: {describe.job(entry.workload)}, "
        f"{how}, on {one_line(entry.device, 60)}{cap}"
    )


def _rows(entry: Entry) -> list[tuple[str, str, str, str]]:
    """Label, predicted, measured and error of every figure that was measured."""
    off = errors(entry)
    rows = []
    for name, label in LABELS.items():
        predicted, measured = getattr(entry.predicted, name), getattr(entry.measured, name)
        if measured:
            rows.append((label, shown(name, predicted), shown(name, measured), percent(off.get(name))))
    return rows or [("nothing measured", "–", "–", "–")]


def shown(name: str, value: float | None) -> str:
    """A figure with its unit: bytes in GiB, speeds in tokens per second."""
    if value is None:
        return "–"
    return rate(value) if name.endswith("_per_s") else f"{gib(int(value), digits=2)} GiB"


def percent(error: float | None) -> str:
    """`+1.3%`; a dash where there is no prediction."""
    return "–" if error is None else f"{error:+.1%}"
