"""One candidate after another: when memory runs out, let go of everything and take the next.

Training goes on from the last checkpoint where the next candidate's optimizer keeps the same state, answers
of an earlier candidate are kept.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from executor import ui
from executor.errors import CannotHonour, FitwrightError, Interrupted, OutOfMemory
from executor.inputs import Inputs
from executor.memory_errors import Shortage, is_out_of_memory
from executor.options import RunOptions
from executor.output import OutputDirectory
from executor.source import ModelSource
from executor.stopping import StopRequest
from planner.types import Candidate, Plan, Strategy, Workload
from planner.units import MIB, format_bytes

if TYPE_CHECKING:
    from executor.attempt import Outcome
    from executor.card import Card

GOES_ON = "the same command goes on from there"
LEFT_OVER_BYTES = 64 * MIB
"""What an allocator may hold after everything was let go of: library workspaces, constants of kernels."""
_FAMILIES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit",
    "paged_adamw_8bit": "adamw8bit",
}


@dataclass(frozen=True)
class Left:
    """A candidate that was not carried through, and why."""

    candidate: Candidate
    reason: str
    shortage: Shortage | None = None

    def __str__(self) -> str:
        return f"candidate {self.candidate.rank}: {self.reason}"


@dataclass(kw_only=True)
class Job:
    """What every candidate is tried on."""

    plan: Plan
    options: RunOptions
    inputs: Inputs
    source: ModelSource
    output: OutputDirectory
    stop: StopRequest


def first_that_runs(
    job: Job, candidates: Sequence[Candidate], left: Sequence[str]
) -> tuple[Outcome, tuple[str, ...]]:
    """The outcome of the first candidate that does not run out of memory, and why earlier ones were left:
    those of `left`, and those that were tried.

    Errors: `OutOfMemory` when all have run out, after a table of what each lacked; `CannotHonour` when some
    could not run for another reason.
    """
    from executor.card import Card

    card = Card()
    tried: list[Left] = []
    for candidate in candidates:
        job.stop.graceful = False
        if job.stop.requested:
            raise Interrupted("interrupted", GOES_ON)
        reasons = (*left, *map(str, tried))
        if job.output.take_up(candidate.rank, reasons, state_of(job.plan.workload, candidate.strategy)):
            ui.say("the checkpoints so far hold another optimizer's state: training begins again")
        outcome, gone = _try(job, candidate, card, last_resort=bool(reasons))
        if outcome is not None:
            return outcome, reasons
        assert gone is not None
        tried.append(gone)
        ui.say(str(gone))
        _say_what_stays()
    job.output.all_left()
    raise _all_gone(tried, left)


def _try(job: Job, candidate: Candidate, card: Card, last_resort: bool) -> tuple[Outcome | None, Left | None]:
    """One attempt: its outcome, or why it was left. Everything it held is free when this returns."""
    from executor.attempt import Attempt

    attempt = Attempt(job.plan, candidate, job.options, job.inputs, job.source, job.output, card, job.stop)
    try:
        return attempt.run(), None
    except FitwrightError as error:
        # the first candidate is what was asked for; a later one is only a way out, and so is the next
        if not last_resort or error.exit_code != 2:
            raise
        gone = Left(candidate, str(error))
        forget_frames(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        shortage = attempt.shortage(error)
        gone = Left(candidate, str(shortage), shortage)
        forget_frames(error)
    attempt.let_go()
    job.output.sweep()
    release()
    return None, gone


def state_of(workload: Workload, strategy: Strategy) -> str:
    """A name for what a training checkpoint holds; of the same name, one goes on from the other's.

    Candidates of a plan train the same tensors of the same model; what differs is the optimizer's state, and
    in full fine-tuning the dtype of the weights.
    """
    if workload.task != "train":
        return "answers"
    family = _FAMILIES.get(strategy.optimizer, strategy.optimizer)
    return f"{family}-{strategy.dtype}" if workload.method == "full" else family


def release() -> None:
    """Give back all memory that nothing refers to any more, on the card and in RAM."""
    _forget_overrides()
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # compiled graphs hold their inputs and their pools
        gc.collect()
    if torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _forget_overrides() -> None:
    """transformers registers every embedding with bitsandbytes' manager, which lives as long as the process,
    so that 8-bit optimizers keep its states in 32 bits."""
    optimizers = sys.modules.get("bitsandbytes.optim")
    if optimizers is not None:
        optimizers.GlobalOptimManager.get_instance().initialize()


def forget_frames(error: BaseException) -> None:
    """Frames of a traceback hold the tensors of every function that was running: of this error, and of all
    that it was raised from or while handling."""
    linked: list[BaseException | None] = [error]
    seen: set[int] = set()
    while linked:
        each = linked.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        linked += (each.__cause__, each.__context__)
        if each.__traceback__ is not None:
            traceback.clear_frames(each.__traceback__)
            each.__traceback__ = None


def _say_what_stays() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        held = sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))
        if held > LEFT_OVER_BYTES:
            ui.say(f"warning: {format_bytes(held)} of the candidate's memory could not be given back")


def _all_gone(tried: Sequence[Left], left: Sequence[str]) -> FitwrightError:
    from executor.table import show_left

    show_left([(gone.candidate, gone.shortage, gone.reason) for gone in tried], left)
    reasons = "; ".join((*left, *map(str, tried)))
    if any(gone.shortage is None for gone in tried):
        return CannotHonour(
            f"no candidate can be carried out here: {reasons}", "make the plan again on this machine"
        )
    return OutOfMemory(
        f"out of memory on every candidate tried: {reasons}",
        "close what else uses the card, or plan with a smaller batch, sequence or precision",
    )
