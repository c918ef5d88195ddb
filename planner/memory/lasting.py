"""What a fine-tuning run keeps from first step to last: weights, adapters, optimizer state, workspaces."""

from __future__ import annotations

from functools import lru_cache

from msgspec import Struct

from planner.memory.adapters import adapter_tensors, is_target
from planner.memory.attention import input_bytes
from planner.memory.forward import Pass
from planner.memory.layer import layer_tensors
from planner.memory.moments import line
from planner.memory.optimizer import StateBytes, state_bytes
from planner.memory.segments import lasting_unasked
from planner.memory.tape import booked, rounded
from planner.memory.weights import layer_linears, stored_as, weight_bytes
from planner.types import MemoryLine, Strategy, Workload
from profiles.schema import Architecture, Linear, Parameter, Tower

Counts = tuple[tuple[int, int], ...]
"""(elements of a tensor, how many of them)."""


class Lasting(Struct, frozen=True):
    """What stays alive from the first step on, and what a step leaves behind."""

    lines: tuple[MemoryLine, ...]
    state: StateBytes
    gradient_bytes: int
    """Gradients of everything that is trained."""
    accumulated: int
    """Gradients that wait through the next forward pass: all under gradient accumulation, else none."""
    embedding_gradient: int
    tied: bool


def lasting(arch: Architecture, work: Workload, how: Strategy, p: Pass, workspace: int) -> Lasting:
    """Everything that outlives a step. `workspace`: bytes of one cuBLAS workspace."""
    weights = weight_bytes(arch, how.quant, how.quant_experts, how.dtype)
    loaded, wide = weights.total(arch.order), 0
    if how.upcast_frozen:
        upcast = weight_bytes(arch, how.quant, how.quant_experts, "fp32")
        wide = upcast.counted(arch.order) - weights.counted(arch.order)
    tensors, embeddings, width = trained_tensors(arch, work, p)
    every = (*tensors, *((size, 1) for size in embeddings))
    one = sum(rounded(size * width) * count for size, count in every) + _unasked(arch, work, p, width)
    adapters, gradient_bytes = 0 if p.full else one, one
    state = optimizer_state(arch, work, how, p)
    trained = sum(size * count for size, count in every)
    text = "trained in place" if p.full else f"frozen, {stored_as(arch, how)}"
    lines = (
        line("weights", loaded, f"{arch.layers} layers + embeddings + head, {text}"),
        line("upcast weights", wide, "unquantized tensors a second time their size, as float32"),
        line("adapters", adapters, f"{trained:,} parameters x {width} B"),
        line("optimizer state", state.device, f"{how.optimizer}: {trained:,} trained parameters"),
        line("library workspace", 2 * workspace, "cuBLAS: forward and the autograd thread", "measured"),
        line(
            "inputs and rope", input_bytes(arch, p, p.seq), "token ids, labels, positions, cos and sin tables"
        ),
    )
    return Lasting(
        lines,
        state,
        gradient_bytes,
        gradient_bytes if work.gradient_accumulation_steps > 1 else 0,
        booked(embeddings[0] * width) if embeddings else 0,
        arch.head is None,
    )


def optimizer_state(arch: Architecture, work: Workload, how: Strategy, p: Pass) -> StateBytes:
    """Optimizer state of the whole job, on the card and paged."""
    tensors, embeddings, width = trained_tensors(arch, work, p)
    return state_bytes(
        how.optimizer, tensors, width, embeddings, lambda width: _unasked(arch, work, p, width)
    )


def _unasked(arch: Architecture, work: Workload, p: Pass, width: int) -> int:
    """What one list of tensors like those trained, of `width` bytes an element, is handed unasked."""
    adapters = None if p.full else (work.lora_rank, work.lora_targets, p.fused_experts)
    return _unasked_in_order(arch, adapters, width)


@lru_cache(maxsize=1024)
def _unasked_in_order(arch: Architecture, adapters: tuple[int, str, bool] | None, width: int) -> int:
    return lasting_unasked([size * width for size in _in_order(arch, adapters)])


@lru_cache(maxsize=1024)
def _in_order(arch: Architecture, adapters: tuple[int, str, bool] | None) -> tuple[int, ...]:
    if adapters is None:
        layers = [layer_tensors(layer) for layer in arch.kinds]
        sizes = [item.elements for item in arch.embeddings if not item.buffer]
    else:
        rank, targets, fused = adapters
        found = [[x for x in layer_linears(layer) if is_target(x, targets, fused)] for layer in arch.kinds]
        layers = [[n * rank for x in linears for n in (x.inputs, x.outputs)] for linears in found]
        sizes = []
    sizes += [size for kind in arch.order for size in layers[kind]]
    if adapters is None and arch.head is not None:
        sizes.append(arch.head.parameters)
    return tuple(sizes)


def trained_in_order(arch: Architecture, work: Workload, p: Pass) -> tuple[int, ...]:
    """Elements of the trained tensors as the optimizer meets them, without those of towers and norms outside
    layers."""
    return _in_order(arch, None if p.full else (work.lora_rank, work.lora_targets, p.fused_experts))


def trained_tensors(arch: Architecture, work: Workload, p: Pass) -> tuple[Counts, tuple[int, ...], int]:
    """Trained tensors, elements of trained embeddings, and bytes of an element."""
    if not p.full:
        adapters = adapter_tensors(arch, work.lora_rank, work.lora_targets, work.lora_variant)
        return adapters, (), p.adapter_width
    return _parameters(arch), tuple(item.elements for item in arch.embeddings if not item.buffer), p.width


def _parameters(arch: Architecture) -> Counts:
    """Every parameter tensor that full fine-tuning trains, embeddings apart."""
    counts: dict[int, int] = {}

    def see(size: int, count: int = 1) -> None:
        counts[size] = counts.get(size, 0) + count

    for index, layer in enumerate(arch.kinds):
        for size in layer_tensors(layer):
            see(size, arch.order.count(index))
    for item in arch.parameters:
        if not item.buffer:
            see(item.elements)
    for linear in (*arch.linears, *((arch.head,) if arch.head else ())):
        see(linear.parameters)
    if arch.final_norm is not None:
        see(arch.final_norm.size)
    for tower in arch.towers:
        for size, count in _tower(tower):
            see(size, count)
    return tuple(sorted(counts.items()))


def _tower(tower: Tower) -> Counts:
    once: list[Linear | Parameter] = [*tower.linears, *tower.parameters]
    repeated: list[Linear | Parameter] = [*tower.block_linears, *tower.block_parameters]
    return (
        *((item.parameters, tower.blocks) for item in repeated),
        *((item.parameters, 1) for item in once),
    )
