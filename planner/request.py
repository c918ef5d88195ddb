"""The parsed command line -> Workload, Strategy and Machine. What is
not given takes the defaults of `Workload` and of `planner.strategies`.

A namespace holds `None` for what was not given. An option of the other task is an error rather than ignored:
`--seq-len` without `--task train` is a question asked differently from how it was meant.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from planner.errors import BadOption
from planner.strategies import INFER_SETTINGS, TRAIN_SETTINGS
from planner.types import Machine, Task, Workload

if TYPE_CHECKING:
    from planner.ledger import Entry

INFER_JOB = ("prompt_tokens", "new_tokens", "concurrency")
TRAIN_JOB = (
    "method",
    "seq_len",
    "gradient_accumulation_steps",
    "train_tokens",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "lora_dropout",
    "adapter_dtype",
    "lora_variant",
)
INFER_ONLY = (*INFER_JOB, *INFER_SETTINGS)
TRAIN_ONLY = (*TRAIN_JOB, *TRAIN_SETTINGS)
STRATEGY = (
    "dtype",
    "quant",
    "quant_experts",
    "placement",
    "engine",
    "cache",
    "gradient_checkpointing",
    "activation_offload",
    "optimizer",
    "attention",
    "loss",
    "kernels",
    "upcast_frozen",
    "speculate",
    "draft",
)
MOST_BATCH_TOKENS = 10**12


def workload(args: Namespace, task: Task | None = None) -> Workload:
    """The job of the command line, or its part for `task` when a command looks at both.

    Errors: `BadOption` for options of the other task, or more tokens in one batch than can be meant.
    """
    chosen: Task = task or args.task or "infer"
    if task is None:
        refuse_other_task(args, chosen)
    names = ("batch_size", *(INFER_JOB if chosen == "infer" else TRAIN_JOB))
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    job = Workload(task=chosen, **given)
    tokens = job.prompt_tokens + job.new_tokens if chosen == "infer" else job.seq_len
    if tokens * job.sequences > MOST_BATCH_TOKENS:
        raise BadOption(
            f"{tokens} tokens x {job.sequences} sequences are more than {MOST_BATCH_TOKENS:.0e} at once"
        )
    return job


def refuse_other_task(args: Namespace, task: Task) -> None:
    """Errors: `BadOption` naming an option that belongs to the other task."""
    other = TRAIN_ONLY if task == "infer" else INFER_ONLY
    for name in other:
        if getattr(args, name, None) is not None:
            wanted = "train" if task == "infer" else "infer"
            raise BadOption(
                f"{flag(name)} belongs to --task {wanted}, not --task {task}", f"add --task {wanted}"
            )


def flag(name: str) -> str:
    """The option behind an attribute of the namespace: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def wishes(args: Namespace) -> dict[str, Any]:
    """Fields of `Strategy` the user fixed; `auto` is no wish."""
    given = {name: getattr(args, name, None) for name in STRATEGY}
    chosen = {name: value for name, value in given.items() if value is not None and value != "auto"}
    if (chosen.get("speculate") == "draft") != ("draft" in chosen):
        raise BadOption("--speculate draft and --draft MODEL need each other")
    if "draft" in chosen:
        chosen["draft"] = _known(chosen["draft"], bool(getattr(args, "offline", False)))
    return chosen


def _known(draft: str, offline: bool) -> str:
    """The name of a draft model; of a folder the whole path, since plans are carried out elsewhere too.

    Errors: `UnknownModel` with the nearest names.
    """
    from planner.resolve import resolve

    return resolve(draft, offline=offline).path or draft


def machine(args: Namespace, gpu: str | None = None) -> Machine:
    """The hardware of the command line: the cards called `gpu`, a saved machine, or this one, with its sizes
    replaced as asked.

    Errors: `UnknownGpu`, `BadMachine`, and `BadOption` for both a card and a saved machine.
    """
    from planner.machine import load_machine_file, machine_from_gpus, override

    sizes = {f"{name}_bytes": getattr(args, name) for name in ("vram", "reserve", "ram", "disk")}
    if args.machine is not None:
        if gpu is not None:
            raise BadOption(
                "--machine and --gpu exclude each other", "a saved machine already names its cards"
            )
        return override(load_machine_file(args.machine), **sizes)
    if gpu is not None:
        from profiles.hardware import parse_gpu

        return machine_from_gpus([parse_gpu(gpu)], **sizes)
    if args.vram is not None:
        return machine_from_gpus([], **sizes)
    from planner.inspect import inspect_machine

    return override(inspect_machine(), **sizes)


def remembered(args: Namespace, config: Mapping[str, Any], target: Machine) -> tuple[Entry, ...]:
    """Earlier runs of a model on the machine that is meant; none with `--no-ledger`, and none for cards of
    the catalogue, on which nothing ran."""
    if args.no_ledger or target.origin == "catalogue":
        return ()
    from planner.inspect.ledger import recall

    return recall(config, target)
