"""Cross-entropy in chunks, so that the logits of a whole batch never exist at once (`loss: fused`).

The executor trains with it and the tracer follows it: what is predicted is what runs. The full loss keeps
about three fp32 copies of tokens x vocabulary; this one keeps those of `CHUNK` tokens and computes a chunk's
logits again in backward. transformers' own forward stays in charge: its output projection hands the hidden
states through, and its loss function, replaced here, projects them chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from planner.memory.head import CHUNK

IGNORED = -100
"""The label of a token that is not learned; transformers' own cross-entropy ignores it too."""


@contextmanager
def chunked_loss(model: Any, **recomputing: Any) -> Iterator[None]:
    """Within, the causal language model `model` (no adapters around it) computes its training loss in chunks.

    It needs an output projection: `model.get_output_embeddings()` is not None. `recomputing`: what torch's
    `checkpoint` is asked for besides.
    """
    head = model.get_output_embeddings()
    text = model.config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    patched = head.__dict__.get("forward")
    project, previous = head.forward, model.loss_function

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        items = kwargs.get("num_items_in_batch")
        return _chunked_cross_entropy(logits, labels, project, softcap, items, recomputing)

    # capping is not linear: it must act on the logits of a chunk, not on the hidden states passed through
    if softcap is not None:
        text.final_logit_softcapping = None
    head.forward = lambda hidden: hidden
    model.loss_function = loss
    try:
        yield
    finally:
        if patched is None:
            del head.forward
        else:
            head.forward = patched
        model.loss_function = previous
        if softcap is not None:
            text.final_logit_softcapping = softcap


def _chunked_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    project: Callable[[torch.Tensor], torch.Tensor],
    softcap: float | None,
    items: torch.Tensor | int | None,
    recomputing: dict[str, Any],
) -> torch.Tensor:
    """Sum of next-token losses over `items` (by default the learned tokens), a float32 scalar.

    Shapes: hidden B x S x D, labels B x S with -100 for what is not learned.
    """
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = labels[:, 1:].reshape(-1)

    def part(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = project(states).float()
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, flat.shape[0], CHUNK):
        chunk = slice(start, start + CHUNK)
        total = total + checkpoint(part, flat[chunk], targets[chunk], use_reentrant=False, **recomputing)
    if items is None:
        items = (targets != IGNORED).sum().clamp(min=1)
    return total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)
