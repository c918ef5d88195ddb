"""The cards: `load_gpu("rtx-3090")` and its like. Files: `profiles/gpus/<vendor>.json`.

A card answers to its id, its name, its aliases and its short forms: the id without form factor (`pcie`,
`sxm5`) and without memory size, where exactly one card remains. Letter case, spaces, dashes and words that
name no card (`NVIDIA`, `GeForce`, `Generation`) do not matter: `rtx3090`, `NVIDIA GeForce RTX 3090`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec

from profiles.errors import FitwrightError, UnknownGpu
from profiles.schema import GpuProfile

VENDORS = ("nvidia", "amd", "apple", "intel", "huawei")
LARGEST_COUNT = 64

_FOLDER = Path(__file__).parent / "gpus"
_LONGEST_NAME = 100
_WORD = re.compile(r"[a-z0-9]+")
_MAKERS = ("nvidia", "geforce", "tesla", "amd", "radeon", "instinct", "intel", "apple", "huawei")
_NOISE = {*_MAKERS, "gpu", "graphics", "generation", "blackwell", "workstation", "edition", "data", "center"}
_SIZE = re.compile(r"[0-9]+gb")
_FORM_FACTOR = re.compile(r"(pcie|sxm|oam)[0-9]*")
_COUNTED = re.compile(r"(.+?)[\s_-]*[x×*]\s*([+-]?[0-9]+)", re.IGNORECASE | re.DOTALL)


@cache
def _cards(vendor: str) -> tuple[GpuProfile, ...]:
    return msgspec.json.decode((_FOLDER / f"{vendor}.json").read_bytes(), type=tuple[GpuProfile, ...])


@cache
def _index(vendor: str) -> dict[str, tuple[GpuProfile, ...]]:
    index: dict[str, tuple[GpuProfile, ...]] = {}
    for card in _cards(vendor):
        for key in _keys(card):
            index[key] = (*index.get(key, ()), card)
    return index


def all_gpus() -> tuple[GpuProfile, ...]:
    """Every card of the catalogue, vendor by vendor in the order of the files."""
    return tuple(card for vendor in VENDORS for card in _cards(vendor))


def gpu_ids() -> tuple[str, ...]:
    """The ids of `all_gpus()`."""
    return tuple(card.id for card in all_gpus())


def load_gpu(name: str) -> GpuProfile:
    """The card of that id, name, alias or short form.

    Errors: `UnknownGpu` when no card has that name (with the nearest ids) or when several have (with theirs).

    >>> load_gpu("RTX 3090").id
    'rtx-3090-24gb'
    """
    found = find_gpus(name)
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(card.id for card in found)
        raise UnknownGpu(f"several cards are called {_quoted(name)}", f"choose one of {choices}")
    near = nearest_gpus(name)
    hint = f"the nearest are {', '.join(near)}; " if near else ""
    raise UnknownGpu(f"no card is called {_quoted(name)}", f"{hint}`planner gpus` lists all")


def find_gpus(name: str, *, modified: bool = False) -> tuple[GpuProfile, ...]:
    """Every card that answers to a name: one, several for an ambiguous short form, or none. Cards somebody
    changed (`rtx-4090-48gb-modded`) answer to a short form only where no other does, or with `modified`."""
    if len(name) > _LONGEST_NAME:
        return ()
    lowered, key = name.strip().lower(), _key(name)
    for vendor in VENDORS:
        found = _index(vendor).get(key, ())
        exact = tuple(card for card in found if card.id == lowered)
        if found:
            return exact or (found if modified else _unmodified(found) or found)
    return ()


def nearest_gpus(name: str, count: int = 3) -> tuple[str, ...]:
    """Ids that look most like a name, best first; only the first hundred characters count."""
    from difflib import get_close_matches

    wanted = _key(name[:_LONGEST_NAME])
    shapes = {_key(card.id): card.id for card in all_gpus()}
    contain = sorted((shape for shape in shapes if len(wanted) > 1 and wanted in shape), key=len)
    # Most short forms are ids without a memory size: compared without it they come closer.
    short = {shape: card.id for card in all_gpus() for shape in _keys(card)}
    close = get_close_matches(wanted, short, n=3 * count, cutoff=0.5)
    found = [shapes[shape] for shape in contain] + [short[shape] for shape in close]
    return tuple(dict.fromkeys(found))[:count]


def parse_gpu(text: str) -> tuple[GpuProfile, int]:
    """A card and how many: `rtx-3090x2`, `rtx-3090`, `h100-sxm5`.

    Errors: `UnknownGpu` as `load_gpu`; `FitwrightError` for a count outside 1 to 64.

    >>> card, count = parse_gpu("rtx-3090x2"); card.id, count
    ('rtx-3090-24gb', 2)
    """
    counted = _COUNTED.fullmatch(text.strip()) if len(text) <= _LONGEST_NAME else None
    # `h100-sxm5` ends like a count and is a card; `rtx9999` splits into a card nobody knows and no count.
    if counted is None or find_gpus(text) or not find_gpus(counted[1]):
        return load_gpu(text), 1
    card, count = load_gpu(counted[1]), int(counted[2])
    if not 1 <= count <= LARGEST_COUNT:
        hint = f"name 1 to {LARGEST_COUNT} cards, like {card.id}x2"
        raise FitwrightError(f"{counted[2][:20]} cards in {_quoted(text)}", hint)
    return card, count


def parse_capability(text: str | None) -> tuple[int, int] | None:
    """A CUDA compute capability as numbers that compare; None for None.

    >>> parse_capability("8.6")
    (8, 6)
    """
    if text is None:
        return None
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


def _quoted(name: str) -> str:
    return ascii(name if len(name) <= 40 else name[:40] + "...")


def _words(name: str) -> list[str]:
    words = _WORD.findall(name.lower().replace("(r)", "").replace("(tm)", ""))
    return [word for word in words if word not in _NOISE] or words


def _key(name: str) -> str:
    return "".join(_words(name))


def _unmodified(cards: tuple[GpuProfile, ...]) -> tuple[GpuProfile, ...]:
    return tuple(card for card in cards if not card.id.endswith("-modded"))


def _keys(card: GpuProfile) -> set[str]:
    """Every spelling a card answers to, without separators."""
    keys = {card.id.replace("-", ""), _key(card.name), *map(_key, card.aliases)}
    keys.update("".join(words) for words in _spellings(_words(card.id)))
    return keys


def _spellings(words: list[str]) -> Iterator[list[str]]:
    size = [word for word in words if _SIZE.fullmatch(word)]
    form = [word for word in words if _FORM_FACTOR.fullmatch(word)]
    rest = [word for word in words if word not in size and word not in form and word != "modded"]
    yield words
    yield rest
    yield rest + size
    for factor in form:
        for spelled in {factor, factor.rstrip("0123456789")}:
            yield [*rest, spelled]
            yield [*rest, spelled, *size]
