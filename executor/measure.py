"""Peaks of a run by moment, and the host's memory beside it.

A moment (forward, loss, backward, optimizer step, prefill, decode, ...) begins where a hook says so; the
allocator's peak is read and reset at each change, so the peak of the run is the maximum over its moments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SAMPLE_SECONDS = 0.05


class MomentMeter:
    """Allocator peaks by moment on one card; nothing on the CPU, whose allocator keeps no books."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: dict[str, int] = {}
        self.reserved_peak_bytes = 0
        self._now: str | None = None
        self._last: str | None = None
        self._on = device.type == "cuda"

    def enter(self, moment: str) -> None:
        """From here on it is `moment`."""
        if moment != self._now:
            self.leave()
            self._now = self._last = moment

    def leave(self) -> None:
        """Close the present moment: take its peak and start the next from what is allocated now."""
        if not self._on:
            return
        import torch

        if self._now is not None:
            peak = torch.cuda.max_memory_allocated(self.device)
            self.moments[self._now] = max(peak, self.moments.get(self._now, 0))
            self.reserved_peak_bytes = max(
                self.reserved_peak_bytes, torch.cuda.max_memory_reserved(self.device)
            )
        torch.cuda.reset_peak_memory_stats(self.device)
        self._now = None

    @property
    def current(self) -> str | None:
        """The moment the run is in or was in last, for the message of an out-of-memory error."""
        return self._last

    def peak_bytes(self, without: tuple[str, ...] = ("load",)) -> int | None:
        """Maximum over the moments after loading; None where nothing is measured."""
        values = [peak for moment, peak in self.moments.items() if moment not in without]
        return max(values, default=None) if self._on else None


def watch_training(model: Any, meter: MomentMeter) -> Callable[[], None]:
    """Mark forward, loss and backward of every training pass of `model`; returns what removes the hooks.

    The loss moment runs from the end of the last decoder layer until the gradient has come back to there,
    so it holds the logits, the loss and their gradients, whichever loss is used.
    """
    decoder = find_decoder(model)

    def begin(*_: Any) -> None:
        meter.enter("forward")

    def end(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0]
        meter.enter("loss")
        if hidden.requires_grad:
            hidden.register_hook(lambda _gradient: meter.enter("backward"))

    handles = [decoder.register_forward_pre_hook(begin), decoder.register_forward_hook(end)]
    return lambda: [handle.remove() for handle in handles] and None


def watch_generation(model: Any, meter: MomentMeter, in_prompt: Callable[[], bool]) -> Callable[[], None]:
    """Mark prefill (passes over the prompt) and decode (all others); `in_prompt` tells them apart."""

    def begin(*_: Any) -> None:
        meter.enter("prefill" if in_prompt() else "decode")

    return find_decoder(model).register_forward_pre_hook(begin).remove  # type: ignore[no-any-return]


def find_decoder(model: Any) -> Any:
    """The stack of decoder layers with its final norm, below adapters and the output projection."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    get_decoder = getattr(inner, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    return decoder if decoder is not None else inner.base_model


class HostSampler:
    """Peak of this process's own RAM (RssAnon + RssShmem: no page cache, no mapped files)."""

    def __init__(self) -> None:
        self.peak_bytes = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="host-memory", daemon=True)
        self._thread.start()

    def stop(self) -> int | None:
        """End sampling; the peak in bytes, None where the system does not tell."""
        self._stop.set()
        self._thread.join()
        self._take()
        return self.peak_bytes

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._take()

    def _take(self) -> None:
        now = resident_bytes()
        if now is not None:
            self.peak_bytes = max(now, self.peak_bytes or 0)


def resident_bytes() -> int | None:
    """RssAnon + RssShmem of this process now; None outside Linux."""
    try:
        with open("/proc/self/status") as f:
            fields = dict(line.split(":", 1) for line in f)
        return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024
    except (OSError, KeyError, ValueError):
        return None


def held_bytes(model: Any) -> dict[str, int]:
    """Bytes of the lines of an estimate that can be read off a model in training, by the lines' names."""
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad for p in trained if p.grad is not None]
    found = {"adapters": tensor_bytes(trained), "gradients": tensor_bytes(grads)}
    return {name: n for name, n in found.items() if n}


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
