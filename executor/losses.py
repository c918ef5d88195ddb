"""Cross-entropy in chunks, so that the logits of a whole batch never exist at once (`loss: fused`).

The full loss keeps about three fp32 copies of tokens x vocabulary; this one keeps those of `CHUNK` tokens and
computes a chunk's logits again in backward. transformers' own forward stays in charge: its output
projection hands the hidden states through, and its loss function, replaced here, projects them chunk by
chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from executor.errors import CannotHonour

if TYPE_CHECKING:
    import torch

CHUNK = 512
"""Tokens whose logits exist at once."""


@contextmanager
def chunked_loss(model: Any) -> Iterator[None]:
    """Within, the causal language model `model` (adapters allowed) computes its training loss in chunks.

    Errors: `CannotHonour` for a model without an output projection to work on.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings()
    if head is None:
        raise CannotHonour(
            "this model has no output projection for the fused loss", "plan with `--loss full`"
        )
    text = inner.config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    patched = head.__dict__.get("forward")
    project = head.forward
    previous = inner.loss_function

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        return chunked_cross_entropy(logits, labels, project, softcap, kwargs.get("num_items_in_batch"))

    # capping is not linear: it must act on the logits of a chunk, not on the hidden states passed through
    if softcap is not None:
        text.final_logit_softcapping = None
    head.forward = lambda hidden: hidden
    inner.loss_function = loss
    try:
        yield
    finally:
        if patched is None:
            del head.forward
        else:
            head.forward = patched
        inner.loss_function = previous
        if softcap is not None:
            text.final_logit_softcapping = softcap


def chunked_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    project: Any,
    softcap: float | None,
    items: torch.Tensor | int | None,
) -> torch.Tensor:
    """Sum of next-token losses over `items` (by default the learned tokens).

    Shapes: hidden B x S x H, labels B x S with -100 for what is not learned.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = labels[:, 1:].reshape(-1)

    def part(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = project(states).float()
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, flat.shape[0], CHUNK):
        chunk = slice(start, start + CHUNK)
        total = total + checkpoint(part, flat[chunk], targets[chunk], use_reentrant=False)
    if items is None:
        items = (targets != -100).sum().clamp(min=1)
    return total / (items.to(total.device) if torch.is_tensor(items) else items)
