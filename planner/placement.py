"""Which layers live where: on one card, over several, or partly in RAM or on disk. Pure arithmetic.

Device maps are accelerate's: module name to card index, "cpu" or "disk" (`accelerate.dispatch_model`).
Embeddings, final norm and output projection stay on the card as long as they can: accelerate would copy a
whole vocabulary matrix over the link for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from msgspec import Struct

from planner.identity import identities_cache, identity_cache
from planner.memory.weights import WeightBytes
from planner.types import PlacementMap
from profiles.schema import Architecture, Linear, Parameter, Tower


class Split(Struct, frozen=True):
    """How many leading layers stay on the card, and the bytes that leave it."""

    resident: int
    offloaded_bytes: int
    outer_offloaded: bool = False
    """Embeddings and output projection left the card too."""


def resident_layers(arch: Architecture, weights: WeightBytes, excess_bytes: int) -> Split:
    """Take layers off the card, last first, until `excess_bytes` are saved; then embeddings and head.

    The last layers leave, so that the first ones never wait for the link.
    """
    saved, resident = 0, arch.layers
    while saved < excess_bytes and resident > 0:
        resident -= 1
        saved += weights.layers[arch.order[resident]]
    if saved >= excess_bytes:
        return Split(resident, saved)
    return Split(0, saved + weights.embeddings + weights.head, True)


def split_at(arch: Architecture, weights: WeightBytes, resident: int) -> Split:
    """The first `resident` layers on the card, the others off it."""
    return Split(resident, sum(weights.layers[kind] for kind in arch.order[resident:]))


def spread_evenly(count: int, total: int) -> frozenset[int]:
    """`count` of the numbers below `total`, as far from each other as they go.

    Resident layers of a streamed model are spread so: copies of the others run under their computation.

    >>> sorted(spread_evenly(3, 9))
    [1, 4, 7]
    """
    count = max(0, min(count, total))
    return frozenset((2 * k + 1) * total // (2 * count) for k in range(count))


def balanced(arch: Architecture, weights: WeightBytes, budgets: Sequence[int]) -> tuple[int, ...]:
    """Layers of each card, in proportion to what the cards have left beside embeddings and head."""
    first = weights.embeddings
    last = weights.head or weights.embeddings
    rooms = [
        max(0, budget - (first if i == 0 else 0) - (last if i == len(budgets) - 1 else 0))
        for i, budget in enumerate(budgets)
    ]
    total = sum(rooms) or 1
    counts = [int(arch.layers * room / total) for room in rooms]
    for i in range(arch.layers - sum(counts)):
        counts[i % len(counts)] += 1
    return tuple(counts)


@identities_cache
def one_device(where: int | str, arch: Architecture) -> PlacementMap:
    """Everything on one card (or on the CPU)."""
    on_card = isinstance(where, int)
    return PlacementMap(
        device_map={"": where},
        layers_on_gpu=arch.layers if on_card else 0,
        layers_in_ram=0 if on_card else arch.layers,
    )


def offload_map(arch: Architecture, split: Split, where: str) -> PlacementMap:
    """Leading layers on card 0, the rest on "cpu" or "disk".

    Something always stays on the card: accelerate computes where the map's first device is, and a map of
    nothing but "cpu" and "disk" computes on the CPU.
    """
    path = arch.layers_path
    leaves = {item.name.rsplit(".", 1)[0] for item in arch.embeddings} | {head_name(arch)}
    names: dict[str, int | str] = {
        name: where if split.outer_offloaded and name in leaves else 0 for name in outer_modules(arch)
    }
    layers = {f"{path}.{i}": (0 if i < split.resident else where) for i in range(arch.layers)}
    gone = arch.layers - split.resident
    return PlacementMap(
        device_map={**names, **layers},
        layers_on_gpu=split.resident,
        layers_in_ram=gone if where == "cpu" else 0,
        layers_on_disk=gone if where == "disk" else 0,
    )


class Tiers(Struct, frozen=True):
    """How engine stream spreads a model over card, RAM and disk."""

    resident: int
    """Layers that stay on the card."""
    on_disk: int = 0
    """Of the streamed layers, those that are read from disk for each pass; the others wait in RAM."""
    embeddings_away: bool = False
    """The token embeddings stay in RAM: rows of a pass are gathered there."""
    head_away: bool = False
    """The output projection comes from RAM in blocks of the vocabulary."""

    def places(self, layers: int) -> tuple[int | str, ...]:
        """Where each of `layers` layers lives: card 0, "cpu" or "disk".

        Layers on disk are spread over the streamed ones, so that the disk works while the link does.
        """
        return _places(self.resident, self.on_disk, layers)


@lru_cache(maxsize=4096)
def _places(resident: int, on_disk: int, layers: int) -> tuple[int | str, ...]:
    kept = spread_evenly(resident, layers)
    away = [index for index in range(layers) if index not in kept]
    read = {away[k] for k in spread_evenly(on_disk, len(away))}
    return tuple(0 if i in kept else "disk" if i in read else "cpu" for i in range(layers))


def stream_map(arch: Architecture, tiers: Tiers) -> PlacementMap:
    """Residents and all that is no layer on card 0; the rest where `tiers` has it."""
    known = _known_maps(arch)
    if tiers not in known:
        known[tiers] = _stream_map(arch, tiers)
    return known[tiers]


@identity_cache
def _known_maps(arch: Architecture) -> dict[Tiers, PlacementMap]:
    return {}


def _stream_map(arch: Architecture, tiers: Tiers) -> PlacementMap:
    names: dict[str, int | str] = dict.fromkeys(outer_modules(arch), 0)
    if tiers.embeddings_away:
        names[token_embedding(arch)] = "cpu"
    if tiers.head_away:
        names[head_name(arch)] = "cpu"
    places = tiers.places(arch.layers)
    layers = {f"{arch.layers_path}.{i}": place for i, place in enumerate(places)}
    on_disk = places.count("disk")
    return PlacementMap(
        device_map={**names, **layers},
        layers_on_gpu=places.count(0),
        layers_in_ram=arch.layers - places.count(0) - on_disk,
        layers_on_disk=on_disk,
    )


def tiers_of(arch: Architecture, placement: PlacementMap) -> Tiers:
    """The tiers behind a map of `stream_map`."""
    return Tiers(
        placement.layers_on_gpu,
        placement.layers_on_disk,
        placement.device_map.get(token_embedding(arch)) == "cpu",
        placement.device_map.get(head_name(arch)) == "cpu",
    )


def token_embedding(arch: Architecture) -> str:
    """Name of the module that holds the token embeddings."""
    return arch.embeddings[0].name.rsplit(".", 1)[0]


def several_cards(arch: Architecture, counts: Sequence[int]) -> PlacementMap:
    """Consecutive layers over cards: embeddings with the first, norm and head with the last."""
    ending = {head_name(arch), arch.final_norm.name if arch.final_norm else ""}
    names: dict[str, int | str] = {
        name: len(counts) - 1 if name in ending else 0 for name in outer_modules(arch)
    }
    start = 0
    for card, count in enumerate(counts):
        for i in range(start, start + count):
            names[f"{arch.layers_path}.{i}"] = card
        start += count
    return PlacementMap(device_map=names, layers_on_gpu=arch.layers)


def outer_modules(arch: Architecture) -> list[str]:
    """Module names of a model outside its layers: embeddings, rotary tables, final norm, towers, head."""
    base = arch.layers_path.rsplit(".", 1)[0]
    names = [item.name.rsplit(".", 1)[0] for item in arch.embeddings]
    names += [f"{base}.rotary_emb"] if any(layer.attention.rope for layer in arch.kinds) else []
    names += [arch.final_norm.name] if arch.final_norm else []
    names += [item.name for item in arch.linears]
    names += [item.name.rsplit(".", 1)[0] for item in arch.parameters if item.persistent]
    names += [_beside(arch.layers_path, name) for tower in arch.towers for name in _tensors(tower)]
    names += [head_name(arch)]
    return list(dict.fromkeys(names))


def head_name(arch: Architecture) -> str:
    """Name of the output projection."""
    return arch.head.name if arch.head else "lm_head"


def _tensors(tower: Tower) -> list[str]:
    """Module or tensor paths that a tower consists of."""
    outside: list[Linear | Parameter] = [*tower.linears, *tower.parameters]
    return [*([tower.name] if tower.blocks else []), *(item.name for item in outside)]


def _beside(layers_path: str, name: str) -> str:
    """The outermost module on the way to `name` that does not hold the text model's layers.

    >>> _beside("model.language_model.layers", "model.vision_tower.encoder.layers")
    'model.vision_tower'
    """
    path, ours = name.split("."), layers_path.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(path, ours, strict=False)) if a != b), len(ours))
    return ".".join(path[: shared + 1])
