"""Fine-tuning: adapters or the whole model, from a dataset or, in a rehearsal, from random tokens."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor import ui
from executor.batches import Collator, Examples, RandomTokens, split
from executor.checkpoints import last_whole
from executor.continuity import go_on_as, mark_of, other_weights
from executor.examples import prepare
from executor.files import publish_folder
from executor.measure import MomentMeter, tensor_bytes, watch_training
from executor.packing import pack, refuse_mixing
from executor.rows import Row
from executor.stopping import StopRequest
from executor.task import Look, Task
from executor.trainer import RunCallback, RunTrainer, TrainingRecord, read_progress
from executor.training_arguments import choose_loss, training_arguments
from planner.exact.adapters import add_adapters

REHEARSAL_STEPS = 4
PAD_MULTIPLE = {"cpu": 32, "cuda": 8}


@dataclass(kw_only=True)
class Training(Task):
    """What is needed to train one loaded candidate."""

    rows: Sequence[Row] = ()
    after_first_step: Look | None = None


@dataclass(kw_only=True)
class Trained:
    """What training did."""

    record: TrainingRecord
    steps: int
    resumed_from_step: int
    interrupted: bool
    components: dict[str, int]
    notes: list[str] = field(default_factory=list)


def train(job: Training) -> Trained:
    """Train, resuming from the last checkpoint in the output directory; leave `adapter/` or `model/` there.

    Errors: `BadDataset`, `BadOption`, `CannotHonour`; torch's out-of-memory error passes through.
    """
    from transformers import set_seed

    set_seed(job.options.seed)
    job.meter.enter("forward")
    notes: list[str] = []
    train_set, eval_set = _datasets(job, notes)
    model = _trainable(job)
    frozen = mark_of(p for p in model.parameters() if not p.requires_grad)
    record = TrainingRecord(frozen_mark=frozen, after_first_step=job.after_first_step)
    total = _total_steps(job, len(train_set))
    trainer = _make_trainer(job, model, train_set, eval_set, record, total, notes)
    checkpoint, resumed = _last_checkpoint(job, record, total, notes)
    components = _components(model, job.strategy.upcast_frozen)
    with (
        choose_loss(job.strategy, job.device, model, notes),
        _watched(model, job.meter),
        _lean(job, model),
        _checkpoints_away(job, model, notes),
        ui.Steps("training", total, resumed) as steps,
        contextlib.ExitStack() as ending,
    ):
        trainer.add_callback(RunCallback(trainer, steps, job.stop))
        if job.options.report_to == "tensorboard":
            from executor.event_log import EventLog

            log = EventLog(job.output.path / "logs", record, resumed)
            trainer.add_callback(log)
            ending.callback(log.close)
        _run_loop(trainer, checkpoint, resumed, total, job.stop)
        interrupted = job.stop.requested and len(record.losses) < total
        job.meter.leave()
    if record.evaluations and eval_set is not None:
        notes.append(_evaluation_note(record, len(eval_set)))
    components |= {"gradients": record.gradient_bytes, "optimizer state": record.optimizer_bytes}
    if not interrupted:
        _leave_result(job, model)
    return Trained(
        record=record,
        steps=len(record.losses),
        resumed_from_step=resumed,
        interrupted=interrupted,
        components=components,
        notes=notes,
    )


def _last_checkpoint(
    job: Training, record: TrainingRecord, total: int, notes: list[str]
) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its step, 0 for none; what came before it is put into `record`."""
    checkpoint = last_whole(job.output)
    if checkpoint is None:
        return None, 0
    before = read_progress(checkpoint, record)
    notes += go_on_as(before, job.device)
    for line in other_weights(before.get("frozen"), record.frozen_mark):
        ui.say(f"warning: {line}")
        notes.append(line)
    resumed = int(checkpoint.name.split("-")[1])
    ui.say(f"resuming from step {resumed} of {total}")
    return checkpoint, resumed


def _run_loop(
    trainer: RunTrainer, checkpoint: Path | None, resumed: int, total: int, stop: StopRequest
) -> None:
    if checkpoint is not None and resumed >= total:
        # killed after the last checkpoint: only the result is missing
        trainer._load_from_checkpoint(str(checkpoint))
        return
    stop.graceful = True
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        stop.graceful = False


def _datasets(job: Training, notes: list[str]) -> tuple[Any, Any]:
    workload, options = job.workload, job.options
    if options.rehearse:
        per_step = workload.batch_size * workload.gradient_accumulation_steps
        steps = options.max_steps or REHEARSAL_STEPS
        vocabulary = job.loaded.model.config.get_text_config().vocab_size
        return RandomTokens(steps * per_step, workload.seq_len, vocabulary, options.seed), None
    assert options.dataset is not None
    rows = job.rows
    with ui.stage(f"preparing {len(rows)} rows"):
        prepared = prepare(options.dataset, rows, job.loaded.tokenizer, workload.seq_len)
    if prepared.truncated:
        notes.append(f"{prepared.truncated} of {len(rows)} rows were cut at {workload.seq_len} tokens")
    if prepared.empty:
        notes.append(
            f"{prepared.empty} of {len(rows)} rows were left out: no answer within {workload.seq_len} tokens"
        )
    train_part, eval_part = split(prepared.examples, options.eval_split, options.seed)
    if options.eval_split > 0 and not eval_part:
        notes.append("nothing was held out: a single row is left to learn from")
    if prepared.endless:
        notes.append(
            f"{prepared.endless} of {len(rows)} rows have no end-of-turn token: generation may not stop"
        )
    if options.packing:
        train_part = pack(train_part, workload.seq_len)
        notes.append(f"packed into {len(train_part)} sequences of at most {workload.seq_len} tokens")
    return Examples(train_part), Examples(eval_part) if eval_part else None


def _trainable(job: Training) -> Any:
    model = job.loaded.model
    model.config.use_cache = False
    keep_unpacked(model)
    if job.options.packing and not job.options.rehearse:
        refuse_mixing(model, _collator(job))
    if job.workload.method == "full":
        return model
    return add_adapters(model, job.workload, job.strategy)


def keep_unpacked(model: Any) -> None:
    """Have no 4-bit linear repack its weight for inference while it is evaluated.

    On CPUs with AVX-512 BF16 bitsandbytes does so in place, and training goes on through a product without
    gradients, with a plausible loss.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def _total_steps(job: Training, examples: int) -> int:
    if job.options.max_steps is not None:
        return job.options.max_steps
    batches = math.ceil(examples / job.workload.batch_size)
    per_epoch = max(1, math.ceil(batches / job.workload.gradient_accumulation_steps))
    return max(1, math.ceil(per_epoch * (1.0 if job.options.rehearse else job.options.epochs)))


def _make_trainer(
    job: Training,
    model: Any,
    train_set: Any,
    eval_set: Any,
    record: TrainingRecord,
    total: int,
    notes: list[str],
) -> RunTrainer:
    from transformers import PrinterCallback, ProgressCallback

    trainer = RunTrainer(
        model=model,
        args=training_arguments(
            job.workload, job.strategy, job.options, job.output.path, job.device, total, notes
        ),
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=_collator(job),
        processing_class=job.loaded.tokenizer,
        record=record,
        output=job.output.path,
        meter=job.meter,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _collator(job: Training) -> Collator:
    tokenizer = job.loaded.tokenizer
    pad = 0 if tokenizer is None or tokenizer.pad_token_id is None else tokenizer.pad_token_id
    flat = job.strategy.attention == "flash_attention_2"
    return Collator(pad, PAD_MULTIPLE[job.device.type], job.workload.seq_len, flat)


def _evaluation_note(record: TrainingRecord, examples: int) -> str:
    step, loss = record.evaluations[-1]
    best, least = min(record.evaluations, key=lambda entry: entry[1])
    text = f"evaluation loss {loss:.6f} after step {step} over {examples} held-out sequences"
    return text if best == step else f"{text}; the least was {least:.6f} after step {best}"


@contextlib.contextmanager
def _watched(model: Any, meter: MomentMeter) -> Iterator[None]:
    remove = watch_training(model, meter)
    try:
        yield
    finally:
        remove()


def _lean(job: Training, model: Any) -> contextlib.AbstractContextManager[None]:
    if not job.loaded.slots:
        return contextlib.nullcontext()
    from executor.streaming.training import lean

    return lean(model)


@contextlib.contextmanager
def _checkpoints_away(job: Training, model: Any, notes: list[str]) -> Iterator[None]:
    """Layer inputs in host memory where the strategy says so."""
    if not job.strategy.activation_offload:
        yield
        return
    from executor.activation_offload import offloading

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with offloading(inner, job.workload.batch_size * job.workload.seq_len, job.device) as pool:
        yield
        job.loaded.pinned_bytes += pool.pinned_bytes
        if not pool.bytes_moved:
            notes.append("no checkpoint left the card: the model has no layer whose input could")


def _components(model: Any, upcast: bool) -> dict[str, int]:
    """Bytes of frozen and of trained parameters; scales of quantized weights count as weights.

    `upcast`: peft's k-bit preparation made 16-bit tensors float32, which is a line of its own in an estimate.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    scales = [t for p in frozen for t in _quantization_tensors(getattr(p, "quant_state", None))]
    if not frozen:
        return {"weights": tensor_bytes(trained)}
    weights = tensor_bytes([*frozen, *scales, *model.buffers()])
    more = sum(tensor_bytes([p]) // 2 for p in frozen if p.element_size() == 4) if upcast else 0
    found = {"weights": weights - more, "adapters": tensor_bytes(trained)}
    return {**found, "upcast weights": more} if more else found


def _quantization_tensors(state: Any) -> list[Any]:
    if state is None:
        return []
    nested = getattr(state, "state2", None)
    own = [state.absmax, state.code, getattr(state, "offset", None)]
    return [t for t in own if t is not None] + ([nested.absmax, nested.code] if nested is not None else [])


def _leave_result(job: Training, model: Any) -> None:
    if job.options.rehearse:
        return
    name = "model" if job.workload.method == "full" else "adapter"
    staging = job.output.partial / name
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.config.use_cache = True  # only training runs without a cache
    model.save_pretrained(staging)
    if job.loaded.tokenizer is not None:
        job.loaded.tokenizer.save_pretrained(staging)
    publish_folder(staging, job.output.path / name)
