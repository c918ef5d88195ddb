"""Bytes of loaded weights, tensor by tensor, in every precision, as transformers and bitsandbytes lay
them out.

What a precision takes is data (`profiles.precisions`): NF4 with double quantization (QLoRA,
arXiv:2305.14314, section 3), int8 with a scale a row (LLM.int8, arXiv:2208.07339). Only `nn.Linear` inside
the model is quantized: not the output projection, embeddings, norms, routers, or experts kept as 3-D
parameters (transformers >= 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from msgspec import Struct

from planner.memory.loading import unasked_bytes
from planner.memory.tape import rounded
from planner.types import Strategy
from profiles.precisions import load_precisions, stored_bytes
from profiles.schema import Architecture, Experts, Layer, Linear, Norm, Parameter, Tower

WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of an element in each compute dtype."""

_BOOKS = {"nf4": (16 * 4, 256 * 4)}
_OFFSET = {"nf4": (4,)}
"""Bytes of the tensors bitsandbytes keeps beside each weight: code book, nested code book; offset
(`functional.QuantState`)."""


class WeightBytes(Struct, frozen=True):
    """Loaded bytes of a model's parts, rounded to allocator blocks."""

    layers: tuple[int, ...]
    """Bytes of each distinct layer, in the order of `Architecture.kinds`."""
    embeddings: int
    head: int
    other: int
    """Final norm, towers, and what belongs to no layer."""
    largest_unquantized: int
    """Biggest single tensor in the compute dtype before quantization: what loading holds beside the rest."""
    largest_fused: int
    """Biggest fused expert stack: assembled from per-expert tensors while loading. Where experts are
    quantized, twice one expert's part of it: they are read, assembled and packed one by one."""
    unasked: int = 0
    """What the allocator's blocks hold beside them (planner.memory.loading)."""

    def total(self, order: tuple[int, ...]) -> int:
        """All loaded bytes."""
        return self.counted(order) + self.unasked

    def counted(self, order: tuple[int, ...]) -> int:
        """Bytes of all tensors."""
        return sum(self.layers[kind] for kind in order) + self.embeddings + self.head + self.other


def quantized_linear(n: int, rows: int, quant: str, width: int) -> int:
    """Bytes of one linear weight of `n` elements and `rows` outputs.

    >>> quantized_linear(4096 * 4096, 4096, "nf4", 2) / (4096 * 4096)  # 4.128 bits an element
    0.5159912109375
    """
    if quant == "none":
        return rounded(n * width)
    stored = stored_bytes(load_precisions()[quant], rows, n)
    return sum(rounded(tensor) for tensor in (*stored, *_BOOKS.get(quant, ()), *_OFFSET.get(quant, ())))


def linear_bytes(spec: Linear, quant: str, width: int) -> int:
    """Weight and bias of one linear."""
    bias = rounded(spec.outputs * width) if spec.bias else 0
    quant = quant if spec.quantized else "none"
    return quantized_linear(spec.inputs * spec.outputs, spec.outputs, quant, width) + bias


def parameter_bytes(spec: Parameter, width: int) -> int:
    """A tensor that is never quantized."""
    return rounded(spec.elements * (1 if spec.boolean else 4 if spec.float32 else width))


def norm_bytes(spec: Norm, width: int) -> int:
    """Weight and bias of a norm."""
    return rounded(spec.size * width) * (int(spec.weight) + int(spec.bias))


def expert_bytes(spec: Experts, quant: str, quant_experts: str, width: int) -> int:
    """Routed experts and their router. Fused stacks are quantized per expert where the plan says so."""
    router = sum(
        linear_bytes(item, quant, width) if isinstance(item, Linear) else parameter_bytes(item, width)
        for item in spec.router
    )
    if not spec.fused:
        return router + spec.count * sum(linear_bytes(item, quant, width) for item in spec.linears)
    if quant_experts == "none":
        return router + sum(parameter_bytes(item, width) for item in spec.parameters)
    for item in spec.parameters:
        if len(item.shape) == 3:
            books = _BOOKS.get(quant_experts, ())
            router += sum(rounded(tensor) for tensor in (*packed_stack(item, quant_experts), *books))
        else:
            router += parameter_bytes(item, width)
    return router


def packed_stack(stack: Parameter, quant: str) -> tuple[int, ...]:
    """Bytes of the tensors of a fused stack whose experts are quantized one by one: packed weights, scales
    and offsets of all of them side by side (`executor/packed_experts.py`).

    >>> packed_stack(Parameter("down_proj", (8, 4096, 14336)), "nf4")
    (234881024, 7340032, 114688, 32)
    """
    experts, rows, columns = stack.shape
    each = (*stored_bytes(load_precisions()[quant], rows, rows * columns), *_OFFSET.get(quant, ()))
    return tuple(experts * tensor for tensor in each)


def layer_linears(layer: Layer) -> Iterator[Linear]:
    """Every dense `nn.Linear` of a layer, attention first; routed experts excluded."""
    yield from layer.attention.linears
    yield from layer.feed_forward.linears
    yield from layer.linears


@lru_cache(maxsize=4096)
def layer_bytes(layer: Layer, quant: str, quant_experts: str, width: int) -> int:
    """All tensors of one layer."""
    attention, mixer = layer.attention, layer.feed_forward
    n = sum(linear_bytes(item, quant, width) for item in layer_linears(layer))
    n += sum(norm_bytes(item, width) for item in (*layer.norms, *attention.norms, *mixer.norms))
    n += sum(
        parameter_bytes(item, width) for item in (*layer.parameters, *attention.parameters, *mixer.parameters)
    )
    if mixer.experts is not None:
        n += expert_bytes(mixer.experts, quant, quant_experts, width)
    return n


def tower_bytes(tower: Tower, quant: str, width: int) -> int:
    """A vision or audio tower: its linears are quantized like any other."""
    block = sum(linear_bytes(item, quant, width) for item in tower.block_linears)
    block += sum(parameter_bytes(item, width) for item in tower.block_parameters)
    once = sum(linear_bytes(item, quant, width) for item in tower.linears)
    return tower.blocks * block + once + sum(parameter_bytes(item, width) for item in tower.parameters)


@lru_cache(maxsize=1024)
def weight_bytes(arch: Architecture, quant: str, quant_experts: str, dtype: str) -> WeightBytes:
    """Loaded bytes by part. quant: none, nf4 or int8; dtype: what is not quantized."""
    width = WIDTH[dtype]
    other = sum(tower_bytes(tower, quant, width) for tower in arch.towers)
    other += sum(linear_bytes(item, quant, width) for item in arch.linears)
    other += sum(parameter_bytes(item, width) for item in arch.parameters)
    other += norm_bytes(arch.final_norm, width) if arch.final_norm else 0
    linears = [item for layer in arch.kinds for item in layer_linears(layer)]
    packed = quant_experts != "none"
    stacks = [
        item.elements // layer.feed_forward.experts.count * width if packed else parameter_bytes(item, width)
        for layer in arch.kinds
        if layer.feed_forward.experts is not None and layer.feed_forward.experts.fused
        for item in layer.feed_forward.experts.parameters
    ]
    quantized = [item.inputs * item.outputs * width for item in linears if item.quantized]
    return WeightBytes(
        layers=tuple(layer_bytes(layer, quant, quant_experts, width) for layer in arch.kinds),
        embeddings=sum(parameter_bytes(item, width) for item in arch.embeddings),
        head=rounded(arch.head.parameters * width) if arch.head else 0,
        other=other,
        largest_unquantized=max((*quantized, *(stacks if packed else ())), default=0),
        largest_fused=max(stacks, default=0) * (2 if packed else 1),
        unasked=0 if quant_experts != "none" else unasked_bytes(arch, quant, width),
    )


def fused_experts(arch: Architecture) -> bool:
    """Whether experts are stacked tensors, which `quant` leaves alone: `quant_experts` is about them."""
    return any(layer.feed_forward.experts.fused for layer in arch.kinds if layer.feed_forward.experts)


def stored_as(arch: Architecture, how: Strategy) -> str:
    """What the weights are stored as: `bf16`, `nf4`, `nf4, experts bf16`."""
    linears, stacks = (stored if stored != "none" else how.dtype for stored in (how.quant, how.quant_experts))
    return f"{linears}, experts {stacks}" if linears != stacks and fused_experts(arch) else linears


def load_transient_bytes(w: WeightBytes, quant: str) -> int:
    """What loading holds beside the finished weights.

    Quantizing one matrix needs it in the compute dtype, and for NF4 two float32 copies of its absmax
    (n / 64 elements), for int8 a 16-bit copy; fused experts are concatenated from the checkpoint's
    per-expert tensors. Measured on an H200: 123 MiB for Qwen2.5-7B NF4, 231 MiB int8, 512 MiB for OLMoE.
    """
    n = w.largest_unquantized
    extra = {"nf4": n + n // 16, "int8": 2 * n}.get(quant, 0)
    return max(extra, w.largest_fused)
