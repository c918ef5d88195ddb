"""What decides the last bits of a result beside seed and data: kept with each checkpoint, restored or said.

The order in which a sum is taken depends on the number of threads on the CPU, and on the kernels that the
CPU, the card and the versions of the libraries bring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from executor.environment import describe

if TYPE_CHECKING:
    import torch

_NUMERIC = ("cpu", "instructions", "gpu", "cuda")
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
