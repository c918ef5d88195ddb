"""What a run works on: prompts or training rows, read and checked before anything heavy is imported."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

from executor.errors import BadOption
from executor.options import RunOptions
from executor.prompts import Prompt, prompts_of
from executor.rows import Row, read_examples
from executor.sampling import check_sampling
from planner.types import Workload

_GENERATION = ("max_new_tokens", "greedy", "temperature", "top_p")
# not among them: max_steps, which bounds any run and is given to folders of plans of both tasks
_TRAINING = (
    "learning_rate",
    "lr_schedule",
    "warmup_ratio",
    "epochs",
    "save_steps",
    "eval_split",
    "packing",
    "report_to",
)


@dataclass(frozen=True)
class Inputs:
    """Prompts for inference, rows for training; neither in a rehearsal."""

    prompts: tuple[Prompt, ...] = ()
    rows: tuple[Row, ...] = ()
    digest: str | None = None
    """SHA-256 of the file they came from."""


def read_inputs(workload: Workload, options: RunOptions) -> Inputs:
    """The inputs that the plan's task needs.

    Errors: `BadOption` when they are missing or belong to the other task, `BadDataset` for a bad row.
    """
    _refuse_foreign(workload, options)
    if options.rehearse:
        return Inputs()
    digest = hashlib.sha256()
    if workload.task == "infer":
        if options.dataset is not None:
            raise BadOption("--dataset is for training and the plan is for inference")
        check_sampling(options)
        prompts = tuple(prompts_of(options, digest))
        return Inputs(prompts=prompts, digest=digest.hexdigest() if options.prompts_file else None)
    if options.prompts or options.prompts_file is not None:
        raise BadOption("--prompt is for inference and the plan is for training", "give --dataset FILE.jsonl")
    if options.dataset is None:
        raise BadOption("training needs a dataset", "give --dataset FILE.jsonl, or use `executor rehearse`")
    rows = tuple(read_examples(options.dataset, digest))
    return Inputs(rows=rows, digest=digest.hexdigest())


def _refuse_foreign(workload: Workload, options: RunOptions) -> None:
    """What belongs to the other task would have no effect: the user thinks of another plan."""
    infer = workload.task == "infer"
    for field in fields(options):
        if (
            field.name in (_TRAINING if infer else _GENERATION)
            and getattr(options, field.name) != field.default
        ):
            theirs, ours = ("training", "inference") if infer else ("inference", "training")
            name = field.name.replace("_", "-")
            raise BadOption(f"--{name} is for {theirs} and the plan is for {ours}", "leave it away")
