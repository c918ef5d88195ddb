"""One cell on one device: load it once, run it freely, then again under smaller and smaller allocator caps.

The run is the executor's own (`executor.attempt`); what is added is that the model stays loaded, so that the
smallest working cap is found without loading again. Each try begins from the loaded model: optimizer state,
gradients and caches are made anew, what earlier tries left in the allocator is given back to the driver.
"""

from __future__ import annotations

import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.accuracy.caps import NoCapWorks, smallest_cap
from benchmarks.accuracy.cells import Allocator, Cell
from benchmarks.accuracy.job import inputs_of, options_of, plan_of, word_tokenizer
from executor.attempt import Attempt, Outcome
from executor.card import Card
from executor.disk_errors import chain
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
    """An attempt whose model stays loaded after it, to be run again."""

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
        """Run the job once more on the loaded model; torch's out-of-memory error passes through."""
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
        keep_adapters()

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
            _adapted.clear()
            release()

    def _measure(self, allocator: Allocator, first: bool, share_bytes: int | None, slack: float) -> None:
        # a function of its own: nothing of this run may be alive when the next one loads
        attempt = self._attempt(share_bytes)
        outcome = self._run(attempt, share_bytes)
        shutil.rmtree(attempt.output.path, ignore_errors=True)
        self.tell({"figures": figures(outcome)} if first else {"again": {allocator: figures(outcome)}})
        if self.device == "cuda" and not self.cell.timed:
            self.tell({"caps": {allocator: self._search(attempt, outcome, share_bytes, slack)}})
        attempt.model_kept.close()
        attempt.model_kept = None

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
        if self.device == "cuda":
            reuse_managed_memory()
        try:
            return attempt.run()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and share_bytes is not None:
                raise ShareExceeded(last_line(error)) from None
            raise

    def _search(
        self, attempt: Kept, outcome: Outcome, share_bytes: int | None, slack: float
    ) -> dict[str, Any]:
        low, high = outcome.allocated_peak_bytes or 0, outcome.reserved_peak_bytes or 0
        clean(attempt)

        def works(cap: int) -> bool:
            set_cap(cap)
            folder = self._new_folder()
            try:
                attempt.again(folder)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                forget(error)
                return False
            finally:
                clean(attempt)
                shutil.rmtree(folder, ignore_errors=True)  # checkpoints of large models fill a disk
            return True

        try:
            cap = smallest_cap(low, high, works, guess=int(slack * low))
        except NoCapWorks as error:
            return {"error": str(error)}
        finally:
            if share_bytes is not None:
                set_cap(share_bytes)
        return {"failed_bytes": cap.failed_bytes, "worked_bytes": cap.worked_bytes, "attempts": cap.attempts}

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


def left_behind() -> int:
    """Bytes of the allocator that are in use before anything is loaded."""
    import torch

    return torch.cuda.memory_allocated()


def set_cap(n: int) -> None:
    """Let the allocator reserve at most `n` bytes of the current card."""
    import torch

    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (n + 0.5) / total))


def use_allocator(name: Allocator) -> None:
    """Allocate from here on as torch does by default, or with expandable segments as the executor does."""
    import torch

    torch.cuda.memory._set_allocator_settings(f"expandable_segments:{name == 'expandable'}")


def clean(attempt: Kept) -> None:
    """Leave nothing but the loaded model: no gradients, no wrappers of the last run, no cached blocks."""
    from accelerate.utils import extract_model_from_parallel

    model = _adapted.get(id(attempt.model_kept.model), attempt.model_kept.model)
    for parameter in model.parameters():
        parameter.grad = None
    # every Trainer wraps forward for mixed precision, unless the model says that it has been wrapped
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    vars(model).pop("_is_accelerate_prepared", None)
    if "bitsandbytes.functional" in sys.modules:
        sys.modules["bitsandbytes.functional"].GlobalPageManager.get_instance().paged_tensors.clear()
        _managed.reset()
    release()


def forget(error: BaseException) -> None:
    """Frames of a traceback hold the tensors of every function that was running."""
    for each in chain(error):
        for linked in (each, each.__context__):
            if linked is not None and linked.__traceback__ is not None:
                traceback.clear_frames(linked.__traceback__)
                linked.__traceback__ = None


_adapted: dict[int, Any] = {}


def keep_adapters() -> None:
    """Runs after the first train the adapters that are there: peft would add a second set."""
    from executor import train

    original = train.add_adapters
    if getattr(original, "keeps", False):
        return

    def once(model: Any, *args: Any) -> Any:
        if id(model) not in _adapted:
            _adapted[id(model)] = original(model, *args)
        return _adapted[id(model)]

    once.keeps = True  # type: ignore[attr-defined]
    train.add_adapters = once


class _Managed:
    """Managed memory handed out again in the next run: bitsandbytes never gives it back."""

    def __init__(self) -> None:
        self._free: dict[Any, list[Any]] = {}
        self._used: list[tuple[Any, Any]] = []

    def get(self, original: Any, *shape: int, **settings: Any) -> Any:
        key = (shape, str(settings.get("dtype")))
        kept = self._free.get(key)
        tensor = kept.pop() if kept else original(*shape, **settings)
        self._used.append((key, tensor))
        return tensor

    def reset(self) -> None:
        for key, tensor in self._used:
            self._free.setdefault(key, []).append(tensor)
        self._used.clear()


_managed = _Managed()


def reuse_managed_memory() -> None:
    """Paged optimizer states of one run are those of the next (`_Managed`)."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        return
    import bitsandbytes.functional as functional

    original = functional.get_paged
    if getattr(original, "reuses", False):
        return

    def get_paged(*shape: int, **settings: Any) -> Any:
        return _managed.get(original, *shape, **settings)

    get_paged.reuses = True  # type: ignore[attr-defined]
    functional.get_paged = get_paged
