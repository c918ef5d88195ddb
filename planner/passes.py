"""Seconds of one pass: a token of decode, a prefill, a training step.

Rates and efficiencies come from `planner.rates`, counts from `planner.work` and `planner.elementwise`; how
times add up is in `planner.seconds`.
"""

from __future__ import annotations

from math import ceil, inf

from msgspec import Struct

from planner.elementwise import LOSS_BYTES, Count
from planner.identity import identities_cache, identity_cache
from planner.memory.streamed import Traffic
from planner.memory.train import IN_FLIGHT
from planner.rates import Level, Rates, efficiency
from planner.seconds import Seconds, side_by_side
from planner.types import PlacementMap, Strategy, Workload
from planner.work import (
    INT8_KERNELS,
    Work,
    attention_flops,
    cache_bytes,
    element_bytes,
    launches,
    layer_bytes,
    linear_bytes,
    quantized_weights,
    read_bytes,
    repeated_cache_bytes,
)

# torch.cat of a dynamic cache reads and writes all of it, then attention reads it.
_CACHE_PASSES = {"dynamic": 3, "static": 1, "offloaded": 3, "quantized": 3}
# What a layer launches more in decode: shift, stack, scale and join packed keys, and values.
_CACHE_KERNELS = {"quantized": 14}
# Flash attention's backward recomputes the scores: five products for the forward's two (arXiv:2307.08691).
_ATTENTION_BACKWARD = 2.5
# Bytes an optimizer step moves for each parameter: gradient, weight and two moments read, all but the first
# written, in mixed widths.
_OPTIMIZER_TRAFFIC_BYTES = 24
_EMBEDDING_GRADIENT_BYTES = 8


class Job(Struct, frozen=True):
    """What a speed is asked for."""

    work: Work
    workload: Workload
    strategy: Strategy
    placement: PlacementMap
    on_cpu: bool
    cores: int
    adapter_parameters: int = 0
    """Trained elements of the job's adapters; 0 for inference and full fine-tuning."""
    elementwise: Count = Count()
    """What all layers move and launch beside large products."""
    updates: int = 0
    """Trained tensors that bitsandbytes' optimizer updates one after the other; 0 for torch's."""
    traffic: Traffic = Traffic()
    """What engine stream moves in a pass, or in forward and backward together."""


# --------------------------------------------------------------------------- inference


def decode_seconds(job: Job, rates: Rates, level: Level) -> Seconds | None:
    """One token for every sequence of the batch, with half of the new tokens behind it."""
    if rates.bandwidth is None or rates.compute is None:
        return None
    work, strategy, batch = job.work, job.strategy, job.workload.sequences
    kept, flops, weights, kernels = _decode_amounts(job)
    suffix = "" if strategy.quant == "none" else f"_{strategy.quant}"
    streaming = rates.bandwidth * (1.0 if job.on_cpu else efficiency(f"decode_bandwidth{suffix}", level))
    read = weights / streaming
    moved = _CACHE_PASSES[strategy.cache] * kept / rates.bandwidth
    if strategy.cache == "static":
        # all of it is attended to behind a mask, the part that is still empty too
        length = job.workload.prompt_tokens + job.workload.new_tokens
        repeated = repeated_cache_bytes(work, length, element_bytes(strategy.dtype))
        moved += batch * repeated / rates.bandwidth
    fetched = _fetch(job, rates, 2 * kept if strategy.cache == "offloaded" else 0.0)
    streamed = _streamed_seconds(job, rates, level)
    if fetched is None or streamed is None:
        return None
    link, disk = fetched
    # over a static cache the executor records one step in a CUDA graph; LLM.int8 decides things on the host
    recorded = strategy.cache == "static" and not job.on_cpu and strategy.quant != "int8"
    overhead = efficiency("token_overhead_seconds", level)
    host = overhead + (0.0 if recorded else kernels * efficiency("host_seconds_per_kernel", level))
    small = kernels * efficiency(f"{'recorded' if recorded else 'device'}_seconds_per_kernel", level)
    products = flops / rates.compute
    if job.on_cpu:
        # One processor does both: what it dispatches it must also compute.
        small, host = host, 0.0
        products += _cpu_dequantize(job, level, batch)
    elif recorded:
        small, host = small + overhead, 0.0
    return Seconds(read + moved, products, host, link, disk, small, *streamed)


@identity_cache
def _decode_amounts(job: Job) -> tuple[float, float, float, int]:
    """Bytes of the cache, operations, bytes of the weights, kernels: whatever the card."""
    work, strategy, batch = job.work, job.strategy, job.workload.sequences
    context = job.workload.prompt_tokens + job.workload.new_tokens / 2
    return (
        batch * cache_bytes(work, context, element_bytes(strategy.dtype)),
        batch * (2 * (work.active_linear_weights + work.head_weights) + attention_flops(work, context)),
        read_bytes(work, strategy, batch),
        launches(work, strategy) + work.layers * _CACHE_KERNELS.get(strategy.cache, 0),
    )


def prefill_seconds(job: Job, rates: Rates, level: Level) -> Seconds | None:
    """The prompts of the whole batch; logits of the last token only, as `generate` asks.

    In parts (`prefill_chunk_tokens`), each brings, reads, unpacks and launches everything once more.
    """
    if rates.bandwidth is None or rates.compute is None:
        return None
    tokens = job.workload.sequences * job.workload.prompt_tokens
    parts = ceil(
        job.workload.prompt_tokens / (job.strategy.prefill_chunk_tokens or job.workload.prompt_tokens)
    )
    fetched, streamed = _fetch(job, rates, 0.0), _streamed_seconds(job, rates, level)
    if fetched is None or streamed is None:
        return None
    operations, weights, kernels = _prefill_amounts(job, level, parts)
    products = operations / rates.compute
    moving = rates.bandwidth * efficiency("elementwise_bandwidth", level)
    other = tokens * job.elementwise.forward_bytes / moving + _dequantize(job, rates, level, parts)
    host = kernels * efficiency("host_seconds_per_kernel", level)
    read = weights / rates.bandwidth
    if job.on_cpu:
        other, host = other + host, 0.0
    link, disk, copies, reads = (parts * seconds for seconds in (*fetched, *streamed))
    begins = efficiency("prefill_overhead_seconds", level)
    return Seconds(read, products, host, link, disk, other, copies, reads, begins)


@identities_cache
def _prefill_amounts(job: Job, level: Level, parts: int) -> tuple[float, float, int]:
    """Operations over what is reached of the rate, bytes of the weights, kernels: whatever the card."""
    work, tokens = job.work, job.workload.sequences * job.workload.prompt_tokens
    reached = efficiency("prefill_compute", level)
    products = _product_seconds(job, 2.0 * work.active_linear_weights * tokens, reached, level)
    attention = tokens * _pass_attention(job, job.workload.prompt_tokens, level)
    operations = products + attention / _attention_compute(job, 1.0, level)
    weights = parts * read_bytes(work, job.strategy, ceil(tokens / parts))
    return operations, weights, parts * launches(work, job.strategy)


# --------------------------------------------------------------------------- training


def train_seconds(job: Job, rates: Rates, level: Level) -> Seconds | None:
    """One forward and backward over a batch, with its share of the optimizer step.

    Operations for each weight and token: 2 forward, 2 for the gradient of the input, 2 more for that of a
    weight that is trained, 2 again where the forward is repeated for a checkpoint. A step begins with nothing
    launched (the Trainer has read the last one's loss), so where the host launches the forward slower than
    the card computes it, the card waits that long.
    """
    if rates.bandwidth is None or rates.compute is None:
        return None
    strategy, steps = job.strategy, job.workload.gradient_accumulation_steps
    again = int(strategy.gradient_checkpointing)
    tokens = job.workload.batch_size * job.workload.seq_len
    moving = rates.bandwidth * efficiency("elementwise_bandwidth", level)
    moved, operations = _train_bytes(job), _train_operations(job, level)
    read, products = moved.weights / rates.bandwidth, sum(n / rates.compute for n in operations)
    # products of few tokens take as long as their weights take to be read
    longer = max(1.0, read / products)
    forward, loss, backward = (longer * n / rates.compute for n in operations)
    moved_forward, moved_loss, moved_backward = (n / moving for n in moved.passes)
    unpacking = _dequantize(job, rates, level, 1)
    early = forward + moved_forward + unpacking
    ending = loss + moved_loss
    late = backward + moved_backward + unpacking * (1 + again)
    launching, launching_backward = _train_launches(job, level)
    # bitsandbytes waits for the card after each tensor, so none of its step runs beside backward
    updates = job.updates * efficiency("update_seconds_per_tensor", level)
    step = (efficiency("step_overhead_seconds", level) + updates) / steps
    host, other = launching + launching_backward, early + ending + late - (forward + loss + backward)
    if job.on_cpu:
        other, host = other + host, 0.0
    else:
        other += max(0.0, launching - early - ending)
    link, streamed = _activation_seconds(job, rates, tokens), _streamed_seconds(job, rates, level)
    if link is None or streamed is None:
        return None
    copies, reads = streamed
    overlap = inf if job.on_cpu else efficiency("train_overlap", level)
    parts: tuple[tuple[float, float], ...] = ()
    if job.strategy.engine == "stream" and not job.on_cpu:
        there, between, back = (copies * n / max(1, job.traffic.link) for n in job.traffic.stretches)
        # what comes back, comes with the layers; what leaves, beside them
        back, copies, link = back + link / 2, copies + link / 2, 0.0
        parts = (
            (side_by_side(early, launching, overlap), there),
            (ending, between),
            (side_by_side(late, launching_backward, overlap), back),
        )
    return Seconds(read, products, host, link, 0.0, other, copies, reads, step, overlap, parts)


@identities_cache
def _train_operations(job: Job, level: Level) -> tuple[float, float, float]:
    """Of matrix products and attention over what each reaches of the card's rate: of the layers forward, of
    the output projection, of the layers backward."""
    work, workload, again = job.work, job.workload, int(job.strategy.gradient_checkpointing)
    tokens = workload.batch_size * workload.seq_len
    reached = efficiency("train_compute", level)
    layers, head = (
        _product_seconds(job, 2.0 * tokens * n, reached, level)
        for n in (work.active_linear_weights, work.head_weights)
    )
    attention = tokens * _pass_attention(job, workload.seq_len, level) / _attention_compute(job, 1.0, level)
    trained = 2 if workload.method == "full" else 1
    backward = layers * (again + trained) + attention * (again + _ATTENTION_BACKWARD)
    twice = int(_loss(job.strategy) == "chunked")  # logits are computed again for their gradient
    return layers + attention, head * (1 + twice + trained), backward


def _loss(strategy: Strategy) -> str:
    """Who computes the loss, as `LOSS_BYTES` names it."""
    if strategy.kernels == "liger":
        return "liger"
    return "chunked" if strategy.loss == "fused" else "full"


class TrainBytes(Struct, frozen=True):
    """What a step moves beside its large products."""

    passes: tuple[float, float, float]
    """By the forward of the layers, the loss, and backward with the optimizer's share."""
    weights: float
    """Weights that are read."""


@identity_cache
def _train_bytes(job: Job) -> TrainBytes:
    work, workload, strategy = job.work, job.workload, job.strategy
    again, tokens = int(strategy.gradient_checkpointing), workload.batch_size * workload.seq_len
    loss = tokens * work.vocab_size * LOSS_BYTES[_loss(strategy)]
    count, full = job.elementwise, workload.method == "full"
    trained = work.weights if full else job.adapter_parameters
    step = _OPTIMIZER_TRAFFIC_BYTES * trained / workload.gradient_accumulation_steps
    if full:  # the embeddings' gradient, cleared and added to that of a tied output projection
        step += _EMBEDDING_GRADIENT_BYTES * work.hidden_size * work.vocab_size
    backward = tokens * (count.backward_bytes + again * count.forward_bytes) + step
    weights = (2 + again) * read_bytes(work, strategy, tokens)
    return TrainBytes((tokens * count.forward_bytes, loss, backward), weights)


@identities_cache
def _train_launches(job: Job, level: Level) -> tuple[float, float]:
    """Host time of forward and of backward. autograd launches without Python, but for packed weights."""
    again = int(job.strategy.gradient_checkpointing)
    kernel = efficiency("train_host_seconds_per_kernel", level)
    checkpoint = again * job.work.layers * efficiency("checkpoint_host_seconds", level)
    packed = (
        job.work.linears
        * {
            "none": 0.0,
            "nf4": efficiency("nf4_host_seconds_per_linear", level),
            "int8": kernel * INT8_KERNELS,
        }[job.strategy.quant]
    )
    forward = kernel * job.elementwise.forward_kernels + packed
    backward = kernel * efficiency("backward_host_share", level) * job.elementwise.backward_kernels + packed
    backward += again * forward + checkpoint
    if job.strategy.engine != "stream" or job.on_cpu:
        return forward, backward
    away = job.placement.layers_in_ram + job.placement.layers_on_disk
    carried = away * efficiency("streamed_layer_host_seconds", level) / 2
    return forward + carried, backward + carried


def _activation_seconds(job: Job, rates: Rates, tokens: int) -> float | None:
    """Checkpoints that go to host memory and come back: all but those that backward begins with."""
    if not job.strategy.activation_offload or job.on_cpu:
        return 0.0
    if rates.link is None:
        return None
    layers = max(0, job.work.layers - IN_FLIGHT)
    saved = tokens * job.work.hidden_size * layers * element_bytes(job.strategy.dtype)
    return 2.0 * saved / rates.link


# --------------------------------------------------------------------------- parts


def _product_seconds(job: Job, flops: float, compute: float, level: Level) -> float:
    return flops / (compute * (efficiency("int8_compute", level) if job.strategy.quant == "int8" else 1.0))


def _attention_compute(job: Job, compute: float, level: Level) -> float:
    eager = efficiency("eager_attention", level) if job.strategy.attention == "eager" else 1.0
    return compute * efficiency("attention_compute", level) * eager


def _pass_attention(job: Job, length: int, level: Level) -> float:
    """Attention's operations for one token of a sequence, on average, in operations of the fused causal
    kernel. A window shorter than the sequence comes to sdpa as a mask: the kernel that takes one skips
    nothing and is slower."""
    total = 0.0
    for m in job.work.mixing:
        masked = m.window is not None and length >= m.window and job.strategy.attention == "sdpa"
        if masked and not job.on_cpu:
            total += m.count * m.pair_flops * length / efficiency("masked_attention", level)
        else:
            total += m.count * m.pair_flops * m.context(length / 2)
    return total


def _dequantize(job: Job, rates: Rates, level: Level, passes: int) -> float:
    """Quantized weights written out in the compute dtype once for each pass (int8 is multiplied as it is)."""
    if job.on_cpu:
        return passes * _cpu_dequantize(job, level, 1)
    weights = quantized_weights(job.work, job.strategy)
    if job.strategy.quant == "int8" or not weights or rates.bandwidth is None:
        return 0.0
    width = element_bytes(job.strategy.dtype) + linear_bytes(job.strategy)
    return passes * weights * width / (rates.bandwidth * efficiency("dequantize_bandwidth", level))


def _cpu_dequantize(job: Job, level: Level, tokens: int) -> float:
    """CPU time on quantized weights: unpacked once a pass (NF4), or worked through for each token (int8)."""
    if job.strategy.quant == "none" or not job.cores:
        return 0.0
    weights = quantized_weights(job.work, job.strategy)
    seconds = weights / (job.cores * efficiency(f"cpu_{job.strategy.quant}_weights_per_core_per_s", level))
    return seconds * (tokens if job.strategy.quant == "int8" else 1)


def _streamed_seconds(job: Job, rates: Rates, level: Level) -> tuple[float, float] | None:
    """Copies over the link and reads from disk of engine stream."""
    if not job.traffic.link:
        return 0.0, 0.0
    if rates.link is None:
        return None
    copies = job.traffic.link / (rates.link * efficiency("streamed_link", level))
    return copies, job.traffic.disk / rates.direct


def _fetch(job: Job, rates: Rates, cache: float) -> tuple[float, float] | None:
    """Seconds on link and disk in one pass: offloaded layers are copied whole, idle experts too."""
    placed = job.placement
    away = placed.layers_in_ram + placed.layers_on_disk if job.strategy.engine != "stream" else 0
    if job.on_cpu or not (away or cache):
        return 0.0, 0.0
    if rates.pageable is None:
        return None
    one_layer = layer_bytes(job.work, job.strategy) / job.work.layers
    fetched = one_layer * away + cache
    if placed.device_map.get("lm_head") in ("cpu", "disk"):
        fetched += job.work.head_weights * element_bytes(job.strategy.dtype)
    return fetched / rates.pageable, one_layer * placed.layers_on_disk / rates.disk
