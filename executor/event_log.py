"""`--report-to tensorboard`: loss, learning rate and speed of every step under DIR/logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from executor.trainer import TrainingRecord


class EventLog(TrainerCallback):
    """Writes what the record holds after each step. To be added after the callback that fills the record.

    A resumed run goes on in a file of its own beside the first; what the run before wrote of steps that are
    done again is purged by TensorBoard's own rule (`purge_step`).
    """

    def __init__(self, folder: Path, record: TrainingRecord, resumed_from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = resumed_from_step + 1 if folder.exists() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)  # type: ignore[no-untyped-call]
        self._record = record
        self._learning_rate = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step's rate; the scheduler moves on before the step has ended."""
        self._learning_rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One point in each curve."""
        record, step = self._record, state.global_step
        figures = {
            "train/loss": record.losses[-1],
            "train/learning_rate": self._learning_rate,
            "train/tokens_per_s": record.step_tokens[-1] / max(record.step_seconds[-1], 1e-9),
        }
        if record.evaluations and record.evaluations[-1][0] == step:
            figures["eval/loss"] = record.evaluations[-1][1]
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What a checkpoint holds is in the curves too, whatever happens next."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
