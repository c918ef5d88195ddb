"""One job traced: build, cut, quantize, adapt, run, replay; the result as the estimator states it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from planner.exact import build, passes
from planner.exact.card import CudaCard
from planner.exact.compose import Moment, replay
from planner.exact.layers import Layers, cut, survey
from planner.exact.losses import ending
from planner.exact.storages import Storages
from planner.memory.moments import CardMemory, Snapshot, line, snapshot
from planner.memory.optimizer import StateBytes, state_bytes
from planner.memory.tape import booked, rounded
from planner.types import MemoryLine, Strategy, Workload

HOPPER = (9, 0)
"""The compute capability measured on; taken where a card has none (other vendors)."""


@dataclass(frozen=True)
class Traced:
    """Memory of a job, and what the trace had to assume."""

    memory: CardMemory
    layers: Layers | None
    guessed: frozenset[str]
    attention: str
    """The implementation that ran: transformers falls back to eager where it must."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Lasting:
    """What is there before the first layer runs and stays."""

    load: int
    load_peak: int
    weights: int
    adapters: int
    state: StateBytes
    gradients: int
    workspace: int
    dequantized: int


def trace_job(
    facts: Mapping[str, Any],
    work: Workload,
    how: Strategy,
    workspace: int,
    capability: tuple[int, int] = HOPPER,
    reduce: bool = True,
) -> Traced:
    """Memory of one job on one card.

    `workspace`: bytes of one cuBLAS workspace. `reduce`: run two or three layers of a kind and replay them;
    False runs every layer. Errors: `BadConfig` for what transformers cannot build or run.
    """
    notes: list[str] = []
    with build.quiet():
        config = build.load_config(facts)
        model = build.build_model(config, how)
        attention = str(model.config.get_text_config()._attn_implementation)
        attention_only = work.method != "full" and work.lora_targets == "attention"
        layers = survey(model, reduce, work.task == "train" and attention_only)
        if layers is not None:
            cut(model, layers)
        tokens = (
            work.seq_len * work.batch_size if work.task == "train" else work.prompt_tokens * work.sequences
        )
        transient = _largest_linear(model)
        build.quantize(model, how, tokens)
        times = _times(layers)
        load = _weight_bytes(model, times)
        model, lasting = _prepare(model, work, how, times, load, transient, workspace)
        card, cuda = Storages(capability[0]), CudaCard(capability)
        card.adopt(_lasting_tensors(model, trained=False), "weights")
        card.adopt(_lasting_tensors(model, trained=True), "adapters")
        if work.task == "train":
            model.train()
            if how.gradient_checkpointing:
                passes.checkpoint_layers(model, cuda)
            with ending(model, how, notes, cuda):
                passes.training_step(model, work, how, card, cuda)
        else:
            passes.generation(model.eval(), work, how, card, cuda)
    moments = replay(card.segments, layers)
    memory = _memory(moments, lasting, work, how, len(layers.kinds) if layers else 0)
    return Traced(memory, layers, frozenset(cuda.guessed), attention, tuple(notes))


# --------------------------------------------------------------------------- what lasts


def _times(layers: Layers | None) -> Any:
    """How many layers of the whole model a parameter of the cut one stands for, by its name."""
    if layers is None:
        return lambda name: 1
    counts = layers.stands_for()
    pattern = re.compile(rf"(?:^|\.){re.escape(layers.path)}\.(\d+)\.")

    def times(name: str) -> int:
        found = pattern.search(name + ".")
        return counts[int(found.group(1))] if found else 1

    return times


def _lasting_tensors(model: Any, trained: bool) -> Iterable[torch.Tensor]:
    """Parameters, buffers and scales; `trained` selects adapters (of a model trained in full: nothing)."""
    full = all(p.requires_grad for p in model.parameters() if p.is_floating_point())
    for _, parameter in model.named_parameters():
        if (parameter.requires_grad and not full) == trained:
            yield parameter
    if not trained:
        yield from model.buffers()
        yield from (tensor for _, tensor in build.quantization_tensors(model))


def _weight_bytes(model: Any, times: Any) -> int:
    seen: set[int] = set()
    total = 0
    named = [*model.named_parameters(), *model.named_buffers(), *build.quantization_tensors(model)]
    for name, tensor in named:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += rounded(storage.nbytes()) * times(name)
    return total


def _largest_linear(model: Any) -> dict[str, int]:
    """Bytes of the largest linear weight and the largest expert stack, in the dtype they are loaded in."""
    linear = max(
        (m.weight.numel() * m.weight.element_size() for m in model.modules() if type(m) is torch.nn.Linear
         and m is not model.get_output_embeddings()),
        default=0,
    )  # fmt: skip
    stack = max(
        (
            p.numel() * p.element_size()
            for n, p in model.named_parameters()
            if p.dim() == 3 and ".experts." in n
        ),
        default=0,
    )
    return {"linear": linear, "stack": stack}


def _prepare(
    model: Any,
    work: Workload,
    how: Strategy,
    times: Any,
    load: int,
    largest: dict[str, int],
    workspace: int,
) -> tuple[Any, _Lasting]:
    linear = largest["linear"]
    transient = {"nf4": linear + linear // 16, "int8": 2 * linear}.get(how.quant, 0)
    load_peak = load + max(transient, largest["stack"])
    dequantized = linear if how.quant != "none" else 0
    if work.task == "infer":
        nothing = StateBytes(0, 0, 0)
        return model, _Lasting(load, load_peak, load, 0, nothing, 0, workspace, dequantized)
    if work.method == "full":
        weights, adapters = load, 0
    else:
        model = build.adapt(model, work, how)
        adapters = _trained_bytes(model, times, rounded)
        weights = _weight_bytes(model, times) - adapters
    state = _optimizer_state(model, work, how, times)
    gradients = _trained_bytes(model, times, booked)
    return model, _Lasting(load, load_peak, weights, adapters, state, gradients, 2 * workspace, dequantized)


def _trained_bytes(model: Any, times: Any, size: Any) -> int:
    return sum(
        size(p.numel() * p.element_size()) * times(n) for n, p in model.named_parameters() if p.requires_grad
    )


def _optimizer_state(model: Any, work: Workload, how: Strategy, times: Any) -> StateBytes:
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    counts: Counter[int] = Counter()
    embeddings, width = [], 4
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        width = parameter.element_size()
        if id(parameter) in tables:
            embeddings.append(parameter.numel())
        else:
            counts[parameter.numel()] += times(name)
    return state_bytes(how.optimizer, sorted(counts.items()), width, tuple(embeddings))


# --------------------------------------------------------------------------- as the estimator states it

_NAMES = {
    "inputs": "inputs and rope",
    "logits": "logits and loss",
    "stream": "activations",
    "autocast copies": "autocast copies",
    "gradients": "gradients",
}


def _memory(
    moments: list[Moment], lasting: _Lasting, work: Workload, how: Strategy, layers: int
) -> CardMemory:
    shots = [_shot(moment, lasting, work, how) for moment in moments]
    if work.task == "train":
        shots = [_with_accumulated(shot, lasting, work) for shot in shots]
        shots.append(_optimizer_step(lasting))
    return CardMemory(
        load_bytes=lasting.load,
        load_peak_bytes=lasting.load_peak,
        managed_bytes=lasting.state.managed,
        dequantized_bytes=lasting.dequantized,
        snapshots=tuple(shots),
    )


def _shot(moment: Moment, lasting: _Lasting, work: Workload, how: Strategy) -> Snapshot:
    at_head = moment.layer is None and moment.phase in ("loss", "backward")
    own = "logits and loss" if at_head else "layer in work"
    sums: Counter[str] = Counter()
    for origin, n in moment.live.items():
        if origin in ("weights", "adapters"):
            continue
        fresh = moment.fresh if origin == moment.origin else 0
        sums[own] += min(fresh, n)
        sums[_NAMES.get(origin, _kept_name(work, how))] += n - min(fresh, n)
    where = "" if moment.layer is None else f", layer {moment.layer}"
    lines = [*_lasting_lines(lasting, how), *(_traced(name, n, moment, where) for name, n in sums.items())]
    phase: Any = "loss" if at_head else moment.phase
    return snapshot(phase, lines, moment.block)


def _kept_name(work: Workload, how: Strategy) -> str:
    if work.task == "infer":
        return "kv cache"
    return "checkpoints" if how.gradient_checkpointing else "activations"


def _traced(name: str, n: int, moment: Moment, where: str) -> MemoryLine:
    return line(name, n, f"storages alive in {moment.phase}{where}", "traced")


def _lasting_lines(lasting: _Lasting, how: Strategy) -> list[MemoryLine]:
    return [
        line(
            "weights",
            lasting.weights,
            f"every parameter, scale and buffer, {how.quant} / {how.dtype}",
            "traced",
        ),
        line("adapters", lasting.adapters, "trained parameters peft added", "traced"),
        line("optimizer state", lasting.state.device, f"{how.optimizer}, by tensor"),
        line("library workspace", lasting.workspace, "cuBLAS", "measured"),
    ]


def _with_accumulated(shot: Snapshot, lasting: _Lasting, work: Workload) -> Snapshot:
    """Under accumulation the gradients of earlier micro-batches are there from the start."""
    if work.gradient_accumulation_steps == 1:
        return shot
    held = sum(item.bytes for item in shot.lines if item.name == "gradients")
    others = [item for item in shot.lines if item.name != "gradients"]
    text = "of earlier micro-batches, waiting for the optimizer step"
    more = line("gradients", max(held, lasting.gradients), text, "traced")
    return snapshot(shot.moment, [*others, more], shot.largest_block)


def _optimizer_step(lasting: _Lasting) -> Snapshot:
    return snapshot(
        "optimizer_step",
        [
            line("weights", lasting.weights, "every parameter, scale and buffer", "traced"),
            line("adapters", lasting.adapters, "trained parameters peft added", "traced"),
            line("optimizer state", lasting.state.device, "by tensor"),
            line("library workspace", lasting.workspace, "cuBLAS", "measured"),
            line("gradients", lasting.gradients, "of all trained parameters", "traced"),
            line("optimizer temporaries", lasting.state.temporary, "lists of square roots (foreach)"),
        ],
    )
