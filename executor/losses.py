"""The loss in chunks on the model that is trained; the loss itself is the tracer's (`loss: fused`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from executor.errors import CannotHonour
from planner.exact import chunked_loss as chunks


@contextmanager
def chunked_loss(model: Any) -> Iterator[None]:
    """Within, the causal language model `model` (adapters allowed) computes its training loss in chunks.

    Errors: `CannotHonour` for a model without an output projection to work on.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if inner.get_output_embeddings() is None:
        raise CannotHonour(
            "this model has no output projection for the fused loss", "plan with `--loss full`"
        )
    with chunks.chunked_loss(inner):
        yield
