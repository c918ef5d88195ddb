"""What decides the last bits of a result beside seed and data: kept with each checkpoint, restored or said.

The order in which a sum is taken depends on the number of threads on the CPU, and on the kernels that the
CPU, the card and the versions of the libraries bring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from executor.environment import describe

if TYPE_CHECKING:
    import torch

_NUMERIC = ("cpu", "instructions", "gpu", "cuda")
_SAMPLED = 64
"""Values of each tensor that stand for all of it: other weights of the same shapes differ everywhere."""
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "liger-kernel", "triton")


def numerics(device: torch.device) -> dict[str, Any]:
    """Threads, device, instruction set and versions, as they are now."""
    import torch

    return {**describe(device), "instructions": torch.backends.cpu.get_cpu_capability()}


def go_on_as(before: dict[str, Any], device: torch.device) -> list[str]:
    """Compute as a run began with `before` did: take its number of threads; returns what else is different,
    in one line or none."""
    import torch

    threads = before.get("threads")
    if device.type == "cpu" and isinstance(threads, int) and threads > 0:
        torch.set_num_threads(threads)
    now = numerics(device)
    then, here = before.get("libraries") or {}, now["libraries"]
    changes = [
        f"{n} {then[n]} → {here.get(n, 'none')}" for n in _LIBRARIES if n in then and then[n] != here.get(n)
    ]
    changes += [
        f"{n} {before[n]} → {now.get(n)}" for n in _NUMERIC if n in before and before[n] != now.get(n)
    ]
    if not changes:
        return []
    return [f"resumed under other conditions ({', '.join(changes)}): the last bits may be others"]


def mark_of(frozen: Iterable[torch.Tensor]) -> dict[str, str] | None:
    """A fingerprint of weights that no checkpoint holds, and how they are stored; None where there are none.

    A few values of every tensor, so a model of any size takes less than a second.
    """
    import torch

    digest, kinds = hashlib.sha256(), set()
    for tensor in frozen:
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].contiguous()
        digest.update(values.view(torch.uint8).cpu().numpy().tobytes())
        kinds.add(f"{tensor.device.type} {tensor.dtype}")
    return {"stored": ", ".join(sorted(kinds)), "sha256": digest.hexdigest()} if kinds else None


def other_weights(before: object, now: dict[str, str] | None) -> list[str]:
    """What to say when a run goes on over other frozen weights than it began with, in one line or none.

    Weights that are stored in another way (another candidate) cannot be compared.
    """
    if not isinstance(before, dict) or now is None or before.get("stored") != now["stored"]:
        return []
    if before.get("sha256") == now["sha256"]:
        return []
    return [
        "resumed over other frozen weights than the run began with: the result is not that of an unbroken "
        "run (--restart begins again)"
    ]
