"""Before anything is loaded: the machine as it is now against what a candidate needs.

`decide` is pure; `look` reads the machine for it. What surely cannot run is fatal: the next candidate is
taken. What may not run is a warning. Data shorter than planned needs less than predicted, so for a run only
the weights and the context are sure; a rehearsal has the planned shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from executor.errors import CannotHonour, OutOfMemory
from planner.inspect.installed import stack_of
from planner.types import Candidate, Gpu, GpuEstimate, Machine, Plan, Stack
from planner.units import GIB, format_bytes
from planner.verdict import RAM_UNCERTAINTY

IN_OUTPUT = ("offload folder", "checkpoints", "final adapter", "final model")
IN_CACHE = ("download", "draft download")
DRIVERS_OWN_BYTES = GIB
"""More than the driver keeps to itself on any card (300 to 900 MiB)."""
NAMES = ("torch", "transformers", "bitsandbytes", "peft")


class Place(Struct, frozen=True):
    """A folder that a run fills, and its file system now."""

    path: str
    free_bytes: int
    filesystem: int
    """The same number for folders that share their free space."""


class Now(Struct, frozen=True, kw_only=True):
    """What a run meets. None or missing where it could not be read; nothing is claimed about that."""

    machine: Machine = Machine()
    output: Place | None = None
    cache: Place | None = None
    """Where a download would go; None when nothing has to be downloaded."""
    libraries: Mapping[str, str] = {}
    least_versions: Mapping[str, str] = {}
    """The oldest release of each library that the executor works with."""


class Problem(Struct, frozen=True):
    """One thing that stands in the way: what is so, and what to close or change."""

    text: str
    advice: str
    fatal: bool = False
    card: bool = False
    """It is the card's memory that is missing."""

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}"


def decide(
    plan: Plan, candidate: Candidate, now: Now, vram_cap_bytes: int | None = None, rehearse: bool = False
) -> tuple[Problem, ...]:
    """Everything that stands in the way of a candidate, worst first. Pure."""
    found = list(_versions(plan, candidate, now))
    # an engine named on the command line has other needs than the one that was predicted
    if candidate.engine == candidate.strategy.engine:
        # training runs on the first card until sharding is built
        cards = candidate.estimate.gpus[:1] if plan.workload.task == "train" else candidate.estimate.gpus
        for gpu in cards:
            found += _card(gpu, now.machine.gpus, vram_cap_bytes, rehearse)
            found += _other_card(gpu, plan.machine.gpus, now.machine.gpus)
        found += _ram(candidate, now.machine)
    found += _disk(candidate, now, rehearse)
    return tuple(sorted(found, key=lambda problem: not problem.fatal))


def clear(
    plan: Plan,
    candidates: Sequence[Candidate],
    now: Now,
    vram_cap_bytes: int | None = None,
    rehearse: bool = False,
    refuse: bool = True,
) -> tuple[tuple[Candidate, ...], tuple[str, ...], tuple[str, ...]]:
    """Candidates that may run, why the others are left, and warnings about the first that may. With `refuse`
    off, all may.

    Errors: when none may, `OutOfMemory` (exit 3) where the card's memory is what every candidate lacks, else
    `CannotHonour` (exit 2).
    """
    kept: list[Candidate] = []
    left: list[str] = []
    warnings: tuple[str, ...] = ()
    fatal: list[Problem] = []
    for candidate in candidates:
        problems = decide(plan, candidate, now, vram_cap_bytes, rehearse)
        if refuse and problems and problems[0].fatal:
            fatal.append(problems[0])
            left.append(f"candidate {candidate.rank}: {problems[0]}")
            continue
        if not kept:
            warnings = tuple(str(problem) for problem in problems)
        kept.append(candidate)
    if not kept and fatal:
        first, others = (
            fatal[0],
            f" (and so for all {len(candidates)} candidates)" if len(candidates) > 1 else "",
        )
        if all(problem.card for problem in fatal):
            raise OutOfMemory(f"out of memory before loading: {first.text}{others}", first.advice)
        raise CannotHonour(f"{first.text}{others}", first.advice)
    return tuple(kept), tuple(left), warnings


# --------------------------------------------------------------------------- card


def _find(gpu: GpuEstimate, cards: Sequence[Gpu]) -> Gpu | None:
    return next((card for card in cards if card.index == gpu.index), cards[-1] if cards else None)


def _other_card(gpu: GpuEstimate, planned: Sequence[Gpu], cards: Sequence[Gpu]) -> Iterator[Problem]:
    then, here = _find(gpu, planned), _find(gpu, cards)
    if then is None or here is None or then.profile.memory_basis == "given":
        return
    if then.profile.id != here.profile.id:
        yield Problem(
            f"the plan is for {then.profile.name} and card {here.index} is {here.profile.name}",
            "speed will differ; plan again on this machine",
        )


def _card(gpu: GpuEstimate, cards: Sequence[Gpu], cap: int | None, rehearse: bool) -> Iterator[Problem]:
    card = _find(gpu, cards)
    free = card.free_bytes if card else None
    if cap is not None and (free is None or cap <= free):
        room, has = cap, f"--vram-cap is {format_bytes(cap)}"
        advice = "raise it, or plan with --vram for a card of that size"
    elif free is not None and card is not None:
        room, has = free, f"card {gpu.index} has {format_bytes(free)} free"
        advice = _to_close(card)
    else:
        return
    surely = gpu.low_bytes if rehearse else min(gpu.low_bytes, gpu.load_bytes + gpu.context_bytes)
    needs = f"the run needs {format_bytes(gpu.process_bytes)}"
    if room < surely:
        yield Problem(
            f"{has} and {needs} ({format_bytes(surely)} at the very least)", advice, fatal=True, card=True
        )
    elif room < gpu.process_bytes:
        yield Problem(f"{has} and {needs}: it may run out of memory", advice)
    elif room < gpu.high_bytes:
        yield Problem(f"{has} and {needs}, up to {format_bytes(gpu.high_bytes)}: tight", advice)


def _to_close(card: Gpu) -> str:
    """What holds the card's memory, the largest first."""
    users = sorted(card.processes, key=lambda process: -(process.used_bytes or 0))[:3]
    names = [
        f"{process.name or 'a process'} (pid {process.pid}"
        + (f", {format_bytes(process.used_bytes)})" if process.used_bytes else ")")
        for process in users
    ]
    unseen = _unseen_bytes(card)
    if unseen:
        names.append(f"what holds {format_bytes(unseen)} unseen from here (other users, containers)")
    if not names:
        return "plan again on this machine, with a smaller batch, sequence or precision"
    return f"close {', '.join(names)}, or plan again on this machine"


def _unseen_bytes(card: Gpu) -> int:
    """Memory in use that no process known here accounts for; 0 where too little is known to say so."""
    if card.free_bytes is None or any(process.used_bytes is None for process in card.processes):
        return 0
    known = sum(process.used_bytes or 0 for process in card.processes)
    unseen = card.total_bytes - card.free_bytes - known
    return unseen if unseen >= DRIVERS_OWN_BYTES else 0


# --------------------------------------------------------------------------- RAM


def _ram(candidate: Candidate, machine: Machine) -> Iterator[Problem]:
    host, needs = machine.host, candidate.estimate.host
    available = host.ram_available_bytes
    if available is not None:
        needed = format_bytes(needs.ram_bytes)
        text = f"{format_bytes(available)} of RAM are available and the run needs {needed}"
        with_swap = available + (host.swap_free_bytes or 0)
        advice = "close other programs, or plan again on this machine"
        if needs.ram_bytes * (1 - RAM_UNCERTAINTY) > with_swap:
            yield Problem(text, advice, fatal=True)
        elif needs.pinned_bytes > available:
            pinned = f", {format_bytes(needs.pinned_bytes)} of it pinned, which cannot be swapped"
            yield Problem(text + pinned, advice, fatal=True)
        elif needs.ram_bytes > available:
            yield Problem(f"{text}: it may swap or be killed", advice)
    limit = host.locked_limit_bytes
    if needs.pinned_bytes and limit is not None and limit < needs.pinned_bytes:
        yield Problem(
            f"{format_bytes(needs.pinned_bytes)} of RAM are to be pinned and the limit of locked memory is "
            f"{format_bytes(limit)}",
            "if pinning fails, raise it with `ulimit -l unlimited`",
        )


# --------------------------------------------------------------------------- disk


def _disk(candidate: Candidate, now: Now, rehearse: bool) -> Iterator[Problem]:
    lines = {line.name: line.bytes for line in candidate.estimate.disk.components}
    in_output = {name: lines.get(name, 0) for name in IN_OUTPUT}
    if rehearse:
        in_output = {"offload folder": in_output["offload folder"]}
    wanted: dict[int, list[tuple[Place, dict[str, int]]]] = {}
    in_cache = {name: lines.get(name, 0) for name in IN_CACHE}
    for place, needs in ((now.output, in_output), (now.cache, in_cache)):
        if place is not None and any(needs.values()):
            wanted.setdefault(place.filesystem, []).append((place, needs))
    for shares in wanted.values():
        yield from _filesystem(shares)


def _filesystem(shares: Sequence[tuple[Place, Mapping[str, int]]]) -> Iterator[Problem]:
    """Needs of all folders of one file system together. One checkpoint is sure, two are kept."""
    free = shares[0][0].free_bytes
    needs = {name: n for _, part in shares for name, n in part.items() if n}
    total = sum(needs.values())
    surely = total - needs.get("checkpoints", 0) // 2
    if total <= free:
        return
    each = ", ".join(f"{name} {format_bytes(n)}" for name, n in needs.items())
    paths = " and ".join(place.path for place, _ in shares)
    yield Problem(
        f"{paths}: {format_bytes(free)} free and the run fills {format_bytes(total)} ({each})",
        "free some space, or name a larger disk with --output"
        + (" (HF_HOME for downloads)" if "download" in needs else ""),
        fatal=surely > free,
    )


# --------------------------------------------------------------------------- versions


def _versions(plan: Plan, candidate: Candidate, now: Now) -> Iterator[Problem]:
    here = stack_of(dict(now.libraries))
    for name in _needed(plan, candidate):
        installed, least = now.libraries.get(name), now.least_versions.get(name)
        if installed is None:
            continue  # the candidate's own check names what is missing
        if least is not None and _numbers(installed) < _numbers(least):
            yield Problem(
                f"{name} {installed} is installed and {least} is the oldest that works",
                "pip install -U 'fitwright[executor]'",
                fatal=True,
            )
            continue
        yield from _other_stack(name, getattr(here, name), plan.stack)


def _other_stack(name: str, here: str, stack: Stack) -> Iterator[Problem]:
    planned = getattr(stack, name)
    now, then = _numbers(here), _numbers(planned)
    if not now or not then or (now[0] == then[0] and now >= then):
        return
    older = "older" if now < then else "a newer generation"
    yield Problem(
        f"{name} {here} is {older} than the {planned} the prediction describes",
        "memory and speed may differ from the prediction",
    )


def _needed(plan: Plan, candidate: Candidate) -> Iterator[str]:
    how, work = candidate.strategy, plan.workload
    yield from ("torch", "transformers")
    of_optimizer = how.optimizer.endswith("8bit") or how.optimizer.startswith("paged")
    if how.quant != "none" or (work.task == "train" and of_optimizer):
        yield "bitsandbytes"
    if work.task == "train" and work.method != "full":
        yield "peft"


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13, 0); what is no number ends it."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
