"""What `check` asks: for each job a model allows, does it run on this hardware, how fast, and with what room.

A job is tried the plain way first: everything on the card with default settings. Where that does not fit, the
settings that save memory are tried, then part of the weights in RAM, then on disk. The first way that fits is
shown. Without a card, the need is that of any card, and the CPU is what is judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal

from msgspec import Struct, field
from msgspec.structs import replace

from planner.errors import BadOption
from planner.estimate import estimate, floor
from planner.limits import limits
from planner.machine import budget, machine_from_gpus
from planner.rank import Field
from planner.reasons import notes
from planner.reverse import smallest_cards
from planner.strategies import INFER_SETTINGS, TRAIN_SETTINGS, legal_strategies, resolve_strategy
from planner.types import GOOD, Estimate, Machine, Method, Placement, Quant, Strategy, Task, Verdict, Workload
from planner.units import TIB, format_bytes
from profiles.hardware import parse_capability
from profiles.schema import Architecture, GpuProfile, ModelProfile

_ANY_CARD = machine_from_gpus([], vram_bytes=1024 * TIB)
_CLEARLY_LESS = 0.95
_LIGHTEST_CARD = 0.95
"""What the same run can need on another card: contexts and workspaces differ by a few hundred MiB at most."""
_ON_CARD: tuple[Placement, ...] = ("full_gpu", "mixed_offload", "disk_offload")
_LEAST_CAPABILITY = (7, 5)
"""CUDA 13, which torch is built with, has no code for older cards."""


class Job(Struct, frozen=True):
    """One row of the page."""

    id: str
    label: str
    task: Task
    quant: Quant
    method: Method | None = None

    def of(self, workloads: Mapping[Task, Workload]) -> Workload:
        """The workload of this job."""
        work = workloads[self.task]
        return work if self.method is None else replace(work, method=self.method)


JOBS = (
    Job("bf16", "run in bf16", "infer", "none"),
    Job("int8", "run in int8", "infer", "int8"),
    Job("nf4", "run in NF4", "infer", "nf4"),
    Job("qlora", "train QLoRA", "train", "nf4", "qlora"),
    Job("lora", "train LoRA", "train", "none", "lora"),
    Job("full", "train full", "train", "none", "full"),
)


class Answer(Struct, frozen=True, kw_only=True):
    """One job on one target."""

    job: str
    label: str
    verdict: Verdict | Literal["not_possible"]
    workload: Workload
    strategy: Strategy | None = None
    estimate: Estimate | None = None
    """Of the way that is shown: the first that fits, else the plain one."""
    need: Estimate | None = None
    """On a card that holds everything: what one would need; None where no card could do it."""
    reason: str | None = None
    """Why it is not possible, or what was changed to make it fit."""
    notes: tuple[str, ...] = ()
    """What to know about this way on this hardware."""
    longest_context_tokens: int | None = None
    largest_batch_size: int | None = None


class Target(Struct, frozen=True, kw_only=True):
    """One machine of the page."""

    name: str
    machine: Machine
    answers: tuple[Answer, ...]


class Streamed(Struct, frozen=True, kw_only=True):
    """A card through which a job streams, and what it takes there."""

    card: str
    """Its id."""
    card_bytes: int
    """What must be free on it."""
    ram_bytes: int
    strategy: Strategy
    tokens_per_s: float | None


class Survey(Struct, frozen=True, kw_only=True):
    """The whole page."""

    schema: Literal["fitwright.check/1"] = "fitwright.check/1"
    model: ModelProfile
    workloads: dict[Task, Workload]
    targets: tuple[Target, ...]
    smallest_cards: dict[str, tuple[str, ...]] = {}
    """Ids of the smallest cards that hold a job entirely, by job."""
    streamed: dict[str, tuple[Streamed, ...]] = {}
    """The smallest cards through which a job streams, smallest first, by job: of those that no target holds
    entirely."""


class Question(Struct, frozen=True):
    """What is asked of every target."""

    model: ModelProfile
    arch: Architecture
    workloads: dict[Task, Workload]
    wishes: dict[str, Any] = field(default_factory=dict)
    method: Method | None = None

    def jobs(self) -> list[Job]:
        """The rows that the options leave."""
        wanted = self.wishes.get("quant")
        return [
            job
            for job in JOBS
            if job.task in self.workloads
            and (self.method is None or job.task == "infer" or job.method == self.method)
            and (wanted is None or job.quant == wanted or job.task == "train")
        ]


def survey(question: Question, targets: list[tuple[str, Machine]]) -> tuple[Target, ...]:
    """Every job on every target.

    Errors: `BadOption` when the options leave no job possible anywhere.
    """
    found = tuple(
        Target(
            name=name,
            machine=machine,
            answers=tuple(answer(question, job, machine) for job in question.jobs()),
        )
        for name, machine in targets
    )
    answers = [each for target in found for each in target.answers]
    if answers and all(each.verdict == "not_possible" for each in answers):
        raise BadOption(answers[0].reason or "no job is possible with these options")
    return found


def answer(question: Question, job: Job, machine: Machine) -> Answer:
    """One job on one machine: the first way that fits, else the plain way."""
    work = job.of(question.workloads)
    pinned = {**_wishes_for(question.wishes, work), "quant": job.quant}
    need = _need(question, work, pinned) if not machine.gpus else None
    row = Answer(job=job.id, label=job.label, verdict="not_possible", workload=work, need=need)
    tried: list[tuple[Strategy, Estimate]] = []
    too_large: list[tuple[int, Strategy]] = []
    refusal: str | None = None
    for how in _ways(question, machine, work, pinned):
        if isinstance(how, BadOption):
            refusal = refusal or str(how)
            continue
        if (barely := _first_good(tried)) is not None and barely[0].placement != how.placement:
            break
        least = floor(question.model, machine, work, how) if tried else None
        if least is not None and least.low_bytes > budget(machine.gpus[0])[0]:
            too_large.append((least.process_bytes, how))
            continue
        shown = estimate(question.model, machine, work, how)
        tried.append((how, shown))
        # a streamed layer less makes room for a way that surely fits; elsewhere defaults are worth more
        if shown.verdict == "fits" or (shown.verdict in GOOD and how.engine != "stream"):
            break
    good = next((way for way in reversed(tried) if way[1].verdict == "fits"), None) or _first_good(tried)
    if good is not None:
        how, shown = good
        row = _with(row, question, machine, how, shown, _changed(tried[0][0], how, shown))
        if not machine.gpus:
            return row
        most = limits(question.model, machine, work, how)
        return replace(row, longest_context_tokens=most.context_tokens, largest_batch_size=most.batch_size)
    if not tried:
        return replace(row, reason=refusal)
    on_card = [way for way in tried if way[0].placement == "full_gpu" and way[1].gpus]
    reason = None
    if on_card:
        reason = _least(on_card[0], _most_sparing(question, machine, work, on_card, too_large))
    return _with(row, question, machine, *tried[0], reason)


def _first_good(tried: list[tuple[Strategy, Estimate]]) -> tuple[Strategy, Estimate] | None:
    return next((way for way in tried if way[1].verdict in GOOD), None)


def _with(
    row: Answer, question: Question, machine: Machine, how: Strategy, shown: Estimate, reason: str | None
) -> Answer:
    """The row with the way that is shown."""
    remarks = notes(Field(question.arch, machine, row.workload), how)
    return replace(row, verdict=shown.verdict, strategy=how, estimate=shown, reason=reason, notes=remarks)


def _most_sparing(
    question: Question,
    machine: Machine,
    work: Workload,
    on_card: list[tuple[Strategy, Estimate]],
    too_large: list[tuple[int, Strategy]],
) -> tuple[Strategy, Estimate]:
    """The way on a card that needs least. `too_large`: ways that certainly do not fit, and what each needs at
    least; only those that could be the one are estimated."""
    best = min(on_card, key=_process_bytes)
    for least, how in sorted(too_large, key=lambda way: way[0]):
        if least >= _process_bytes(best):
            break
        best = min(best, (how, estimate(question.model, machine, work, how)), key=_process_bytes)
    return best


def _process_bytes(way: tuple[Strategy, Estimate]) -> int:
    return max(gpu.process_bytes for gpu in way[1].gpus)


def _least(plain: tuple[Strategy, Estimate], sparing: tuple[Strategy, Estimate]) -> str | None:
    """What the most sparing way on a card needs, where that is clearly less than the plain way."""
    least, changed = _process_bytes(sparing), _changed(plain[0], *sparing)
    if changed is None or least > _CLEARLY_LESS * _process_bytes(plain):
        return None
    return f"at least {format_bytes(least)}, {changed}"


def _wishes_for(wishes: Mapping[str, Any], work: Workload) -> dict[str, Any]:
    """Wishes without those of the other task."""
    other = INFER_SETTINGS if work.task == "train" else TRAIN_SETTINGS
    return {name: value for name, value in wishes.items() if name not in other}


def _ways(
    question: Question, machine: Machine, work: Workload, pinned: dict[str, Any]
) -> Iterator[Strategy | BadOption]:
    """Strategies in the order they are tried; a refusal in place of a placement that is not possible."""
    placements: tuple[Placement, ...] = _ON_CARD if machine.gpus else ("cpu",)
    if "placement" in pinned:
        placements = (pinned["placement"],)
    for placement in placements:
        try:
            plain = resolve_strategy(question.arch, machine, work, {**pinned, "placement": placement})
        except BadOption as refusal:
            yield refusal
            continue
        yield plain
        legal, _ = legal_strategies(question.arch, machine, work, {**pinned, "placement": placement})
        yield from (how for how in legal if how != plain)


def _need(question: Question, work: Workload, pinned: dict[str, Any]) -> Estimate | None:
    """The plain way on a card that holds anything."""
    try:
        how = resolve_strategy(question.arch, _ANY_CARD, work, {**pinned, "placement": "full_gpu"})
    except BadOption:
        return None
    return estimate(question.model, _ANY_CARD, work, how)


def _changed(plain: Strategy, how: Strategy, estimated: Estimate) -> str | None:
    """What differs from the plain way, as text."""
    names = {"optimizer": "", "loss": " loss", "cache": " cache", "attention": " attention"}
    changes = [
        f"{getattr(how, name)}{suffix}"
        for name, suffix in names.items()
        if getattr(how, name) != getattr(plain, name)
    ]
    if how.activation_offload and not plain.activation_offload:
        changes.append("layer inputs in RAM")
    where = estimated.placement
    layers = where.layers_on_gpu + where.layers_in_ram + where.layers_on_disk
    if how.placement == "mixed_offload":
        ram = format_bytes(estimated.host.ram_bytes)
        changes.append(f"{where.layers_in_ram} of {layers} layers in RAM ({ram} there)")
    if where.layers_on_disk:
        changes.append(f"{where.layers_on_disk} of {layers} layers on disk")
    return "with " + ", ".join(changes) if changes else None


def smallest(question: Question, cards: Iterable[GpuProfile], count: int) -> dict[str, tuple[str, ...]]:
    """Ids of the smallest cards that hold each job entirely, none where no card of `cards` does."""
    sold = [
        (card, budget(machine_from_gpus([(card, 1)]).gpus[0])[0]) for card in cards if _worth_buying(card)
    ]
    found = {}
    for job in question.jobs():
        work = job.of(question.workloads)
        pinned = {**_wishes_for(question.wishes, work), "quant": job.quant}
        pinned.pop("placement", None)
        least = _least_bytes(question, work, pinned)
        large = [
            card
            for card, room in sold
            if least is not None and room >= least and (card.bf16 or job.quant != "none")
        ]
        fits = smallest_cards(question.model, work, large, pinned=pinned, count=count)
        found[job.id] = tuple(fit.gpu.id for fit in fits)
    return found


def too_large(targets: Iterable[Target]) -> list[str]:
    """Ids of the jobs that no target with a card holds entirely, and that are possible somewhere."""
    held: dict[str, bool] = {}
    for target in targets:
        for each in target.answers if target.machine.gpus else ():
            entirely = each.verdict in GOOD and each.strategy and each.strategy.placement == "full_gpu"
            held[each.job] = held.get(each.job, False) or bool(entirely)
    return [job for job, whole in held.items() if not whole]


def smallest_streamed(
    question: Question, cards: Iterable[GpuProfile], jobs: Iterable[str], count: int
) -> dict[str, tuple[Streamed, ...]]:
    """For each of `jobs` (their ids), the smallest cards through which it streams, given enough RAM."""
    sold = sorted(filter(_worth_buying, cards), key=lambda card: (card.memory_bytes, card.id))
    wanted, found = set(jobs), {}
    for job in (job for job in question.jobs() if job.id in wanted):
        work = job.of(question.workloads)
        pinned = {**_wishes_for(question.wishes, work), "quant": job.quant, "placement": "mixed_offload"}
        ways = (way for card in sold if (way := _streaming(question, card, work, pinned)) is not None)
        least = tuple(islice(ways, count))
        if least:
            found[job.id] = least
    return found


def _streaming(
    question: Question, card: GpuProfile, work: Workload, pinned: dict[str, Any]
) -> Streamed | None:
    """The first way in which a job surely streams through a card; None where there is none."""
    machine = machine_from_gpus([(card, 1)])
    try:
        ways, _ = legal_strategies(question.arch, machine, work, pinned)
    except BadOption:
        return None
    estimates = (
        (how, estimate(question.model, machine, work, how)) for how in ways if how.engine == "stream"
    )
    way = next(((how, shown) for how, shown in estimates if shown.verdict == "fits"), None)
    if way is None:
        return None
    how, shown = way
    speed = shown.speed.train_tokens_per_s or shown.speed.decode_tokens_per_s
    return Streamed(
        card=card.id,
        card_bytes=shown.gpus[0].process_bytes,
        ram_bytes=shown.host.ram_bytes,
        strategy=how,
        tokens_per_s=speed.typical if speed else None,
    )


def _least_bytes(question: Question, work: Workload, pinned: dict[str, Any]) -> int | None:
    """What the most sparing way needs at least, so that cards which are certainly too small are left out."""
    try:
        ways, _ = legal_strategies(question.arch, _ANY_CARD, work, {**pinned, "placement": "full_gpu"})
    except BadOption:
        return None
    least = (floor(question.model, _ANY_CARD, work, how) for how in ways)
    return int(_LIGHTEST_CARD * min(each.process_bytes for each in least if each is not None))


def _worth_buying(card: GpuProfile) -> bool:
    """Cards sold on their own that the executor is built for and current CUDA builds still support."""
    if card.vendor != "nvidia" or card.form in ("laptop", "chip") or card.id.endswith("-modded"):
        return False
    return (parse_capability(card.compute_capability) or (0, 0)) >= _LEAST_CAPABILITY
