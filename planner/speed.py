"""Speed by roofline: what a pass must read, compute, launch and fetch, over the rates of the hardware.

Each pass (`planner.passes`) is evaluated at three levels of `profiles/efficiency.json`: a `Range`.
Tokens per second count the whole batch; for training they are those of one card. None where a rate is not
known.

Error to expect: the points named in that file within 15 % on their card; elsewhere the range is the claim.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from msgspec.structs import replace

from planner.elementwise import elementwise
from planner.identity import identities_cache
from planner.memory.adapters import adapter_parameters
from planner.memory.lasting import trained_tensors
from planner.memory.optimizer import OPTIMIZERS
from planner.memory.streamed import Traffic, parts_of, traffic
from planner.memory.train import training_pass
from planner.passes import Job, decode_seconds, prefill_seconds, train_seconds
from planner.placement import tiers_of
from planner.rates import LEVELS, Level, Rates, card_rates, cpu_rates
from planner.seconds import Seconds
from planner.types import Machine, PlacementMap, Range, Speed, Strategy, Workload
from planner.work import count_work
from profiles.schema import Architecture

Pass = Callable[[Job, Rates, Level], Seconds | None]


def predict_speed(
    arch: Architecture,
    machine: Machine,
    workload: Workload,
    strategy: Strategy,
    placement: PlacementMap,
) -> Speed:
    """Tokens per second of a job; pure.

    `placement` says how many layers are fetched over the link or from disk in each pass.
    """
    on_cpu = strategy.placement == "cpu" or not machine.gpus
    job = _job(arch, on_cpu, machine.host.cores or 0, workload, strategy, placement)
    rates_of = cpu_rates if job.on_cpu else card_rates
    rates = {level: rates_of(machine, strategy.dtype, level) for level in LEVELS}
    basis = _basis(machine, job.on_cpu)
    if workload.task == "train":
        train, bound = _range(job, rates, train_seconds, workload.batch_size * workload.seq_len)
        return Speed(train_tokens_per_s=train, bound=bound, basis=basis)
    decode, bound = _range(job, rates, decode_seconds, workload.sequences)
    prefill, _ = _range(job, rates, prefill_seconds, workload.sequences * workload.prompt_tokens)
    return Speed(decode_tokens_per_s=decode, prefill_tokens_per_s=prefill, bound=bound, basis=basis)


def free_copies_tokens(
    arch: Architecture, machine: Machine, workload: Workload, strategy: Strategy, placement: PlacementMap
) -> int | None:
    """Tokens of one pass (of a training step's micro-batch) from which on the copies of engine stream take no
    time of their own; None where that is not known. Sizes are doubled, then a straight line is drawn."""
    rates = card_rates(machine, strategy.dtype, "typical")
    train = workload.task == "train"
    few, times = 0, 1
    before: tuple[float, ...] = ()
    while times <= _MOST_TIMES:
        work = replace(workload, batch_size=times, gradient_accumulation_steps=1)
        if not train:
            work = replace(workload, prompt_tokens=512 * times, batch_size=1, concurrency=1)
        one_pass = train_seconds if train else prefill_seconds
        seconds = one_pass(_job(arch, False, 0, work, strategy, placement), rates, "typical")
        if seconds is None:
            return None
        tokens, stretches = work.seq_len * times if train else work.prompt_tokens, seconds.stretches
        if all(busy >= copies for busy, copies in stretches):
            lines = zip(stretches, before or (0.0,) * len(stretches), strict=True)
            # a stretch that was free before, as one the host is slower in may be, does not count
            shares = [(copies - less) / (busy - less) for (busy, copies), less in lines if copies > less]
            return max(1, ceil(few + (tokens - few) * max(shares))) if shares else None
        few, before, times = tokens, tuple(busy for busy, _ in stretches), 2 * times
    return None


_MOST_TIMES = 2**12


@identities_cache
def _job(
    arch: Architecture,
    on_cpu: bool,
    cores: int,
    workload: Workload,
    strategy: Strategy,
    placement: PlacementMap,
) -> Job:
    """What is asked, with all that follows whatever the card."""
    adapted = workload.task == "train" and workload.method != "full"
    return Job(
        count_work(arch),
        workload,
        strategy,
        placement,
        on_cpu,
        cores,
        adapter_parameters(arch, workload) if adapted else 0,
        elementwise(arch, workload, strategy),
        _updates(arch, workload, strategy),
        Traffic() if on_cpu else _traffic(arch, workload, strategy, placement),
    )


@identities_cache
def _updates(arch: Architecture, workload: Workload, strategy: Strategy) -> int:
    if workload.task != "train" or OPTIMIZERS[strategy.optimizer].bits is None:
        return 0
    tensors, embeddings, _ = trained_tensors(arch, workload, training_pass(arch, workload, strategy))
    return sum(count for _, count in tensors) + len(embeddings)


def _traffic(arch: Architecture, workload: Workload, strategy: Strategy, placement: PlacementMap) -> Traffic:
    if strategy.engine != "stream":
        return Traffic()
    return traffic(parts_of(arch, strategy), tiers_of(arch, placement), workload.task == "train")


def _basis(machine: Machine, on_cpu: bool) -> str:
    if on_cpu:
        return "range that CPUs of this core count span"
    if machine.probe is not None:
        return f"probe of {machine.probe.date}"
    return "catalogue rates and efficiencies measured on one H200"


def _range(
    job: Job, rates: dict[Level, Rates], one_pass: Pass, tokens: int
) -> tuple[Range, str] | tuple[None, None]:
    found = [one_pass(job, rates[level], level) for level in LEVELS]
    low, typical, high = found
    if low is None or typical is None or high is None:
        return None, None
    speeds = sorted(tokens / seconds.total for seconds in (low, typical, high))
    return Range(*(float(f"{speed:.4g}") for speed in speeds)), typical.bound
