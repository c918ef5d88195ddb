"""Telling prefill from decode in the time that one call of `generate` takes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from executor.measure import find_decoder

if TYPE_CHECKING:
    import torch


class PassClock:
    """Seconds of the first forward pass of a `generate` call with its sampling, and of all later ones."""

    def __init__(self, model: Any) -> None:
        self.prefill_seconds = self.decode_seconds = 0.0
        self._began = self._second = 0.0
        self._passes = 0
        self._handle = find_decoder(model).register_forward_pre_hook(self.count)

    def start(self) -> None:
        """A call of `generate` begins."""
        self._passes, self._began = 0, time.monotonic()

    def stop(self, device: torch.device) -> None:
        """It has ended."""
        import torch

        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = time.monotonic()
        if self._passes < 2:
            self._second = end
        self.prefill_seconds, self.decode_seconds = self._second - self._began, end - self._second
        self._passes = 0

    def so_far(self) -> tuple[int, float]:
        """Passes of the call in work and seconds since the second began; asked by the live view's thread."""
        return self._passes, time.monotonic() - self._second if self._passes > 1 else 0.0

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()

    def count(self, *_: Any) -> None:
        """A pass begins. Called by a hook of the model, and before a recorded pass is replayed."""
        self._passes += 1
        # generate has read the first token back by now, so the card has finished the first pass
        if self._passes == 2:
            self._second = time.monotonic()
