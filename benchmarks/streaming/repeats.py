"""Is a model's decode the same from run to run? With cuDNN's attention, and without.

    python benchmarks/streaming/repeats.py

Qwen2.5-0.5B resident in bf16 with random weights: the same prompt of 2 x 300 tokens and eight decode steps,
six times over. Prints, for each round after the first, how many outputs of modules differ and the first of
them as (pass, module).
"""

from __future__ import annotations

from typing import Any

import equality  # sets cuBLAS' workspace before torch comes
import torch

from executor.engines import resident

ROUNDS, STEPS = 6, 8
WATCHED = ("self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "mlp", "input_layernorm")


def outputs(model: Any, ids: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """What every watched module gives in a prefill (pass 0) and the decode steps after it."""
    seen: dict[tuple[int, str], torch.Tensor] = {}
    number = 0

    def watch(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, out: Any) -> None:
            seen[number, name] = (out[0] if isinstance(out, tuple) else out).detach().clone()

        return hook

    watched = [(name, module) for name, module in model.named_modules() if name.endswith(WATCHED)]
    hooks = [module.register_forward_hook(watch(name)) for name, module in watched]
    with torch.no_grad():
        step = model(ids, use_cache=True)
        for at in range(STEPS):
            number = at + 1
            step = model(ids[:, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
    for hook in hooks:
        hook.remove()
    return seen


def main() -> None:
    """Print what differs."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1000, (2, 300), generator=draws).to(equality.DEVICE)
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        loaded = equality.load(resident, "qwen2.5-0.5b", "none", None)
        first = outputs(loaded.model, ids)
        for number in range(1, ROUNDS):
            again = outputs(loaded.model, ids)
            differ = [key for key, value in first.items() if not torch.equal(value, again[key])]
            print(f"cuDNN {cudnn}, round {number}: {len(differ)} differ, first {differ[:1]}", flush=True)
        loaded.close()


if __name__ == "__main__":
    main()
