"""What accelerate's offload keeps on the card, in RAM and on disk.

`accelerate.hooks.AlignDevicesHook`: before an offloaded module with tensors of its own runs, all of them are
copied to the card; afterwards they are dropped there. So one module at a time is on the card: a linear with
its bias, or all fused experts of a layer together. Nothing is fetched ahead and nothing is kept for a tied
weight between its two uses. `set_module_tensor_to_device` empties the allocator's cache after each tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from planner.memory.moments import CardMemory, line
from planner.memory.weights import layer_linears, linear_bytes, parameter_bytes
from planner.placement import Split
from planner.types import MemoryLine
from planner.units import format_bytes
from profiles.schema import Architecture, Layer


def passing_bytes(arch: Architecture, split: Split, width: int) -> int:
    """Bytes of the largest module that comes back to the card; 0 where nothing is offloaded."""
    sizes = [
        size for kind in set(arch.order[split.resident :]) for size in module_sizes(arch.kinds[kind], width)
    ]
    if split.outer_offloaded:
        sizes += [parameter_bytes(item, width) for item in arch.embeddings]
        sizes += [linear_bytes(arch.head, "none", width)] if arch.head else []
    return max(sizes, default=0)


def module_sizes(layer: Layer, width: int) -> Iterator[int]:
    """Bytes of each module of a layer that has weights of its own, norms left out."""
    experts = layer.feed_forward.experts
    for linear in layer_linears(layer):
        yield linear_bytes(linear, "none", width)
    if experts is not None and not experts.fused:
        for linear in experts.linears:
            yield linear_bytes(linear, "none", width)
    stacks: dict[str, int] = defaultdict(int)
    for item in (*layer.parameters, *layer.attention.parameters, *layer.feed_forward.parameters,
                 *(experts.parameters if experts is not None and experts.fused else ())):  # fmt: skip
        stacks[item.name.rpartition(".")[0]] += parameter_bytes(item, width)
    yield from stacks.values()


def assembled_bytes(arch: Architecture, kinds: Iterable[int], width: int) -> int:
    """Bytes of fused experts in layers of these kinds: no checkpoint file holds them as they are used."""
    total = 0
    for kind in kinds:
        experts = arch.kinds[kind].feed_forward.experts
        if experts is not None and experts.fused:
            total += sum(parameter_bytes(item, width) for item in experts.parameters)
    return total


def offloaded_memory(memory: CardMemory, split: Split, layers: int, passing: int) -> CardMemory:
    """The same run with the weights of `split` elsewhere and one module's passing through.

    Loading may hold one offloaded tensor on the card: random weights are drawn there.
    """
    if not split.offloaded_bytes:
        return memory
    outer = "final norm" if split.outer_offloaded else "embeddings and head"
    away = format_bytes(split.offloaded_bytes)
    kept = f"{split.resident} of {layers} layers and {outer} on the card, {away} away"
    buffer = line(
        "offload buffer", passing, "largest offloaded module: its tensors are on the card while it runs"
    )

    def change(lines: tuple[MemoryLine, ...]) -> tuple[MemoryLine, ...]:
        out = [
            replace(item, bytes=item.bytes - split.offloaded_bytes, formula=kept)
            if item.name == "weights"
            else item
            for item in lines
        ]
        return (*out, buffer)

    load = memory.load_bytes - split.offloaded_bytes
    beside = max(passing, memory.load_peak_bytes - memory.load_bytes)
    return replace(
        memory,
        load_bytes=load,
        load_peak_bytes=load + beside,
        snapshots=tuple(replace(shot, lines=change(shot.lines)) for shot in memory.snapshots),
    )
