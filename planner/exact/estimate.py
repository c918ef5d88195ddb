"""`planner estimate --exact`: the one estimator, its memory traced instead of replayed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from planner.errors import BadConfig, BadOption, FitwrightError
from planner.estimate import Exact, architecture_of, estimate, normal, normal_strategy
from planner.memory.overheads import cublas_workspace
from planner.rates import capability
from planner.resolve import ResolvedModel, resolve
from planner.types import Estimate, Machine, Stack, Strategy, Workload
from profiles.schema import Architecture, ModelProfile

NEEDED = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


def require_libraries() -> None:
    """Errors: `BadOption` naming what is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BadOption(
            f"--exact runs the real modelling code, and {', '.join(missing)} is not installed",
            "pip install 'fitwright[executor]'",
        )


def resolve_exact(name: str, *, offline: bool) -> tuple[ResolvedModel, Architecture]:
    """The model called `name`, also one whose architecture only transformers knows.

    Errors: those of `planner.resolve`, and `BadConfig` for what transformers does not know either.
    """
    require_libraries()
    try:
        found = resolve(name, offline=offline)
        return found, architecture_of(found.profile)
    except BadConfig as unknown:
        facts, id = _facts(name, offline, unknown)
        return _unlisted(facts, id, name)


def _facts(name: str, offline: bool, unknown: BadConfig) -> tuple[dict[str, Any], str]:
    """config.json of a path or a Hub name, unread. Errors: `unknown` where there is none to read."""
    from planner.hub import fetch
    from profiles.config import load_config_file

    path = Path(name)
    if not path.exists():
        if "/" not in name:
            raise unknown
        return load_config_file(fetch(name, offline=offline).config_path), name.rpartition("/")[2].lower()
    folder = path if path.is_dir() else path.parent
    return load_config_file(name), folder.resolve().name or "model"


def _unlisted(facts: Mapping[str, Any], id: str, name: str) -> tuple[ResolvedModel, Architecture]:
    from planner.exact import build
    from planner.exact.structure import architecture_of_modules, profile_of_modules

    with build.quiet():
        model = build.build_model(build.load_config(facts), Strategy())
    path = str(Path(name).resolve()) if Path(name).exists() else None
    profile = profile_of_modules(facts, id, model)
    return ResolvedModel(profile, path=path), architecture_of_modules(model)


def exact_estimate(
    model: ModelProfile, arch: Architecture, machine: Machine, workload: Workload, strategy: Strategy
) -> Estimate:
    """Memory traced on transformers' own code, the rest as `planner.estimate` works it out.

    Errors: `BadOption` for jobs that are not one card's alone, `BadConfig` for what transformers refuses.
    """
    from planner.exact.trace import HOPPER, Traced, trace_job

    work = normal(workload)
    how = normal_strategy(strategy, work)
    _refuse(machine, work, how)
    profile = machine.gpus[0].profile
    card = capability(machine.gpus[0]) or HOPPER
    try:
        traced: Traced = trace_job(model.config, work, how, cublas_workspace(profile), card)
    except FitwrightError:
        raise
    except Exception as error:  # modelling code and peft refuse in their own words
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise BadConfig(
            f"{model.config.get('model_type')} does not run this job here: {text[0][:200]}",
            "--debug shows where",
        ) from error
    answer = estimate(model, machine, work, how, _installed(), exact=Exact(arch, traced.memory))
    return msgspec.structs.replace(answer, reasons=(*answer.reasons, *_remarks(traced, how)))


def _refuse(machine: Machine, work: Workload, how: Strategy) -> None:
    if how.placement != "full_gpu" or not machine.gpus:
        raise BadOption(
            "--exact traces a job that is on one card as a whole", "leave out --placement, or name a card"
        )
    if len(machine.gpus) > 1 and work.task == "infer":
        raise BadOption("--exact traces one card, not several that share the layers", "name one card")
    if how.activation_offload or how.speculate != "none" or how.cache in ("offloaded", "quantized"):
        raise BadOption("--exact does not trace host offload, packed caches or drafts", "leave out --exact")
    if how.quant_experts != "none":
        raise BadOption("--exact traces transformers' own experts, not packed ones", "leave out --exact")


def _installed() -> Stack:
    from planner.inspect.installed import installed_libraries, stack_of

    return stack_of(installed_libraries())


def _remarks(traced: Any, how: Strategy) -> tuple[str, ...]:
    """What was traced, and what no trace without a card can see."""
    layers = traced.layers
    lines = []
    if layers is not None:
        count = "every layer" if layers.whole else f"{len(layers.kept)} of {len(layers.kinds)} layers"
        lines.append(
            f"traced on transformers' own code without weights: {count} run, the rest replayed from them"
        )
    lines.append(
        "not traced: the CUDA context, fragmentation, workspaces inside cuDNN and Triton kernels"
        + (", the paged share of optimizer state" if how.optimizer.startswith("paged_") else "")
    )
    if traced.attention != how.attention and traced.attention == "eager":
        lines.append("traced with eager attention: transformers has no other for this model")
    if how.attention == "flash_attention_2":
        lines.append(
            "flash_attention_2 is traced through torch's own flash kernel, which keeps the same tensors"
        )
    if how.quant == "int8":
        lines.append("outlier columns of int8 products are those of random weights")
    return (*lines, *traced.notes)
