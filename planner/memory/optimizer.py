"""Optimizer state: on the card, paged, and what a step needs for a moment.

Facts by optimizer are data (`OPTIMIZERS`); the arithmetic is one function. Sources: torch
`optim/adamw.py` (state in the parameter's dtype; foreach keeps a list of square roots as large as the
state), bitsandbytes `optim/optimizer.py` (8-bit state in blocks of 256 with one float32 absmax each;
tensors under 4096 elements stay 32-bit; tensors of 100,000 elements or more are paged), transformers
`trainer.py` (8-bit optimizers keep embeddings in 32 bits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec import Struct

from planner.memory.tape import rounded

BLOCK = 256
SMALL = 4096
PAGED_FROM = 100_000


class Optimizer(Struct, frozen=True, kw_only=True):
    """How one transformers `optim` keeps its state."""

    states: int
    """State tensors a parameter has (2 for Adam, 1 for Lion, 0 for plain SGD)."""
    bits: int | None = None
    """8 or 32 for bitsandbytes; None: the parameter's own dtype (torch)."""
    paged: bool = False
    lists: int = 0
    """Lists of temporaries, each as large as one state, that a step through all tensors at once makes
    (foreach): Adam's and RMSprop's square roots, Adagrad's and its scaled gradients."""
    fused: bool = False
    """Keeps each parameter's step count on the card."""
    factored: bool = False
    """Adafactor: one row and one column per matrix instead of a state as large as the parameter."""

    runs_as: str = ""
    """What transformers calls it, where that is another name."""


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch": Optimizer(states=2, lists=1),
    "adamw_torch_fused": Optimizer(states=2, fused=True),
    "adamw_8bit": Optimizer(states=2, bits=8),
    "adamw_bnb_8bit": Optimizer(states=2, bits=8),
    "paged_adamw_8bit": Optimizer(states=2, bits=8, paged=True),
    "paged_adamw_32bit": Optimizer(states=2, bits=32, paged=True),
    "paged_adamw": Optimizer(states=2, bits=32, paged=True, runs_as="paged_adamw_32bit"),
    "lion_32bit": Optimizer(states=1, bits=32),
    "lion_8bit": Optimizer(states=1, bits=8),
    "paged_lion_32bit": Optimizer(states=1, bits=32, paged=True),
    "paged_lion_8bit": Optimizer(states=1, bits=8, paged=True),
    "rmsprop_bnb": Optimizer(states=1, bits=32),
    "rmsprop_bnb_8bit": Optimizer(states=1, bits=8),
    "rmsprop_bnb_32bit": Optimizer(states=1, bits=32),
    "ademamix": Optimizer(states=3, bits=32),
    "ademamix_8bit": Optimizer(states=3, bits=8),
    "paged_ademamix_32bit": Optimizer(states=3, bits=32, paged=True),
    "paged_ademamix_8bit": Optimizer(states=3, bits=8, paged=True),
    "rmsprop": Optimizer(states=1, lists=1),
    "adagrad": Optimizer(states=1, lists=2),
    "sgd": Optimizer(states=0),
    "adafactor": Optimizer(states=0, factored=True),
}
"""The `optim` names Fitwright estimates and runs."""


class StateBytes(Struct, frozen=True):
    """State of one optimizer over all trained tensors."""

    device: int
    """On the allocator's books."""
    managed: int
    """Paged (cudaMallocManaged): not on the allocator's books, backed by host RAM when the card is full."""
    temporary: int
    """Most bytes a step holds beside parameters, gradients and state."""


def state_bytes(
    name: str,
    tensors: Iterable[tuple[int, int]],
    width: int,
    embeddings: tuple[int, ...] = (),
    unasked: Callable[[int], int] = lambda _: 0,
) -> StateBytes:
    """State for `tensors` of (elements, count), stored in `width` bytes each.

    `embeddings`: elements of trained token embeddings (not among `tensors`), which stay in 32 bits.
    `unasked`: bytes the allocator hands out beside one list of such tensors, by the bytes of an element.
    """
    kind = OPTIMIZERS[name]
    device = managed = largest = 0
    if not kind.paged and not kind.factored:
        device = kind.states * unasked(width if kind.bits is None else kind.bits // 8)
    temporary = kind.lists * unasked(width)
    every = [(size, count, False) for size, count in tensors] + [(size, 1, True) for size in embeddings]
    for size, count, embedding in every:
        on, paged = _one(kind, size, width, embedding)
        device += count * on
        managed += count * paged
        temporary += kind.lists * count * rounded(size * width)
        if kind.factored:
            largest = max(largest, _factored_step(size, width, count > 1))
    return StateBytes(device, managed, temporary + largest)


def _factored_step(size: int, width: int, repeated: bool) -> int:
    """float32 copies of one parameter: gradient and value where they are narrower, the gradient's square, and
    that plus epsilon; the update of the parameter before is still named (transformers `optimization.py`,
    `Adafactor.step`).

    `repeated`: the parameter before may have been as large.
    """
    copies = (2 if width == 4 else 4) + (1 if repeated else 0)
    return copies * rounded(size * 4)


def state_tensors(kind: Optimizer, size: int, width: int, embedding: bool) -> list[int]:
    """Bytes of each large state tensor that the first step makes on the card for one parameter."""
    if kind.factored or not kind.states:
        return []
    return [_one(kind, size, width, embedding)[0] // kind.states] * kind.states


def step_temporaries(kind: Optimizer, sizes: Iterable[int], width: int) -> list[list[int]]:
    """Blocks that a step holds at once and frees, list by list."""
    sizes = list(sizes)
    lists = [[rounded(size * width) for size in sizes] for _ in range(kind.lists)]
    if kind.factored and sizes:
        lists.append([rounded(4 * max(sizes))] * (3 if width == 4 else 5))
    return lists


def _one(kind: Optimizer, size: int, width: int, embedding: bool) -> tuple[int, int]:
    if kind.factored:
        side = int(size**0.5)
        return 2 * rounded(4 * side), 0
    if kind.bits is None:
        return kind.states * rounded(size * width) + (rounded(4) if kind.fused else 0), 0
    wide = kind.bits == 32 or size < SMALL or embedding
    state = kind.states * rounded(size * (4 if wide else 1))
    scales = 0 if wide else kind.states * rounded(4 * -(-size // BLOCK))
    if kind.paged and size >= PAGED_FROM:
        return scales, kind.states * size * (4 if wide else 1)
    return state + scales, 0
