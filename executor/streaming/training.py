"""What training does another way where layers stream, with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from executor.streaming.adapters import join_adapters, part_adapters
from executor.streaming.recompute import recomputing


@contextmanager
def lean(model: Any) -> Iterator[None]:
    """Within, training the peft model `model` leaves the host time to bring layers, and keeps less on the
    card: adapters are joined, checkpointing is that of `recompute`, and whoever says once more that the model
    trains does not walk through all its modules."""
    join_adapters(model)
    train, last = model.train, None  # peft's own module says that it trains before the others do

    def train_once(mode: bool = True) -> Any:
        nonlocal last
        if mode != last:
            train(mode)
            last = mode
        return model

    model.train = train_once
    try:
        with recomputing(model.get_base_model()):
            yield
    finally:
        del model.train
        part_adapters(model)
