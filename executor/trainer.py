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
from executor.batches import count_tokens
from executor.card import managed_bytes
from executor.checkpoints import seal
from executor.continuity import numerics
from executor.disk_errors import writing_failed
from executor.examples import IGNORED
from executor.files import publish_folder, write_atomically
from executor.measure import MomentMeter, tensor_bytes
from executor.stopping import StopRequest
from executor.task import Look

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
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    """Step and loss on the held-out examples, across resumes."""
    step_seconds: list[float] = field(default_factory=list)
    """Duration of each step of this process, saving not counted."""
    step_tokens: list[int] = field(default_factory=list)
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    """Optimizer state on the device; managed memory is apart."""
    managed_bytes: int = 0
    frozen_mark: dict[str, str] | None = None
    """Fingerprint of the weights that are not trained, which no checkpoint holds."""
    after_first_step: Look | None = None


class RunTrainer(Trainer):
    """Trainer that writes checkpoints to a temporary folder and renames them, and keeps every step's loss."""

    def __init__(
        self, *args: Any, record: TrainingRecord, output: Path, meter: MomentMeter, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.record, self.output, self.meter = record, output, meter
        self._micro_losses: list[torch.Tensor] = []
        self._micro_tokens: list[torch.Tensor] = []
        self._operations_per_token: int | None = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """As Trainer's; also counts tokens and keeps the loss, both on the device."""
        self._micro_tokens.append(count_tokens(inputs))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_losses.append(loss)
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """As Trainer's, but the parameters are counted once: walking thousands of modules takes a narrow
        step's host a few per cent of its time."""
        tokens = int(inputs["input_ids"].numel())
        if self._operations_per_token is None:
            self._operations_per_token = int(super().floating_point_ops(inputs)) // tokens
        return self._operations_per_token * tokens

    def take_step(self) -> tuple[float, int]:
        """Loss and tokens of the optimizer step that just ended."""
        loss = float(sum(float(part) for part in self._micro_losses))
        tokens = sum(int(part) for part in self._micro_tokens)
        self._micro_losses, self._micro_tokens = [], []
        return loss, tokens

    def held_out_loss(self) -> float:
        """Mean loss of the learned tokens of the held-out examples.

        Trainer's own evaluation averages over batches, whatever they hold, and draws a random number for its
        loader, after which dropout would be another.
        """
        import torch

        assert self.eval_dataset is not None
        examples, size = self.eval_dataset, self.args.per_device_eval_batch_size
        total, learned = 0.0, 0
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for start in range(0, len(examples), size):
                chosen = range(start, min(start + size, len(examples)))
                inputs = self._prepare_inputs(self.data_collator([examples[i] for i in chosen]))
                count = int((inputs["labels"][:, 1:] != IGNORED).sum())
                total += float(self.compute_loss(self.model, inputs)) * count
                learned += count
        self.model.train()
        return total / learned

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As Trainer's, but adapters keep their dtype: peft's `load_adapter` would make 16-bit ones fp32."""
        model = self.model if model is None else model
        if not hasattr(model, "get_base_model"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        state = load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors")
        set_peft_model_state_dict(model, state, adapter_name=model.active_adapter)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.meter.enter("checkpoint_save")
        staging = self.output / ".partial" / f"step-{self.state.global_step}"
        try:
            self._write_checkpoint(staging)
        except Exception as error:
            # a third has no room beside the two that are kept: the older one goes first
            shutil.rmtree(staging, ignore_errors=True)
            full = writing_failed(error, self.output, goes_on=True) is not None
            if not full or not self._forget_old_checkpoints(keep=1):
                raise
            self._write_checkpoint(staging)
        publish_folder(staging, self.output / f"checkpoint-{self.state.global_step}")
        self._forget_old_checkpoints(KEPT_CHECKPOINTS)

    def _write_checkpoint(self, staging: Path) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        self.store_flos()
        self.save_model(str(staging), _internal_call=True)
        self._save_optimizer_and_scheduler(str(staging))
        self._save_scaler(str(staging))
        self._save_rng_state(str(staging))
        self._save_trainer_state(staging)
        write_atomically(staging / PROGRESS_FILE, json.dumps(self._progress()))
        seal(staging)

    def _progress(self) -> dict[str, Any]:
        record = self.record
        numbers = {**numerics(self.args.device), "frozen": record.frozen_mark}
        return {"losses": record.losses, "evaluations": record.evaluations, "environment": numbers}

    def _save_trainer_state(self, folder: Path) -> None:
        for part in [*self.callback_handler.callbacks, self.control]:
            if isinstance(part, ExportableState):
                self.state.stateful_callbacks[type(part).__name__] = part.state()
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _forget_old_checkpoints(self, keep: int) -> bool:
        found = sorted(self.output.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        for old in found[:-keep]:
            retired = self.output / ".partial" / f"{old.name}.old"
            old.rename(retired)
            shutil.rmtree(retired, ignore_errors=True)
        return len(found) > keep


class RunCallback(TrainerCallback):
    """Times steps, measures components, saves after five minutes at the latest, and stops when asked to."""

    def __init__(self, trainer: RunTrainer, steps: ui.Steps, stop: StopRequest) -> None:
        self._trainer, self._steps, self._stop = trainer, steps, stop
        self._saved = time.monotonic()
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make up for an evaluation that a stop did not wait for."""
        self._evaluate_if_due(state, args)

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
        if not self._stop.requested or state.global_step >= state.max_steps:
            self._evaluate_if_due(state, args)
        self._steps.update(state.global_step, self._figures(loss, tokens))
        if time.monotonic() - self._saved >= SAVE_AFTER_SECONDS:
            control.should_save = True
        if self._stop.requested:
            control.should_save = control.should_training_stop = True
        return control

    def _evaluate_if_due(self, state: Any, args: Any) -> None:
        """With each checkpoint that is due by its step, and with the last."""
        step, found = state.global_step, self._trainer.record.evaluations
        due = step > 0 and (step % args.save_steps == 0 or step >= state.max_steps)
        if due and self._trainer.eval_dataset is not None and (not found or found[-1][0] < step):
            found.append((step, self._trainer.held_out_loss()))

    def _figures(self, loss: float, tokens: int) -> str:
        record = self._trainer.record
        rate = tokens / max(record.step_seconds[-1], 1e-9)
        held_out = f"  held out {record.evaluations[-1][1]:.4f}" if record.evaluations else ""
        return f"loss {loss:.4f}{held_out}  {rate:,.0f} tokens/s"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is complete."""
        self._saved = time.monotonic()

    def _measure_optimizer(self) -> None:
        record = self._trainer.record
        optimizer = getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)
        state = [t for per in optimizer.state.values() for t in per.values() if hasattr(t, "untyped_storage")]
        record.optimizer_bytes = tensor_bytes(t for t in state if not getattr(t, "is_paged", False))
        record.managed_bytes = managed_bytes()


def read_progress(checkpoint: Path, record: TrainingRecord) -> dict[str, Any]:
    """Put what came before `checkpoint` into `record`; returns the environment it was computed in."""
    progress = json.loads((checkpoint / PROGRESS_FILE).read_text())
    record.losses.extend(float(loss) for loss in progress["losses"])
    record.evaluations.extend((int(step), float(loss)) for step, loss in progress.get("evaluations", ()))
    return dict(progress.get("environment") or {})
