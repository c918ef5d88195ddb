"""One cell on one device: load it once, run it freely, then again under smaller and smaller allocator caps.

The run is the executor's own (`executor.attempt`); what is added is the search for the smallest cap under
which the work goes through once more: one more step of a training run, with its optimizer's state where the
free steps have put it; one more generation with the loaded model. Before each try what the last one left in
the allocator is given back to the driver.
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.accuracy.capped import Search, left_behind, searching_at_the_end, set_cap, use_allocator
from benchmarks.accuracy.cells import Allocator, Cell
from benchmarks.accuracy.job import inputs_of, options_of, plan_of, word_tokenizer
from executor.attempt import Attempt, Outcome
from executor.card import Card
from executor.ladder import LEFT_OVER_BYTES, release
from executor.measure import MomentMeter
from executor.memory_errors import is_out_of_memory
from executor.output import OutputDirectory
from executor.source import without_weights
from executor.stopping import StopRequest

FIGURES = (
    "load_seconds",
    "load_bytes",
    "allocated_peak_bytes",
    "reserved_peak_bytes",
    "process_peak_bytes",
    "context_bytes",
    "managed_bytes",
    "host_peak_bytes",
    "host_base_bytes",
    "moments",
)


class ShareExceeded(Exception):
    """The free run needed more than the part of the card that was set aside for it."""


class Kept(Attempt):
    """An attempt whose model stays loaded after it, so that generation can be run again."""

    def __init__(self, *args: Any, cell: Cell, share_bytes: int | None) -> None:
        super().__init__(*args)
        self.cell, self.share_bytes = cell, share_bytes
        self.model_kept: Any = None
        self.device: Any = None

    def _open_card(self, device: Any) -> None:
        self.device = device
        super()._open_card(device)
        if device.type == "cuda" and self.share_bytes is not None:
            set_cap(self.share_bytes)

    def _load(self, load: Any, device: Any, outcome: Outcome) -> Any:
        loaded = super()._load(load, device, outcome)
        if self.cell.data != "random":
            loaded.tokenizer = word_tokenizer()
        return loaded

    def _close(self, loaded: Any, device: Any, outcome: Outcome) -> None:
        closing, loaded.close = loaded.close, lambda: None
        super()._close(loaded, device, outcome)
        loaded.close = closing
        self.model_kept = loaded

    def again(self, folder: Path) -> None:
        """Generate once more with the loaded model; torch's out-of-memory error passes through."""
        self.output, self.meter = opened(folder, self.plan.digest), MomentMeter(self.device)
        try:
            self._work(self.model_kept, self.device, Outcome(self.candidate, self.device))
            self.meter.leave()
        finally:
            self.output.close()


class Bench:
    """Carries one cell out. `tell` takes each part of the result as soon as it is known."""

    def __init__(self, cell: Cell, device: str, folder: Path, tell: Callable[[dict[str, Any]], None]) -> None:
        self.cell, self.device, self.folder, self.tell = cell, device, folder, tell
        self.card = Card()
        self._runs = 0

    def measure(self, share_bytes: int | None, slack: float = 1.0) -> None:
        """Every allocator of the cell in turn. `slack`: the predicted smallest cap over the allocated peak.

        Errors: `ShareExceeded`; those of the executor.
        """
        for i, allocator in enumerate(self.cell.allocators):
            if self.device == "cuda":
                use_allocator(allocator)
                if (left := left_behind()) > LEFT_OVER_BYTES:
                    self.tell({"again": {allocator: {"error": f"{left} bytes left of the run before"}}})
                    return
            self._measure(allocator, i == 0, share_bytes, slack if allocator == "stock" else 1.0)
            release()

    def _measure(self, allocator: Allocator, first: bool, share_bytes: int | None, slack: float) -> None:
        # a function of its own: nothing of this run may be alive when the next one loads
        attempt = self._attempt(share_bytes)
        searches = self.device == "cuda" and not self.cell.timed
        search = Search(slack, share_bytes) if searches else None
        if search is not None and self.cell.workload.task == "train":
            with searching_at_the_end(search, lambda: attempt.meter):
                outcome = self._run(attempt, share_bytes)
            outcome.allocated_peak_bytes, outcome.reserved_peak_bytes = search.low, search.high
        else:
            outcome = self._run(attempt, share_bytes)
        shutil.rmtree(attempt.output.path, ignore_errors=True)  # several whole models fill a disk
        self.tell({"figures": figures(outcome)} if first else {"again": {allocator: figures(outcome)}})
        if search is not None:
            if self.cell.workload.task == "infer":
                search.run(
                    outcome.allocated_peak_bytes, outcome.reserved_peak_bytes, self._generating(attempt)
                )
            self.tell({"caps": {allocator: search.found}})
        attempt.model_kept.close()
        attempt.model_kept = None

    def _generating(self, attempt: Kept) -> Callable[[], None]:
        def once() -> None:
            folder = self._new_folder()
            try:
                attempt.again(folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        return once

    def _attempt(self, share_bytes: int | None) -> Kept:
        plan = plan_of(self.cell, self.device)
        return Kept(
            plan,
            plan.candidates[0],
            options_of(self.cell),
            inputs_of(self.cell),
            without_weights(plan.model),
            opened(self._new_folder(), self.cell.id),
            self.card,
            StopRequest(),
            cell=self.cell,
            share_bytes=share_bytes,
        )

    def _run(self, attempt: Kept, share_bytes: int | None) -> Outcome:
        try:
            return attempt.run()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and share_bytes is not None:
                raise ShareExceeded(last_line(error)) from None
            raise

    def _new_folder(self) -> Path:
        self._runs += 1
        return self.folder / f"run-{self._runs}"


# --------------------------------------------------------------------------- parts


def opened(folder: Path, digest: str) -> OutputDirectory:
    """A fresh output directory."""
    output = OutputDirectory(folder)
    output.open(digest, {}, restart=False)
    return output


def figures(outcome: Outcome) -> dict[str, Any]:
    """What a free run measured."""
    found = {name: getattr(outcome, name) for name in FIGURES}
    found["environment"] = outcome.environment
    found["notes"] = outcome.notes
    if outcome.generated is not None:
        done = outcome.generated
        found |= {
            "prefill_tokens_per_s": done.prefill_tokens_per_s,
            "decode_tokens_per_s": done.decode_tokens_per_s,
            "cache_bytes": done.cache_bytes,
        }
    if outcome.trained is not None:
        record = outcome.trained.record
        found |= {
            "components": outcome.trained.components,
            "losses": record.losses,
            "train_tokens_per_s": later_rate(record.step_tokens, record.step_seconds),
        }
    return found


def later_rate(tokens: list[int], seconds: list[float]) -> float | None:
    """Tokens per second of all steps but the first, which loads kernels."""
    return sum(tokens[1:]) / sum(seconds[1:]) if len(seconds) > 1 and sum(seconds[1:]) > 0 else None


def last_line(error: BaseException) -> str:
    """The last line of a traceback: the error's type and what it says, in one line."""
    text = " ".join(traceback.format_exception_only(error)[-1].split())
    return text[:400]
