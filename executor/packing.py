"""Several rows in one sequence, and the proof that a model keeps them apart."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from executor.errors import CannotHonour
from executor.examples import IGNORED, Example

if TYPE_CHECKING:
    import torch

_TWO_ROWS = (range(20, 32), range(5, 13))
"""Token ids, taken modulo the vocabulary."""


def pack(examples: Sequence[Example], seq_len: int) -> list[Example]:
    """Several examples in one sequence: longest first, each where least room is left (best-fit decreasing).

    Positions start again at 0 with each example, from which transformers makes a mask that keeps them apart.
    """
    packed: list[Example] = []
    room: list[tuple[int, int]] = []  # (tokens left, index in packed), sorted
    for example in sorted(examples, key=lambda e: -len(e.input_ids)):
        size = len(example.input_ids)
        at = bisect.bisect_left(room, (size, -1))
        if at < len(room):
            left, index = room.pop(at)
        else:
            left, index = seq_len, len(packed)
            packed.append(Example([], []))
        home = packed[index]
        home.input_ids += example.input_ids
        home.labels += [IGNORED, *example.labels[1:]]
        home.position_ids += range(size)
        bisect.insort(room, (left - size, index))
    return packed


def refuse_mixing(model: Any, collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]) -> None:
    """Take the gradient of one row's logits with respect to the row packed before it: it must be zero.

    Recurrent and linear attention, and kernels that take no mask, would let rows see each other without a
    word. A masked weight is exactly zero, so nothing else is: no bound has to be chosen.

    Errors: `CannotHonour` for a model that mixes packed rows.
    """
    was_training = model.training
    model.eval()
    try:
        mixes = _depends_on_row_before(model, collate)
    except TypeError:  # its forward takes no positions
        raise CannotHonour("--packing: this model takes no positions to keep rows apart by") from None
    finally:
        model.train(was_training)
    if mixes:
        raise CannotHonour(
            "--packing: this model would mix the rows of a sequence (nothing in it keeps them apart)",
            "leave --packing out",
        )


def _depends_on_row_before(model: Any, collate: Any) -> bool:
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    rows = [Example(ids, list(ids)) for ids in ([i % vocabulary for i in r] for r in _TWO_ROWS)]
    first, both = len(rows[0].input_ids), sum(len(row.input_ids) for row in rows)
    (packed,) = pack(rows, both)
    item = {"input_ids": packed.input_ids, "labels": packed.labels, "position_ids": packed.position_ids}
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in collate([item, item]).items() if k != "labels"}
    embedded: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output if output.requires_grad else output.requires_grad_())
        return output

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(**batch, use_cache=False).logits[0, first:both]
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), embedded[0])
    finally:
        handle.remove()
    return bool(gradient[0, :first].any())
