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

from planner.memory.adapters import adapter_parameters
from planner.memory.streamed import Traffic, parts_of, traffic
from planner.passes import Job, Seconds, decode_seconds, prefill_seconds, train_seconds
from planner.placement import tiers_of
from planner.rates import LEVELS, Level, Rates, card_rates, cpu_rates
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
    adapted = workload.task == "train" and workload.method != "full"
    adapters = adapter_parameters(arch, workload) if adapted else 0
    moves = _traffic(arch, workload, strategy, placement) if not on_cpu else Traffic()
    job = Job(
        count_work(arch), workload, strategy, placement, on_cpu, machine.host.cores or 0, adapters, moves
    )
    rates_of = cpu_rates if on_cpu else card_rates
    rates = {level: rates_of(machine, strategy.dtype, level) for level in LEVELS}
    basis = _basis(machine, on_cpu)
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
    time of their own; None where that is not known. A straight line through two sizes of pass."""
    rates = card_rates(machine, strategy.dtype, "typical")
    one_pass, found = train_seconds, []
    for times in (1, 4):
        work = replace(workload, batch_size=times, gradient_accumulation_steps=1)
        if workload.task == "infer":
            work = replace(workload, prompt_tokens=512 * times, batch_size=1, concurrency=1)
            one_pass = prefill_seconds
        seconds = one_pass(_job(arch, machine, work, strategy, placement), rates, "typical")
        if seconds is None:
            return None
        tokens = work.seq_len * times if workload.task == "train" else work.prompt_tokens
        found.append((tokens, seconds.card, max(seconds.streamed, seconds.read)))
    (few, less, copies), (many, more, _) = found
    each = (more - less) / (many - few)
    return max(1, ceil(few + (copies - less) / each)) if copies and each > 0 else None


def _job(
    arch: Architecture, machine: Machine, workload: Workload, strategy: Strategy, placement: PlacementMap
) -> Job:
    on_cpu = strategy.placement == "cpu" or not machine.gpus
    adapted = workload.task == "train" and workload.method != "full"
    return Job(
        count_work(arch),
        workload,
        strategy,
        placement,
        on_cpu,
        machine.host.cores or 0,
        adapter_parameters(arch, workload) if adapted else 0,
        Traffic() if on_cpu else _traffic(arch, workload, strategy, placement),
    )


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
