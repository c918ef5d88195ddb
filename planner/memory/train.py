"""Memory of fine-tuning on one card: forward, loss, backward of every layer, optimizer step.

The loop is transformers' Trainer with accelerate's mixed precision (autocast; float32 outputs), one
micro-batch at a time, gradients dropped after each step. Shape legend as in `forward.py`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from msgspec.structs import replace

from planner.memory.adapters import adapter_parameters, fuses_experts
from planner.memory.forward import adapted
from planner.memory.head import HeadCost, ending, head_cost, largest_block
from planner.memory.lasting import Lasting, lasting
from planner.memory.lasting import optimizer_state as state_of
from planner.memory.layer import Through, embedded, layer_cost, through
from planner.memory.moments import CardMemory, Snapshot, line, snapshot
from planner.memory.optimizer import StateBytes
from planner.memory.shapes import Pass, habits
from planner.memory.tape import rounded
from planner.memory.weights import WIDTH, layer_linears, load_transient_bytes, weight_bytes
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
        upcast=how.upcast_frozen,
        autocast=how.dtype != "fp32",
        quant=how.quant,
        packed_experts=how.quant_experts != "none",
        full=work.method == "full",
        adapters=work.method != "full",
        attention_only=work.lora_targets == "attention",
        fused_experts=fuses_experts(arch),
        rank=work.lora_rank,
        dropout=work.lora_dropout,
        adapter_width=WIDTH[work.adapter_dtype],
        dora=work.lora_variant == "dora",
        joined=how.engine == "stream",
        at_once=how.engine == "stream" and not _shares_keys(arch),
        liger=how.kernels == "liger",
        attention=how.attention,
        **habits(arch.model_type, True),
    )


def _shares_keys(arch: Architecture) -> bool:
    """Do layers hand keys and values on to others? Such models keep torch's own checkpointing
    (`executor/streaming/recompute.py`)."""
    return any(layer.attention.shares_kv for layer in arch.kinds)


@lru_cache(maxsize=1024)
def training_memory(arch: Architecture, work: Workload, how: Strategy, workspace: int) -> CardMemory:
    """All moments of a fine-tuning run. `workspace`: bytes of one cuBLAS workspace on this card."""
    p = training_pass(arch, work, how)
    fixed = lasting(arch, work, how, p, workspace)
    start = embedded(arch, p)
    p = replace(p, stream=start.width)
    layers = through(arch, p)
    # liger's kernels bring its fused loss along (transformers `use_liger_kernel`)
    fused = how.loss == "fused" or how.kernels == "liger"
    end, last = ending(arch), replace(p, stream=layers.width)
    head, block = head_cost(end, last, fused), largest_block(end, last, fused)
    weights = weight_bytes(arch, how.quant, how.quant_experts, how.dtype)
    load = weights.total(arch.order)
    offload = how.activation_offload and how.gradient_checkpointing
    if how.gradient_checkpointing:
        shots = _checkpointed(arch, work, p, fixed, layers, head, block, offload, start.kept)
    else:
        shots = _recorded(arch, work, p, fixed, layers, head, block)
    return CardMemory(
        load_bytes=load,
        load_peak_bytes=load + load_transient_bytes(weights, how.quant),
        managed_bytes=fixed.state.managed,
        host_bytes=sum(layers.inputs[:-IN_FLIGHT]) if offload else 0,
        dequantized_bytes=weights.largest_unquantized if how.quant != "none" else 0,
        snapshots=(*shots, _optimizer_step(fixed)),
    )


def optimizer_state(arch: Architecture, work: Workload, how: Strategy) -> StateBytes:
    """Optimizer state of the whole job, on the card and paged."""
    return state_of(arch, work, how, training_pass(arch, work, how))


# --------------------------------------------------------------------------- moments


IN_FLIGHT = 2
"""Checkpoints on the card at once while the others are in RAM: the one in use and the one on its way. Those
of the last layers never leave (`executor/activation_offload.py`)."""
LATE = 2
"""Engine stream hands them over when their layer has run, so that in forward so many more are there
(measured: Llama-3.1-8B, Qwen2.5-7B and 14B, benchmarks/streaming/results.jsonl)."""


def _stream(arch: Architecture, p: Pass) -> int:
    return rounded(p.tokens * arch.hidden_size * p.stream)


def _cached_adapters(arch: Architecture, work: Workload, p: Pass) -> int:
    """autocast's 16-bit copies of float32 adapter weights, alive until the forward pass is left; engine
    stream's adapters make theirs for one pass of one layer."""
    if (p.joined and not p.dora) or not (p.autocast and p.adapters and p.adapter_width != p.width):
        return 0
    return adapter_parameters(arch, work) * p.width


def _checkpointed(
    arch: Architecture,
    work: Workload,
    p: Pass,
    fixed: Lasting,
    layers: Through,
    head: HeadCost,
    block: int,
    offload: bool,
    beside: int,
) -> list[Snapshot]:
    costs, on_card = layers.costs, min(arch.layers, IN_FLIGHT) if offload else arch.layers
    leaked = sum(cost.leaked for cost in costs)
    # on the card when layer i - 1 has run: its input and those before it
    sums = list(accumulate(layers.inputs, initial=0))
    alive = [n - sums[max(0, i - on_card)] for i, n in enumerate(sums)]
    inputs = line(
        "checkpoints", alive[-1], f"{on_card} layer inputs x {p.tokens} tokens x {arch.hidden_size}"
    )
    kept = line(
        "kept by int8 matmuls", leaked, "inputs of quantized linears, held by ctx through checkpointing"
    )
    embeds = line("embeddings", beside, "their output, kept beside the first layer's input")
    waiting = line("gradients", fixed.accumulated, ACCUMULATED)
    cached = line("autocast copies", _cached_adapters(arch, work, p), "16-bit adapters until forward is left")
    at = max(range(arch.layers), key=lambda i: alive[i + 1] + costs[i].forward_peak)
    handed_late = LATE if p.at_once and offload and arch.layers > IN_FLIGHT + LATE else 0
    so_far = line("checkpoints", alive[at + 1] + handed_late * layers.inputs[at], inputs.formula)
    work_there = _working(costs[at].forward_peak)
    shots = [
        snapshot("forward", (*fixed.lines, waiting, embeds, so_far, kept, cached, work_there)),
        snapshot(
            "loss",
            (*fixed.lines, waiting, embeds, inputs, kept, cached, _loss(head.forward_peak, arch, p)),
            block,
        ),
        snapshot(
            "loss",
            (*fixed.lines, waiting, embeds, inputs, kept, _loss(head.backward_peak, arch, p)),
            block,
        ),
    ]
    grads, held = head.gradients, leaked
    for i in reversed(range(arch.layers)):
        shots.append(
            snapshot(
                "backward",
                (
                    *fixed.lines,
                    embeds,
                    line("checkpoints", alive[i + 1], "layer inputs still needed"),
                    line("kept by int8 matmuls", held, kept.formula),
                    line("gradients", max(grads, fixed.accumulated), DONE),
                    _working(costs[i].recompute_peak),
                ),
            )
        )
        grads, held = grads + costs[i].gradients, held - costs[i].leaked
    shots.append(_embedding_backward(fixed, p, _stream(arch, p)))
    return shots


def _recorded(
    arch: Architecture,
    work: Workload,
    p: Pass,
    fixed: Lasting,
    layers: Through,
    head: HeadCost,
    block: int,
) -> list[Snapshot]:
    stream, costs = _stream(arch, p), list(layers.costs)
    if not p.full:  # nothing asks the embeddings for a gradient: until an adapter does, less is saved
        for i, kind in enumerate(arch.order):
            costs[i] = layer_cost(arch.kinds[kind], p, arch.hidden_size, True)
            if any(adapted(p, item) for item in layer_linears(arch.kinds[kind])):
                break
    before = list(accumulate((cost.saved for cost in costs), initial=0))
    total = before[-1]
    at = max(range(arch.layers), key=lambda i: before[i] + costs[i].record_peak)
    waiting = line("gradients", fixed.accumulated, ACCUMULATED)
    saved = line("activations", total, f"saved by {arch.layers} layers x {p.tokens} tokens")
    so_far = line("activations", before[at] + 2 * layers.inputs[at], f"saved by {at} layers, residual stream")
    shots = [
        snapshot("forward", (*fixed.lines, waiting, so_far, _working(costs[at].record_peak))),
        snapshot("loss", (*fixed.lines, waiting, saved, _loss(head.forward_peak, arch, p)), block),
        snapshot("loss", (*fixed.lines, waiting, saved, _loss(head.backward_peak, arch, p)), block),
    ]
    grads = head.gradients
    for cost in reversed(costs):
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
    shots.append(_embedding_backward(fixed, p, stream))
    return shots


ACCUMULATED = "of earlier micro-batches, waiting for the optimizer step"
DONE = "of the layers already done, or of earlier micro-batches"


def _working(n: int) -> MemoryLine:
    return line("layer in work", n, "largest set of tensors alive inside one layer", "modelled")


def _loss(n: int, arch: Architecture, p: Pass) -> MemoryLine:
    return line("logits and loss", n, f"{p.tokens} tokens x {arch.vocab_size} vocabulary, and the final norm")


def _embedding_backward(fixed: Lasting, p: Pass, stream: int) -> Snapshot:
    """Full fine-tuning ends backward with a dense gradient of the token embedding."""
    # A tied head's gradient waits for it; the two have different strides, so their sum is a third tensor.
    # liger's has the same strides and takes the sum. Under accumulation the gradient of earlier micro-batches
    # waits beside them.
    more = (1 if p.liger else 2) + (1 if fixed.accumulated else 0)
    again = more * fixed.embedding_gradient if fixed.tied else 0
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
