"""What a run takes beside its cards: RAM and disk, as its placement has it."""

from __future__ import annotations

from collections.abc import Sequence

from planner.draft import draft_architecture
from planner.identity import identities_cache
from planner.memory.adapters import adapter_parameters
from planner.memory.host import checkpoint_bytes, disk_space, download_bytes, host_memory
from planner.memory.moments import CardMemory, line
from planner.memory.offload import assembled_bytes
from planner.memory.optimizer import StateBytes
from planner.memory.streamed import parts_of, pinned_lines, split
from planner.memory.train import optimizer_state
from planner.memory.weights import WIDTH, WeightBytes, weight_bytes
from planner.placement import tiers_of, token_embedding
from planner.types import DiskEstimate, GpuEstimate, HostEstimate, PlacementMap, Strategy, Workload
from profiles.arithmetic import parameter_count
from profiles.schema import Architecture


def host_estimate(
    arch: Architecture,
    work: Workload,
    how: Strategy,
    memory: CardMemory,
    gpus: Sequence[GpuEstimate],
    placement: PlacementMap,
) -> HostEstimate:
    """RAM of a run. `memory`: of the run on a card, or on the CPU where `gpus` is empty."""
    managed = max((gpu.managed_bytes for gpu in gpus), default=0)
    return _host_estimate(arch, work, how, memory, bool(gpus), managed, placement)


@identities_cache
def _host_estimate(
    arch: Architecture,
    work: Workload,
    how: Strategy,
    memory: CardMemory,
    on_card: bool,
    managed_bytes: int,
    placement: PlacementMap,
) -> HostEstimate:
    weights = weight_bytes(arch, how.quant, how.quant_experts, how.dtype)
    streams = on_card and how.engine == "stream"
    in_ram = _in_ram(arch, weights, placement) if on_card and not streams else 0
    saved = 0
    if work.task == "train":  # the weights of a checkpoint are copied to RAM, its optimizer state is not
        adapters = adapter_parameters(arch, work) * WIDTH[work.adapter_dtype]
        saved = weights.total(arch.order) if work.method == "full" else adapters
    return host_memory(
        on_card=on_card,
        in_ram_bytes=in_ram,
        managed_bytes=managed_bytes,
        pinned_bytes=memory.host_bytes if on_card else 0,
        streamed=pinned_lines(parts_of(arch, how), tiers_of(arch, placement)) if streams else (),
        largest_tensor_bytes=0 if streams else _in_flight(arch, weights, placement, on_card),
        saved_bytes=saved,
        run_bytes=0 if on_card else memory.peak.bytes + memory.managed_bytes,
    )


def _in_flight(arch: Architecture, weights: WeightBytes, placement: PlacementMap, on_card: bool) -> int:
    """The tensor that passes through our RAM while loading.

    safetensors maps the file: what goes to a card comes from the page cache. Experts are put together in RAM;
    what is written to the offload folder stands there first.
    """
    if not on_card:
        return max(weights.largest_unquantized, weights.embeddings)
    if not placement.layers_on_disk:
        return weights.largest_fused if placement.layers_in_ram else 0
    outer = weights.embeddings if _embedding_place(arch, placement) == "disk" else 0
    return max(weights.largest_unquantized, weights.largest_fused, outer)


def _in_ram(arch: Architecture, weights: WeightBytes, placement: PlacementMap) -> int:
    """Weight bytes the placement keeps in RAM beside a card."""
    if placement.device_map.get("") is not None:
        return 0
    total = 0
    for i, kind in enumerate(arch.order):
        if placement.device_map.get(f"{arch.layers_path}.{i}") == "cpu":
            total += weights.layers[kind]
    if _embedding_place(arch, placement) == "cpu":
        total += weights.embeddings + weights.head
    return total


def _embedding_place(arch: Architecture, placement: PlacementMap) -> int | str | None:
    return placement.device_map.get(token_embedding(arch))


_state = identities_cache(optimizer_state)


@identities_cache
def disk_estimate(
    arch: Architecture, parameters: int, work: Workload, how: Strategy, placement: PlacementMap
) -> DiskEstimate:
    """Disk of a run. `parameters`: of the model as published."""
    written = 0
    if placement.layers_on_disk and how.engine == "stream":
        written = sum(split(parts_of(arch, how), tiers_of(arch, placement))[1])
    elif placement.layers_on_disk:
        places = ((kind, f"{arch.layers_path}.{i}") for i, kind in enumerate(arch.order))
        away = [kind for kind, name in places if placement.device_map.get(name) == "disk"]
        written = assembled_bytes(arch, away, WIDTH[how.dtype])
    state: StateBytes | None = None
    trained = 0
    if work.task == "train":
        state = _state(arch, work, how)
        trained = parameters if work.method == "full" else adapter_parameters(arch, work)
    checkpoint = checkpoint_bytes(parameters, trained, work, how, state)
    width = WIDTH[how.dtype] if work.method == "full" else WIDTH[work.adapter_dtype]
    space = disk_space(arch, parameters, work, written, checkpoint, trained * width)
    draft = draft_architecture(how.draft) if how.speculate == "draft" else None
    if draft is None:
        return space
    own = parameter_count(draft)
    fetched = line("draft download", download_bytes(draft, own), f"{own:,} parameters of {how.draft}")
    return DiskEstimate(components=(*space.components, fetched))
