"""Memory of fine-tuning on one card: forward, loss, backward of every layer, optimizer step.

The loop is transformers' Trainer with accelerate's mixed precision (autocast; float32 outputs), one
micro-batch at a time, gradients dropped after each step. Shape legend as in `forward.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate

from planner.memory.adapters import adapter_parameters, fuses_experts
from planner.memory.forward import Pass, numerics
from planner.memory.head import HeadCost, ending, head_cost
from planner.memory.lasting import Lasting, lasting, trained_tensors
from planner.memory.layer import LayerCost, layer_cost
from planner.memory.moments import CardMemory, Snapshot, line, snapshot
from planner.memory.optimizer import StateBytes, state_bytes
from planner.memory.tape import rounded
from planner.memory.weights import WIDTH, load_transient_bytes, weight_bytes
from planner.types import MemoryLine, Strategy, Workload
from profiles.schema import Architecture


def training_pass(arch: Architecture, work: Workload, how: Strategy) -> Pass:
    """Shapes and numerics of one micro-batch."""
    width = WIDTH[how.dtype]
    return Pass(
        batch=work.batch_size,
        seq=work.seq_len,
        train=True,
        width=width,
        stream=4 if how.upcast_frozen else width,
        autocast=how.dtype != "fp32",
        quant=how.quant,
        full=work.method == "full",
        adapters=work.method != "full",
        attention_only=work.lora_targets == "attention",
        fused_experts=fuses_experts(arch),
        rank=work.lora_rank,
        dropout=work.lora_dropout,
        adapter_width=WIDTH[work.adapter_dtype],
        dora=work.lora_variant == "dora",
        liger=how.kernels == "liger",
        attention=how.attention,
        float32_norm=arch.model_type in numerics().float32_norm,
        concatenated_rope=arch.model_type in numerics().concatenated_rope,
    )


@lru_cache(maxsize=1024)
def training_memory(arch: Architecture, work: Workload, how: Strategy, workspace: int) -> CardMemory:
    """All moments of a fine-tuning run. `workspace`: bytes of one cuBLAS workspace on this card."""
    p = training_pass(arch, work, how)
    fixed = lasting(arch, work, how, p, workspace)
    costs = [layer_cost(layer, p, arch.hidden_size) for layer in arch.kinds]
    # liger's kernels bring its fused loss along (transformers `use_liger_kernel`)
    fused = how.loss == "fused" or how.kernels == "liger"
    head = head_cost(ending(arch), p, fused)
    weights = weight_bytes(arch, how.quant, how.quant_experts, how.dtype)
    load = weights.total(arch.order)
    # one float32 copy of the logits is the biggest block of a step
    block = 0 if fused else rounded(4 * p.tokens * arch.vocab_size)
    offload = how.activation_offload and how.gradient_checkpointing
    if how.gradient_checkpointing:
        shots = _checkpointed(arch, work, p, fixed, costs, head, block, offload)
    else:
        shots = _recorded(arch, work, p, fixed, costs, head, block)
    return CardMemory(
        load_bytes=load,
        load_peak_bytes=load + load_transient_bytes(weights, how.quant),
        managed_bytes=fixed.state.managed,
        host_bytes=arch.layers * _stream(arch, p) if offload else 0,
        dequantized_bytes=weights.largest_unquantized if how.quant != "none" else 0,
        snapshots=(*shots, _optimizer_step(fixed)),
    )


def optimizer_state(arch: Architecture, work: Workload, how: Strategy) -> StateBytes:
    """Optimizer state of the whole job, on the card and paged."""
    tensors, embeddings, width = trained_tensors(arch, work, training_pass(arch, work, how))
    return state_bytes(how.optimizer, tensors, width, embeddings)


# --------------------------------------------------------------------------- moments


IN_FLIGHT = 2
"""Checkpoints on the card at once while the others are in RAM: the one in use and the one on its way."""


def _stream(arch: Architecture, p: Pass) -> int:
    return rounded(p.tokens * arch.hidden_size * p.stream)


def _cached_adapters(arch: Architecture, work: Workload, p: Pass) -> int:
    """autocast's 16-bit copies of float32 adapter weights, alive until the forward pass is left."""
    if not (p.autocast and p.adapters and p.adapter_width != p.width):
        return 0
    return adapter_parameters(arch, work) * p.width


def _checkpointed(
    arch: Architecture,
    work: Workload,
    p: Pass,
    fixed: Lasting,
    costs: list[LayerCost],
    head: HeadCost,
    block: int,
    offload: bool,
) -> list[Snapshot]:
    stream = _stream(arch, p)
    leaked = sum(costs[kind].leaked for kind in arch.order)
    on_card = min(arch.layers, IN_FLIGHT) if offload else arch.layers
    inputs = line(
        "checkpoints",
        on_card * stream,
        f"{on_card} layer inputs x {p.tokens} tokens x {arch.hidden_size}",
    )
    kept = line(
        "kept by int8 matmuls", leaked, "inputs of quantized linears, held by ctx through checkpointing"
    )
    waiting = line("gradients", fixed.accumulated, ACCUMULATED)
    cached = line("autocast copies", _cached_adapters(arch, work, p), "16-bit adapters until forward is left")
    at = _deepest(arch, lambda i, kind: min(i + 1, on_card) * stream + costs[kind].forward_peak)
    so_far = line("checkpoints", min(at + 1, on_card) * stream, inputs.formula)
    work_there = _working(costs[arch.order[at]].forward_peak)
    shots = [
        snapshot("forward", (*fixed.lines, waiting, so_far, kept, cached, work_there)),
        snapshot(
            "loss",
            (*fixed.lines, waiting, inputs, kept, cached, _loss(head.forward_peak, arch, p)),
            block,
        ),
        snapshot("loss", (*fixed.lines, waiting, inputs, kept, _loss(head.backward_peak, arch, p)), block),
    ]
    alive, grads, held = arch.layers, head.gradients, leaked
    for kind in reversed(arch.order):
        cost = costs[kind]
        shots.append(
            snapshot(
                "backward",
                (
                    *fixed.lines,
                    line("checkpoints", min(alive, on_card) * stream, "layer inputs still needed"),
                    line("kept by int8 matmuls", held, kept.formula),
                    line("gradients", max(grads, fixed.accumulated), DONE),
                    _working(cost.recompute_peak),
                ),
            )
        )
        alive, grads, held = alive - 1, grads + cost.gradients, held - cost.leaked
    shots.append(_embedding_backward(fixed, stream))
    return shots


def _recorded(
    arch: Architecture,
    work: Workload,
    p: Pass,
    fixed: Lasting,
    costs: list[LayerCost],
    head: HeadCost,
    block: int,
) -> list[Snapshot]:
    stream = _stream(arch, p)
    layers = [costs[kind] for kind in arch.order]
    if not p.full:  # nothing asks the embeddings for a gradient: the first layer's frozen part saves less
        layers[0] = layer_cost(arch.kinds[arch.order[0]], p, arch.hidden_size, True)
    before = list(accumulate((cost.saved for cost in layers), initial=0))
    total = before[-1]
    at = _deepest(arch, lambda i, _: before[i] + layers[i].record_peak)
    waiting = line("gradients", fixed.accumulated, ACCUMULATED)
    saved = line("activations", total, f"saved by {arch.layers} layers x {p.tokens} tokens")
    so_far = line("activations", before[at] + 2 * stream, f"saved by {at} layers, residual stream")
    shots = [
        snapshot("forward", (*fixed.lines, waiting, so_far, _working(layers[at].record_peak))),
        snapshot("loss", (*fixed.lines, waiting, saved, _loss(head.forward_peak, arch, p)), block),
        snapshot("loss", (*fixed.lines, waiting, saved, _loss(head.backward_peak, arch, p)), block),
    ]
    grads = head.gradients
    for cost in reversed(layers):
        total -= cost.saved
        shots.append(
            snapshot(
                "backward",
                (
                    *fixed.lines,
                    line("activations", total, "saved by the layers still to come"),
                    line("gradients", max(grads, fixed.accumulated), DONE),
                    _working(cost.backward_peak),
                ),
            )
        )
        grads += cost.gradients
    shots.append(_embedding_backward(fixed, stream))
    return shots


ACCUMULATED = "of earlier micro-batches, waiting for the optimizer step"
DONE = "of the layers already done, or of earlier micro-batches"


def _deepest(arch: Architecture, alive: Callable[[int, int], int]) -> int:
    """Index of the layer where most is alive running forward; `alive` of index and kind. Of equal layers only
    the last matters, since more is kept with every layer."""
    last = {kind: i for i, kind in enumerate(arch.order)}
    return max(last.values(), key=lambda i: alive(i, arch.order[i]))


def _working(n: int) -> MemoryLine:
    return line("layer in work", n, "largest set of tensors alive inside one layer", "modelled")


def _loss(n: int, arch: Architecture, p: Pass) -> MemoryLine:
    return line("logits and loss", n, f"{p.tokens} tokens x {arch.vocab_size} vocabulary, and the final norm")


def _embedding_backward(fixed: Lasting, stream: int) -> Snapshot:
    """Full fine-tuning ends backward with a dense gradient of the token embedding."""
    # A tied head's gradient waits for it; the two have different strides, so their sum is a third tensor.
    # Under accumulation the gradient of earlier micro-batches waits beside them.
    again = (3 if fixed.accumulated else 2) * fixed.embedding_gradient if fixed.tied else 0
    return snapshot(
        "backward",
        (
            *fixed.lines,
            line("gradients", fixed.gradient_bytes, "of all trained parameters"),
            line(
                "layer in work",
                stream + again,
                "gradient of the embeddings, added to a tied head's",
                "modelled",
            ),
        ),
        fixed.embedding_gradient,
    )


def _optimizer_step(fixed: Lasting) -> Snapshot:
    return snapshot(
        "optimizer_step",
        (
            *fixed.lines,
            line("gradients", fixed.gradient_bytes, "of all trained parameters"),
            line("optimizer temporaries", fixed.state.temporary, "lists of square roots (foreach)"),
        ),
    )
