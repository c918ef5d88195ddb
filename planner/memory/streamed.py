"""A run whose layers stream: what stays on the card, what waits in page-locked RAM, what is read from disk.

`parts` measures a model once; `on_card`, `in_ram`, `on_disk` and `traffic` put the pieces together for one
choice of `Tiers`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from msgspec import Struct
from msgspec.structs import replace

from planner.identity import identities_cache, identity_cache
from planner.memory.moments import CardMemory, line
from planner.memory.stream import (
    GATHER_BYTES,
    RING_BUFFERS,
    SLOTS,
    head_block_rows,
    left_behind,
    slabs,
    table_bytes,
)
from planner.memory.tape import rounded
from planner.memory.weights import WIDTH, parameter_bytes, weight_bytes
from planner.placement import Tiers, spread_evenly
from planner.types import MemoryLine, Strategy
from planner.units import format_bytes
from profiles.schema import Architecture


class Away(Struct, frozen=True):
    """The layers that stream where a number of others stay, taken together."""

    count: int
    left_bytes: int
    """What they no longer take on the card."""
    largest_slab: int
    largest_loaded: int
    """The largest of them as it is loaded, before it is packed."""
    slab_bytes: int


class Parts(Struct, frozen=True):
    """Sizes of a model's pieces in one precision."""

    layers: int
    slabs: tuple[int, ...]
    away: tuple[Away, ...]
    """By the number of residents."""
    embeddings: int
    """Token embeddings, as a table of V x D."""
    head: int
    """The output projection, as a table of V x D; that of the embeddings where both are tied."""
    head_blocks: tuple[int, ...]
    """Bytes of the blocks a streamed output projection comes in."""
    tied: bool
    tables: int
    """Code books that all streamed weights share."""


def parts_of(arch: Architecture, how: Strategy) -> Parts:
    """The sizes of `arch` in the precisions of `how`."""
    return _parts(arch, how.quant, how.quant_experts, how.dtype)


@lru_cache(maxsize=512)
def _parts(arch: Architecture, quant: str, quant_experts: str, dtype: str) -> Parts:
    sizes, width = slabs(arch, quant, dtype, quant_experts), WIDTH[dtype]
    loaded = weight_bytes(arch, quant, quant_experts, dtype).layers
    behind = [left_behind(layer, width) for layer in arch.kinds]
    left = [loaded[kind] - behind[kind] for kind in arch.order]
    away = []
    for resident in range(arch.layers + 1):
        kept = spread_evenly(resident, arch.layers)
        gone = [index for index in range(arch.layers) if index not in kept]
        away.append(
            Away(
                count=len(gone),
                left_bytes=sum(left[index] for index in gone),
                largest_slab=max((sizes[index] for index in gone), default=0),
                largest_loaded=max((loaded[arch.order[index]] for index in gone), default=0),
                slab_bytes=sum(sizes[index] for index in gone),
            )
        )
    row, rows = arch.hidden_size * width, head_block_rows(arch.vocab_size, arch.hidden_size, width)
    whole, rest = divmod(arch.vocab_size, rows)
    return Parts(
        layers=arch.layers,
        slabs=sizes,
        away=tuple(away),
        embeddings=parameter_bytes(arch.embeddings[0], width),
        head=arch.vocab_size * row,
        head_blocks=(rows * row,) * whole + ((rest * row,) if rest else ()),
        tied=arch.head is None,
        tables=sum(rounded(table) for table in table_bytes(quant)),
    )


# --------------------------------------------------------------------------- the card


class Shift(Struct, frozen=True):
    """What streaming changes on the card, in every moment alike."""

    left_bytes: int
    slots: int
    slot_bytes: int
    load_peak_bytes: int
    """Most that loading the layers has on the card beside what stays."""
    tables_bytes: int
    """What is on the card while the tables of V x D come, before any layer."""


def shift(memory: CardMemory, parts: Parts, tiers: Tiers) -> Shift:
    """The sizes behind `on_card`.

    Loading brings one layer to the card at a time, and tables of V x D before all layers; the slots are made
    afterwards.
    """
    away = parts.away[tiers.resident]
    tables = _tables_away(parts, tiers)
    blocks = parts.head_blocks if tiers.head_away else ()
    slots = min(SLOTS, away.count + len(blocks))
    slot = rounded(max(away.largest_slab, *blocks[:1], 0)) if slots else 0
    passing = memory.load_peak_bytes - memory.load_bytes + away.largest_loaded if away.count else 0
    books = parts.tables if away.count else 0
    return Shift(
        away.left_bytes + sum(map(rounded, tables)),
        slots,
        slots * slot + books,
        max(passing, slots * slot + books, memory.load_peak_bytes - memory.load_bytes),
        max(tables, default=0) + (0 if parts.tied or tiers.head_away else parts.head),
    )


def _tables_away(parts: Parts, tiers: Tiers) -> list[int]:
    """Bytes of the tables of V x D that are in RAM; a tied one is one."""
    if parts.tied:
        return [parts.embeddings] if tiers.head_away else []
    return [parts.embeddings] * tiers.embeddings_away + [parts.head] * tiers.head_away


def streamed_memory(memory: CardMemory, parts: Parts, tiers: Tiers) -> CardMemory:
    """The same run on the card with everything else where `tiers` has it."""
    known = _known_memory(memory, parts)
    if tiers not in known:
        known[tiers] = _streamed_memory(memory, parts, tiers)
    return known[tiers]


@identities_cache
def _known_memory(memory: CardMemory, parts: Parts) -> dict[Tiers, CardMemory]:
    return {}


def _streamed_memory(memory: CardMemory, parts: Parts, tiers: Tiers) -> CardMemory:
    change = shift(memory, parts, tiers)
    if not change.left_bytes:
        return memory
    away, stays = parts.away[tiers.resident], memory.load_bytes - change.left_bytes
    what = f"{away.count} streamed layers" if away.count else "the output projection"
    blocks = f" and {len(parts.head_blocks)} blocks of the output projection" if tiers.head_away else ""
    slots = line(
        "slots",
        change.slot_bytes,
        f"{change.slots} x {format_bytes(change.slot_bytes // change.slots if change.slots else 0)} for "
        f"{what}{blocks if away.count else ''}",
    )
    kept = f"{tiers.resident} of {parts.layers} layers and {_outside(tiers)}"
    text = f"{kept}, {format_bytes(change.left_bytes)} elsewhere"

    def lines(before: tuple[MemoryLine, ...]) -> tuple[MemoryLine, ...]:
        weights = (
            replace(item, bytes=item.bytes - change.left_bytes, formula=text)
            if item.name == "weights"
            else item
            for item in before
        )
        return (*weights, slots) if slots.bytes else tuple(weights)

    return replace(
        memory,
        load_bytes=stays + slots.bytes,
        load_peak_bytes=max(stays + change.load_peak_bytes, change.tables_bytes),
        snapshots=tuple(replace(shot, lines=lines(shot.lines)) for shot in memory.snapshots),
    )


def _outside(tiers: Tiers) -> str:
    if tiers.head_away:
        return "the final norm"
    return "the output projection" if tiers.embeddings_away else "all else that is no layer"


# --------------------------------------------------------------------------- RAM and disk


def split(parts: Parts, tiers: Tiers) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Slab bytes of the streamed layers in RAM and of those on disk, in order."""
    return _split(parts.slabs, tiers)


@lru_cache(maxsize=4096)
def _split(sizes: tuple[int, ...], tiers: Tiers) -> tuple[tuple[int, ...], tuple[int, ...]]:
    placed = tuple(zip(sizes, tiers.places(len(sizes)), strict=True))
    in_ram = tuple(size for size, place in placed if place == "cpu")
    return in_ram, tuple(size for size, place in placed if place == "disk")


def pinned_lines(parts: Parts, tiers: Tiers) -> tuple[MemoryLine, ...]:
    """Page-locked RAM of a run."""
    known = _known_lines(parts)
    if tiers not in known:
        known[tiers] = _pinned_lines(parts, tiers)
    return known[tiers]


@identity_cache
def _known_lines(parts: Parts) -> dict[Tiers, tuple[MemoryLine, ...]]:
    return {}


def _pinned_lines(parts: Parts, tiers: Tiers) -> tuple[MemoryLine, ...]:
    in_ram, on_disk = split(parts, tiers)
    buffers, largest = min(RING_BUFFERS, len(on_disk)), max(in_ram, default=0)
    tables = _tables_away(parts, tiers)
    gather = GATHER_BYTES if tiers.embeddings_away or (parts.tied and tiers.head_away) else 0
    names = ["embeddings"] * bool(gather) + ["output projection"] * tiers.head_away
    return tuple(
        item
        for item in (
            line(
                "streamed layers", sum(in_ram), f"{len(in_ram)} of up to {format_bytes(largest)}, page-locked"
            ),
            line(
                "disk ring",
                buffers * max(on_disk, default=0),
                f"{buffers} x {format_bytes(max(on_disk, default=0))} for {len(on_disk)} layers on disk",
            ),
            line("tables in RAM", sum(tables) + gather, f"{' and '.join(names)}, page-locked"),
        )
        if item.bytes
    )


# --------------------------------------------------------------------------- what moves


class Traffic(Struct, frozen=True):
    """Bytes of one pass of inference, or of one forward and backward."""

    link: int = 0
    disk: int = 0
    stretches: tuple[int, int, int] = (0, 0, 0)
    """Of training: what comes over the link for the forward of the layers, for the loss, and for backward."""


def traffic(parts: Parts, tiers: Tiers, train: bool) -> Traffic:
    """What a pass brings to the card, and of that from disk.

    Slots and ring keep what is needed next: at each turn of training the last ones are there already.
    """
    places = tiers.places(parts.layers)
    streamed = [size for size, place in zip(parts.slabs, places, strict=True) if place != 0]
    on_disk = [size for size, place in zip(parts.slabs, places, strict=True) if place == "disk"]
    blocks = list(parts.head_blocks if tiers.head_away else ())
    if not train:
        return Traffic(
            sum(_up(streamed + blocks, SLOTS, turns=False)), sum(_up(on_disk, RING_BUFFERS, False))
        )
    up, down = _up(streamed + blocks, SLOTS), _down(streamed + blocks, SLOTS)
    layers = len(streamed)
    stretches = sum(up[:layers]), sum(up[layers:]) + sum(down[layers:]), sum(down[:layers])
    disk = sum(_up(on_disk, RING_BUFFERS)) + sum(_down(on_disk, RING_BUFFERS))
    return Traffic(sum(stretches), disk, stretches)


def _up(sizes: list[int], places: int, turns: bool = True) -> list[int]:
    """What the way there brings, by item. `turns`: the first ones are left from the way back."""
    if len(sizes) <= places:
        return [0] * len(sizes)
    return [0] * places + sizes[places:] if turns else sizes


def _down(sizes: list[int], places: int) -> list[int]:
    """What the way back brings: the last ones are left from the way there."""
    return _up(sizes[::-1], places)[::-1]


class Ladder(Struct, frozen=True):
    """Numbers of residents in the order of what they take of the card.

    Layers differ in size, so of evenly spread ones, one more may be smaller ones; and slots are no larger
    than what still passes through them.
    """

    counts: tuple[int, ...]
    """For each number, the number from there on that takes least."""
    need: tuple[int, ...]
    """What layers and slots take at each, beside a model without layers: never less from one to the next."""


@identity_cache
def ladders(parts: Parts) -> tuple[Ladder, Ladder]:
    """With the output projection on the card, and away."""
    return _ladder(parts, ()), _ladder(parts, parts.head_blocks)


def _ladder(parts: Parts, blocks: tuple[int, ...]) -> Ladder:
    every = parts.away[0].left_bytes
    need = [
        every
        - away.left_bytes
        + min(SLOTS, away.count + len(blocks)) * max(away.largest_slab, *blocks[:1], 0)
        for away in parts.away
    ]

    def better(low: int, n: int) -> int:
        return n if need[n] < need[low] else low

    counts = tuple(accumulate(range(parts.layers, -1, -1), better))[::-1]
    return Ladder(counts, tuple(need[n] for n in counts))
