"""How long a training job takes and what it draws from the wall: `--train-tokens`."""

from __future__ import annotations

from msgspec import Struct

from planner.types import Machine, Range, Speed, Strategy, Workload


class Cost(Struct, frozen=True):
    """Time and energy of a whole job, from the cheapest to the dearest that the range of speeds allows."""

    hours: Range
    watts: int | None
    """Power limit of the card that computes; None where it is not known. CPU, RAM and fans come on top."""
    kwh: Range | None


def training_cost(machine: Machine, workload: Workload, strategy: Strategy, speed: Speed) -> Cost | None:
    """Hours and kWh of `workload.train_tokens` on one card at its power limit; None without tokens or speed.

    `hours.high` belongs to the lowest speed: a range of costs runs from the cheapest to the dearest.
    """
    tokens, rate = workload.train_tokens, speed.train_tokens_per_s
    if tokens is None or rate is None:
        return None
    hours = Range(*(tokens / each / 3600 for each in (rate.high, rate.typical, rate.low)))
    watts = card_watts(machine) if strategy.placement != "cpu" else None
    if watts is None:
        return Cost(hours, None, None)
    kwh = Range(*(each * watts / 1000 for each in (hours.low, hours.typical, hours.high)))
    return Cost(hours, watts, kwh)


def card_watts(machine: Machine) -> int | None:
    """Power limit of the first card: as set now, else by its data sheet."""
    if not machine.gpus:
        return None
    gpu = machine.gpus[0]
    return gpu.power_limit_watts or gpu.profile.power_watts
