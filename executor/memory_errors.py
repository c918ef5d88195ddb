"""Telling out-of-memory errors from others, and saying which estimate was too small."""

from __future__ import annotations

from executor.measure import MomentMeter
from planner.types import Candidate
from planner.units import format_gib

_SIGNS = ("out of memory", "can't allocate memory", "cudaerrormemoryallocation", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory of card or host ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def describe_out_of_memory(error: BaseException, candidate: Candidate, meter: MomentMeter | None) -> str:
    """One line: when it happened, what had been predicted for that moment, and what the card said."""
    moment = (meter.current if meter is not None else None) or "load"
    gpus = candidate.estimate.gpus
    predicted = gpus[0].moments.get(moment) if gpus else None
    said = str(error).split(". ")[0].splitlines()[0][:140] if str(error) else type(error).__name__
    expected = f" (predicted {format_gib(predicted)} allocated)" if predicted else ""
    return f"out of memory in {moment.replace('_', ' ')}{expected}: {said}"
