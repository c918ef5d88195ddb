"""Which ways there are to do a job: every placement and precision, and from each the settings worth changing.

Placement, precision and engine are searched. The other settings start from their defaults; a `Lever` leaves a
default where that saves memory, and for speed when speed is preferred. What the user
fixed stays fixed. Combinations are judged by the table in `planner.rules` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import product
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from planner.errors import BadOption
from planner.identity import identity_cache
from planner.machine import kind_of
from planner.rates import auto_dtype
from planner.rules import Case, Rule, broken_rule, lacks_sdpa
from planner.types import Dtype, Engine, Machine, Placement, Quant, Rejected, Strategy, Workload
from profiles.precisions import STORED
from profiles.schema import Architecture

Prefer = Literal["quality", "speed", "headroom"]
PLACEMENTS: tuple[Placement, ...] = ("full_gpu", "mixed_offload", "disk_offload", "cpu")
QUANTS: tuple[Quant, ...] = ("none", "int8", "nf4")
INFER_SETTINGS = ("cache", "speculate", "draft", "prefill_chunk_tokens")
TRAIN_SETTINGS = (
    "optimizer",
    "gradient_checkpointing",
    "activation_offload",
    "upcast_frozen",
    "loss",
    "kernels",
)
"""Fields of `Strategy` that mean something to one task only."""


LONG_PROMPT_TOKENS = 2048
"""Longer prompts may go through the model in parts of so many, each of which takes longer to compute than
streamed weights take to arrive."""


class Lever(Struct, frozen=True):
    """A departure from the defaults, and what it is for."""

    task: Literal["infer", "train"]
    settings: dict[str, Any]
    purpose: Literal["memory", "speed"]
    reason: str


_PACKED_EXPERTS = "experts in NF4 like the other weights; transformers alone leaves them in 16 bits"
LEVERS: tuple[Lever, ...] = (
    Lever("infer", {"quant_experts": "nf4"}, "memory", _PACKED_EXPERTS),
    Lever("train", {"quant_experts": "nf4"}, "memory", _PACKED_EXPERTS),
    Lever("train", {"optimizer": "adamw_8bit"}, "memory", "optimizer state in 8 bits instead of 32"),
    Lever(
        "train",
        {"optimizer": "paged_adamw_8bit"},
        "memory",
        "optimizer state in 8 bits, in memory the driver pages to RAM when the card is full",
    ),
    Lever(
        "train",
        {"loss": "fused", "kernels": "liger"},
        "memory",
        "fused loss: logits of the whole sequence are never held at once",
    ),
    Lever(
        "train",
        {"loss": "fused", "kernels": "torch"},
        "memory",
        "fused loss: logits exist for a block of the vocabulary and a chunk of tokens at once",
    ),
    Lever(
        "train",
        {"activation_offload": True},
        "memory",
        "layer inputs wait in RAM between forward and backward",
    ),
    Lever(
        "train",
        {"gradient_checkpointing": False},
        "speed",
        "no checkpointing: the forward pass is not repeated, its activations are kept",
    ),
    Lever("infer", {"cache": "offloaded"}, "memory", "the KV cache waits in RAM while other layers compute"),
    Lever(
        "infer",
        {"prefill_chunk_tokens": LONG_PROMPT_TOKENS},
        "memory",
        f"the prompt goes through the model {LONG_PROMPT_TOKENS} tokens at a time",
    ),
    Lever(
        "infer",
        {"cache": "static"},
        "speed",
        "static cache: a decode step is recorded once and replayed, instead of launched kernel by kernel",
    ),
)


def default_optimizer(machine: Machine, workload: Workload) -> str:
    """What is used where none is named; paging is CUDA's, so cards of other vendors go without."""
    if workload.task == "infer" or workload.method != "qlora":
        return "adamw_torch_fused"
    paged = all(gpu.profile.vendor == "nvidia" for gpu in machine.gpus)
    return "paged_adamw_8bit" if paged else "adamw_8bit"


ENGINES: dict[Placement, tuple[Engine, ...]] = {
    "full_gpu": ("resident",),
    "mixed_offload": ("stream", "accelerate"),
    "disk_offload": ("stream", "accelerate"),
    "cpu": ("resident",),
}
"""What carries each placement out, the preferred engine first; the next one where a rule excludes it."""


def default_engine(placement: Placement) -> Engine:
    """What carries a placement out where no engine is named."""
    return ENGINES[placement][0]


def _default_placement(machine: Machine, pinned: Mapping[str, Any]) -> Placement:
    """Where layers live where no placement is named: engine stream has one of its own."""
    if not machine.gpus:
        return "cpu"
    return "mixed_offload" if pinned.get("engine") == "stream" else "full_gpu"


def default_dtype(machine: Machine, workload: Workload, placement: Placement) -> Dtype:
    """bf16 where the card has it, else fp16; fp32 where fp16 weights themselves would have to be trained."""
    dtype: Dtype = "bf16" if placement == "cpu" else auto_dtype(machine)
    full = workload.task == "train" and workload.method == "full"
    return "fp32" if full and dtype == "fp16" else dtype


def resolve_strategy(
    arch: Architecture, machine: Machine, workload: Workload, pinned: Mapping[str, Any]
) -> Strategy:
    """The one strategy of `estimate`: what the user fixed, and the default of everything else.

    Errors: `BadOption` when the settings exclude each other.
    """
    qlora = workload.task == "train" and workload.method == "qlora"
    placement: Placement = pinned.get("placement") or _default_placement(machine, pinned)
    stored = STORED.get(arch.pretrained_quantization)
    quant: Quant = pinned.get("quant") or stored or ("nf4" if qlora else "none")
    strategy = _base(arch, machine, workload, pinned, placement, quant)
    rule = broken_rule(Case(arch, machine, workload, strategy))
    if rule is not None:
        raise BadOption(rule.reason, f"what would work: {rule.needs}")
    return strategy


def legal_strategies(
    arch: Architecture,
    machine: Machine,
    workload: Workload,
    pinned: Mapping[str, Any] | None = None,
    prefer: Prefer = "quality",
) -> tuple[list[Strategy], list[Rejected]]:
    """Every strategy that is possible, and each excluded combination once, with its reason.

    `pinned` maps fields of `Strategy` to values the user fixed. Errors: `BadOption` when they leave nothing.
    """
    fixed = tuple(sorted((pinned or {}).items()))
    legal, rejected = _legal(arch)(kind_of(machine), workload, fixed, prefer)
    return list(legal), list(rejected)


@identity_cache
def _legal(arch: Architecture) -> Callable[..., tuple[list[Strategy], list[Rejected]]]:
    """`_legal(arch)(machine, ...)`: worked out once for all machines of a kind."""
    return lru_cache(maxsize=256)(partial(_legal_strategies, arch))


def _legal_strategies(
    arch: Architecture,
    machine: Machine,
    workload: Workload,
    pinned: tuple[tuple[str, Any], ...],
    prefer: Prefer,
) -> tuple[list[Strategy], list[Rejected]]:
    fixed = dict(pinned)
    legal: dict[Strategy, None] = {}
    rejected: dict[tuple[str, ...], Rejected] = {}
    first: Rule | None = None
    for placement, quant in product(
        _choices(fixed, "placement", PLACEMENTS), _choices(fixed, "quant", QUANTS)
    ):
        broken: list[tuple[Strategy, Rule]] = []
        engines = _choices(fixed, "engine", ENGINES[placement])
        for engine in engines:
            base = _base(arch, machine, workload, {**fixed, "engine": engine}, placement, quant)
            rule = broken_rule(Case(arch, machine, workload, base))
            if rule is not None:
                broken.append((base, rule))
                continue
            for strategy in _variants(workload, base, fixed, prefer):
                if broken_rule(Case(arch, machine, workload, strategy)) is None:
                    legal[strategy] = None
            break
        if len(broken) == len(engines):  # else one carries it out, and what the other lacks is no matter
            base, rule = broken[0]
            first = first or rule
            key = (rule.name, *(getattr(base, name) for name in rule.about))
            rejected.setdefault(key, Rejected(strategy=base, reason=rule.reason, needs=rule.needs))
    if not legal and first is not None:
        raise BadOption(first.reason, f"what would work: {first.needs}")
    return list(legal), list(rejected.values())


def departures(machine: Machine, workload: Workload, strategy: Strategy) -> tuple[Lever, ...]:
    """The levers a strategy uses, so settings that differ from their defaults for a stated purpose."""
    default = Strategy(optimizer=default_optimizer(machine, workload))
    return tuple(
        lever
        for lever in LEVERS
        if lever.task == workload.task
        and all(getattr(strategy, name) == value for name, value in lever.settings.items())
        and any(getattr(default, name) != value for name, value in lever.settings.items())
    )


def _choices(fixed: Mapping[str, Any], name: str, all_of: tuple[Any, ...]) -> tuple[Any, ...]:
    return (fixed[name],) if name in fixed else all_of


def _base(
    arch: Architecture,
    machine: Machine,
    workload: Workload,
    fixed: Mapping[str, Any],
    placement: Placement,
    quant: Quant,
) -> Strategy:
    """The defaults for a placement and a precision, with what the user fixed."""
    settings: dict[str, Any] = {
        "optimizer": default_optimizer(machine, workload),
        "engine": default_engine(placement),
        "dtype": default_dtype(machine, workload, placement),
        "attention": "eager" if lacks_sdpa(arch) else "sdpa",
    }
    return Strategy(**{**settings, **fixed, "placement": placement, "quant": quant})


def _variants(
    workload: Workload, base: Strategy, fixed: Mapping[str, Any], prefer: Prefer
) -> Iterator[Strategy]:
    """The base, and every combination of levers that the user's choices leave open."""
    purposes = {"memory", "speed"} if prefer == "speed" else {"memory"}
    choices: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for lever in LEVERS:
        wanted = lever.task == workload.task and lever.purpose in purposes
        if wanted and not lever.settings.keys() & fixed.keys() and not _pointless(lever, base, workload):
            choices.setdefault(tuple(lever.settings), [{}]).append(lever.settings)
    for combination in product(*choices.values()):
        settings = {name: value for part in combination for name, value in part.items()}
        yield replace(base, **settings)


def _pointless(lever: Lever, base: Strategy, workload: Workload) -> bool:
    """Whether a lever saves nothing over the base: paged state is the smallest, and on a CPU is not paged;
    experts are quantized with the other weights only. Where weights stream, what else a step holds is worth
    sending away or making small too."""
    if "prefill_chunk_tokens" in lever.settings:
        return base.placement == "cpu" or workload.prompt_tokens <= LONG_PROMPT_TOKENS
    if "quant_experts" in lever.settings:
        return base.quant != "nf4"
    if "activation_offload" in lever.settings or lever.settings.get("kernels") == "torch":
        return base.engine != "stream"
    optimizer = str(lever.settings.get("optimizer", ""))
    if not optimizer:
        return False
    return base.optimizer.endswith("adamw_8bit") or (
        base.placement == "cpu" and optimizer.startswith("paged_")
    )
