"""accelerate's offload hooks of a loaded model: where they keep the weights, and what they move.

Every offloaded module that has tensors of its own carries an `AlignDevicesHook` with `offload` set; all read
from one `OffloadedWeightsLoader`, which holds tensors in RAM (`state_dict`) and says where others stand on
disk (`index`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def offloading(model: Any) -> Iterator[tuple[Any, Any]]:
    """Every offloaded module with tensors of its own, and its hook."""
    for module in model.modules():
        outer = getattr(module, "_hf_hook", None)
        for hook in getattr(outer, "hooks", (outer,)):
            if getattr(hook, "offload", False):
                yield module, hook


def prepare(model: Any, device: torch.device, mapped: bool) -> None:
    """Make the loader's store fit to run from.

    `mapped`: tensors in RAM may be views of a mapped safetensors file, which the system may drop and read
    again from disk in any pass; they become this process's own. A tied weight on disk is found under both
    its names.
    """
    hooks = [hook for _, hook in offloading(model)]
    if not hooks:
        return
    store = hooks[0].weights_map.dataset
    store.device = str(device)
    own: dict[int, Any] = {}
    for name, tensor in store.state_dict.items() if mapped else ():
        if tensor.device.type == "cpu":
            address = tensor.data_ptr()
            if address not in own:
                own[address] = tensor.clone()
            store.state_dict[name] = own[address]
    for target, origin in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if origin in store.index:
            store.index.setdefault(target, store.index[origin])


class Traffic:
    """Counts the bytes that the hooks bring to the card, and the time they take for it."""

    def __init__(self, model: Any) -> None:
        self.bytes = 0
        self.seconds = 0.0
        for module, hook in offloading(model):
            moved = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
            hook.pre_forward = self._timed(hook.pre_forward, moved)

    def _timed(self, fetch: Any, moved: int) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            # the copy is from pageable memory or a mapped file, so it is over when the call returns
            began = time.perf_counter()
            result = fetch(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            self.bytes += moved
            return result

        return timed

    def read(self) -> dict[str, Any]:
        """As the report names them."""
        rate = self.bytes / self.seconds if self.seconds > 0 and self.bytes else None
        return {"bytes_streamed": self.bytes, "link_bytes_per_s": rate}
