"""Telling prefill from decode in the passes and the time that one call of `generate` takes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from executor.measure import find_decoder

if TYPE_CHECKING:
    import torch


class PassClock:
    """Seconds of the passes over the prompt of a `generate` call with the sampling after them, and of all
    later ones."""

    def __init__(self, model: Any) -> None:
        self.prefill_seconds = self.decode_seconds = 0.0
        self._began = self._decode = 0.0
        self._passes, self._over_prompt = 0, 1
        self._handle = find_decoder(model).register_forward_pre_hook(self.count)

    def start(self, over_prompt: int = 1) -> None:
        """A call of `generate` begins, whose first `over_prompt` passes read the prompt."""
        self._passes, self._over_prompt, self._began = 0, over_prompt, time.monotonic()

    @property
    def in_prompt(self) -> bool:
        """Whether the pass that has begun last is one over the prompt."""
        return self._passes <= self._over_prompt

    def stop(self, device: torch.device) -> None:
        """It has ended."""
        import torch

        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = time.monotonic()
        if self._passes <= self._over_prompt:
            self._decode = end
        self.prefill_seconds, self.decode_seconds = self._decode - self._began, end - self._decode
        self._passes = 0

    def so_far(self) -> tuple[int, float]:
        """Decode passes of the call in work and seconds since the first of them began; asked by the live
        view's thread."""
        if self.in_prompt:
            return 0, 0.0
        return self._passes - self._over_prompt, time.monotonic() - self._decode

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()

    def count(self, *_: Any) -> None:
        """A pass begins. Called by a hook of the model, and before a recorded pass is replayed."""
        self._passes += 1
        # generate has read the first token back by now, so the card has finished the prompt
        if self._passes == self._over_prompt + 1:
            self._decode = time.monotonic()
