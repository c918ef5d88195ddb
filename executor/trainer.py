"""transformers' Trainer as the loop, with exact losses, whole checkpoints, moments and a clean stop."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from executor import ui
from executor.card import managed_bytes
from executor.checkpoints import seal
from executor.files import publish_folder, write_atomically
from executor.measure import MomentMeter, tensor_bytes
from executor.stopping import StopRequest

if TYPE_CHECKING:
    import torch

PROGRESS_FILE = "progress.json"
SAVE_AFTER_SECONDS = 300.0
KEPT_CHECKPOINTS = 2


@dataclass
class TrainingRecord:
    """What one process saw of a training run."""

    losses: list[float] = field(default_factory=list)
    """Loss of every optimizer step since step 1, across resumes."""
    step_seconds: list[float] = field(default_factory=list)
    """Duration of each step of this process, saving not counted."""
    step_tokens: list[int] = field(default_factory=list)
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    """Optimizer state on the device; managed memory is apart."""
    managed_bytes: int = 0
    after_first_step: Any = None
    """Called once the first step is done, when every kernel has been loaded."""


class RunTrainer(Trainer):
    """Trainer that writes checkpoints to a temporary folder and renames them, and keeps every step's loss."""

    def __init__(
        self, *args: Any, record: TrainingRecord, output: Path, meter: MomentMeter, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.record, self.output, self.meter = record, output, meter
        self._micro_losses: list[torch.Tensor] = []
        self._tokens = 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """As Trainer's; also counts tokens and keeps the loss on the device."""
        mask = inputs.get("attention_mask")
        self._tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_losses.append(loss)
        return loss

    def take_step(self) -> tuple[float, int]:
        """Loss and tokens of the optimizer step that just ended."""
        loss = float(sum(float(part) for part in self._micro_losses))
        tokens = self._tokens
        self._micro_losses, self._tokens = [], 0
        return loss, tokens

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.meter.enter("checkpoint_save")
        staging = self.output / ".partial" / f"step-{self.state.global_step}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        self.store_flos()
        self.save_model(str(staging), _internal_call=True)
        self._save_optimizer_and_scheduler(str(staging))
        self._save_scaler(str(staging))
        self._save_rng_state(str(staging))
        self._save_trainer_state(staging)
        write_atomically(staging / PROGRESS_FILE, json.dumps({"losses": self.record.losses}))
        seal(staging)
        publish_folder(staging, self.output / f"checkpoint-{self.state.global_step}")
        self._forget_old_checkpoints()

    def _save_trainer_state(self, folder: Path) -> None:
        for part in [*self.callback_handler.callbacks, self.control]:
            if isinstance(part, ExportableState):
                self.state.stateful_callbacks[type(part).__name__] = part.state()
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _forget_old_checkpoints(self) -> None:
        found = sorted(self.output.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        for old in found[:-KEPT_CHECKPOINTS]:
            retired = self.output / ".partial" / f"{old.name}.old"
            old.rename(retired)
            shutil.rmtree(retired, ignore_errors=True)


class RunCallback(TrainerCallback):
    """Times steps, measures components, saves after five minutes at the latest, and stops when asked to."""

    def __init__(self, trainer: RunTrainer, steps: ui.Steps, stop: StopRequest) -> None:
        self._trainer, self._steps, self._stop = trainer, steps, stop
        self._saved = time.monotonic()
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the step's clock."""
        self._began = time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All gradients are there now."""
        self._trainer.meter.enter("optimizer_step")
        record = self._trainer.record
        if not record.step_seconds:
            record.gradient_bytes = tensor_bytes(
                p.grad for p in self._trainer.model.parameters() if p.grad is not None
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Record the step; decide about saving and stopping."""
        trainer, record = self._trainer, self._trainer.record
        loss, tokens = trainer.take_step()
        record.losses.append(loss)
        record.step_seconds.append(time.monotonic() - self._began)
        record.step_tokens.append(tokens)
        if len(record.step_seconds) == 1:
            self._measure_optimizer()
            if record.after_first_step is not None:
                record.after_first_step()
        rate = tokens / max(record.step_seconds[-1], 1e-9)
        self._steps.update(state.global_step, f"loss {loss:.4f}  {rate:,.0f} tokens/s")
        if time.monotonic() - self._saved >= SAVE_AFTER_SECONDS:
            control.should_save = True
        if self._stop.requested:
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is complete."""
        self._saved = time.monotonic()

    def _measure_optimizer(self) -> None:
        record = self._trainer.record
        optimizer = getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)
        state = [t for per in optimizer.state.values() for t in per.values() if hasattr(t, "untyped_storage")]
        record.optimizer_bytes = tensor_bytes(t for t in state if not getattr(t, "is_paged", False))
        record.managed_bytes = managed_bytes()


def read_progress(checkpoint: Path) -> list[float]:
    """Losses of the steps before `checkpoint`."""
    return [float(x) for x in json.loads((checkpoint / PROGRESS_FILE).read_text())["losses"]]
