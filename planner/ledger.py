"""The ledger: one line for each finished run or rehearsal, predicted beside measured. Pure; files are
`planner.inspect.ledger` and `executor.ledger`.

A line is canonical JSON (sorted keys, no spaces), so equal entries are equal bytes. An entry counts for an
estimate when machine, library versions, model, job and strategy are the same; it is shown beside the estimate
and changes none of its numbers.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from planner.estimate import normal, normal_strategy
from planner.types import Estimate, Machine, MeasuredHere, Stack, Strategy, Workload
from profiles.schema import ModelProfile

if TYPE_CHECKING:
    from planner.search import Estimator

FIGURES = (
    "load_bytes",
    "allocated_peak_bytes",
    "reserved_peak_bytes",
    "process_bytes",
    "context_bytes",
    "ram_bytes",
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "train_tokens_per_s",
)


class Figures(Struct, frozen=True, kw_only=True):
    """One side of an entry; None where a figure does not apply or nobody knows it."""

    load_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    process_bytes: int | None = None
    context_bytes: int | None = None
    managed_bytes: int | None = None
    ram_bytes: int | None = None
    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    train_tokens_per_s: float | None = None


class Entry(Struct, frozen=True, kw_only=True):
    """One finished run. `workload` and `strategy` are as carried out, without what the task does not use."""

    schema: Literal["fitwright.ledger/1"] = "fitwright.ledger/1"
    date: str
    """UTC, to the second, as ISO 8601."""
    kind: Literal["run", "rehearsal"]
    machine: str
    """`machine_key` of where it ran."""
    device: str
    """The card's or processor's name, for people."""
    driver: str | None = None
    stack: Stack
    libraries: dict[str, str] = {}
    """Exact versions."""
    model: str
    config_hash: str
    workload: Workload
    strategy: Strategy
    vram_cap_bytes: int | None = None
    predicted: Figures
    measured: Figures


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a model's config facts, as `plan.json` holds it."""
    return hashlib.sha256(msgspec.json.encode(config, order="sorted")).hexdigest()


def machine_key(machine: Machine, cards: Iterable[int]) -> str | None:
    """What tells a machine from others: uuids of the cards a job runs on (name and driver where a card has
    none), or the processor and its cores where it runs on none. None for a machine nobody has read.
    """
    keys = []
    for index in cards:
        gpu = next((gpu for gpu in machine.gpus if gpu.index == index), None)
        if gpu is None or (gpu.uuid is None and gpu.driver is None):
            return None
        keys.append(gpu.uuid or f"{gpu.profile.name}, driver {gpu.driver}")
    if keys:
        return " + ".join(keys)
    host = machine.host
    return f"{host.cpu} x {host.cores}" if host.cpu and host.cores else None


def line_of(entry: Entry) -> bytes:
    """The entry as its line, newline included."""
    return msgspec.json.encode(entry, order="sorted") + b"\n"


def parse(lines: Iterable[str]) -> tuple[tuple[Entry, ...], int]:
    """Entries of a ledger's lines, and how many lines are none (blank ones not counted)."""
    entries, bad = [], 0
    for text in lines:
        if not text.strip():
            continue
        try:
            entries.append(msgspec.json.decode(text.encode(), type=Entry))
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            bad += 1
    return tuple(entries), bad


def ledger_hash(entries: Sequence[Entry]) -> str | None:
    """SHA-256 of the entries' lines, whatever their order; None for none."""
    lines = sorted({line_of(entry) for entry in entries})
    return hashlib.sha256(b"".join(lines)).hexdigest() if lines else None


# --------------------------------------------------------------------------- what an estimate may see


def same_job(entries: Iterable[Entry], workload: Workload) -> tuple[Entry, ...]:
    """Entries of this job."""
    job = normal(workload)
    return tuple(entry for entry in entries if entry.workload == job)


def measured_here(
    entries: Iterable[Entry], machine: Machine, cards: Sequence[int], workload: Workload, strategy: Strategy
) -> MeasuredHere | None:
    """Medians over the entries of one machine, job and strategy; rehearsals, if there are any, stand alone.

    Speeds under a cap with managed memory say nothing about a card of that size and are left out.
    """
    key, how = machine_key(machine, cards), normal_strategy(strategy, workload)
    if key is None:
        return None
    same = [e for e in same_job(entries, workload) if e.machine == key and e.strategy == how]
    chosen = [entry for entry in same if entry.kind == "rehearsal"] or same
    if not chosen:
        return None
    return MeasuredHere(
        runs=len(chosen),
        kind=chosen[0].kind,
        last=max(entry.date for entry in chosen)[:10],
        **{name: _median(name, chosen) for name in FIGURES},
    )


def _median(name: str, entries: Sequence[Entry]) -> Any:
    speed = name.endswith("_per_s")
    values = [
        value
        for entry in entries
        if (value := getattr(entry.measured, name)) is not None
        and not (speed and entry.vram_cap_bytes and entry.measured.managed_bytes)
    ]
    return statistics.median_low(values) if values else None


def with_measured(
    estimate: Estimate, entries: Sequence[Entry], machine: Machine, workload: Workload, strategy: Strategy
) -> Estimate:
    """The estimate with what was measured here beside it."""
    if not entries:
        return estimate
    cards = [gpu.index for gpu in estimate.gpus]
    found = measured_here(entries, machine, cards, workload, strategy)
    return estimate if found is None else replace(estimate, measured_here=found)


def remembering(estimator: Estimator, entries: Sequence[Entry]) -> Estimator:
    """An estimator that puts what was measured here beside each estimate."""

    def ask(
        model: ModelProfile,
        machine: Machine,
        workload: Workload,
        strategy: Strategy,
        stack: Stack | None = None,
    ) -> Estimate:
        plain = estimator(model, machine, workload, strategy, stack)
        return with_measured(plain, entries, machine, workload, strategy)

    return ask if entries else estimator


# --------------------------------------------------------------------------- how good the predictions were


class Accuracy(Struct, frozen=True, kw_only=True):
    """How far one figure's predictions were off: measured / predicted - 1."""

    runs: int
    median_error: float
    """Median of the sizes of the errors."""
    worst_error: float
    """The largest in size, with its sign."""


def errors(entry: Entry) -> dict[str, float]:
    """measured / predicted - 1 of each figure that has both."""
    found = {}
    for name in FIGURES:
        predicted, measured = getattr(entry.predicted, name), getattr(entry.measured, name)
        if predicted and measured is not None:
            found[name] = measured / predicted - 1
    return found


def accuracy(entries: Iterable[Entry]) -> dict[str, Accuracy]:
    """Median and worst error of each figure over all entries."""
    by_figure: dict[str, list[float]] = {}
    for entry in entries:
        for name, error in errors(entry).items():
            by_figure.setdefault(name, []).append(error)
    return {
        name: Accuracy(
            runs=len(by_figure[name]),
            median_error=statistics.median(map(abs, by_figure[name])),
            worst_error=max(by_figure[name], key=abs),
        )
        for name in FIGURES
        if name in by_figure
    }
