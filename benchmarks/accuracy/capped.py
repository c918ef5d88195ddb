"""The search for the smallest allocator cap, around a training run or a generation of the executor."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from benchmarks.accuracy.caps import NoCapWorks, smallest_cap
from benchmarks.accuracy.cells import Allocator
from executor.ladder import forget_frames, release
from executor.measure import MomentMeter
from executor.memory_errors import is_out_of_memory


class Search:
    """The smallest cap under which a piece of work goes through once more. `found` is what it came to."""

    def __init__(self, slack: float, share_bytes: int | None) -> None:
        self._slack, self._share = slack, share_bytes
        self.found: dict[str, Any] = {}
        self.low = self.high = 0

    def run(
        self,
        low: int | None,
        high: int | None,
        work: Callable[[], None],
        between: Callable[[], None] = release,
    ) -> None:
        """`low`, `high`: bytes allocated and reserved at the peak of the free run. `between`: what goes back
        before every try."""
        self.low, self.high = low or 0, high or 0
        between()
        try:
            cap = smallest_cap(
                self.low,
                self.high,
                lambda n: self._works(n, work, between),
                guess=int(self._slack * self.low),
            )
            self.found = {name: getattr(cap, name) for name in ("failed_bytes", "worked_bytes", "attempts")}
        except NoCapWorks as error:
            self.found = {"error": str(error)}
        finally:
            set_cap(self._share)

    def _works(self, cap: int, work: Callable[[], None], between: Callable[[], None]) -> bool:
        set_cap(cap)
        try:
            work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            forget_frames(error)
            return False
        finally:
            between()
        return True


@contextmanager
def searching_at_the_end(search: Search, meter: Callable[[], MomentMeter]) -> Iterator[None]:
    """Within, a training run ends with the search: every try is one more step of the run that is there.

    Model, adapters, optimizer state and the workspaces of cuBLAS stay where the free steps have put them, as
    in a run that goes on: a workspace that settled where logits were is part of what the next step finds.
    `meter`: gives the meter of the free run, once it is there.
    """
    from executor import train

    stock = train._make_trainer

    def make(*args: Any) -> Any:
        trainer = stock(*args)
        trainer.add_callback(_AtTheEnd(trainer, search, meter()))
        return trainer

    train._make_trainer = make
    try:
        yield
    finally:
        train._make_trainer = stock


class _AtTheEnd(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: Any, search: Search, meter: MomentMeter) -> None:
        self._trainer, self._search, self._meter = trainer, search, meter

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.leave()
        low, high = self._meter.peak_bytes(), self._meter.reserved_peak_bytes
        self._search.run(low, high, self._step, between=empty_cache)

    def _step(self) -> None:
        trainer = self._trainer
        try:
            for inputs in itertools.islice(
                trainer.get_train_dataloader(), trainer.args.gradient_accumulation_steps
            ):
                trainer.training_step(trainer.model_wrapped, inputs)
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
        finally:
            trainer.model.zero_grad()
            trainer.take_step()


def empty_cache() -> None:
    """Give back segments that are wholly free. cuBLAS keeps its workspaces, unlike in `release`."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def set_cap(n: int | None) -> None:
    """Let the allocator reserve at most `n` bytes of the current card; None: all of it."""
    import torch

    if n is None:
        torch.cuda.set_per_process_memory_fraction(1.0)
        return
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (n + 0.5) / total))


def use_allocator(name: Allocator) -> None:
    """Allocate from here on as torch does by default, or with expandable segments as the executor does."""
    import torch

    torch.cuda.memory._set_allocator_settings(f"expandable_segments:{name == 'expandable'}")


def left_behind() -> int:
    """Bytes of the allocator that are in use before anything is loaded."""
    import torch

    return torch.cuda.memory_allocated()
