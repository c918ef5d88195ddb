"""Soup's side of soup.py, in a process of its own: layer streaming as `soup train` drives it, under a cap.

    python benchmarks/streaming/soup_side.py CONFIG.yaml STEPS CAP_BYTES

CAP_BYTES: of the whole card, context included, set before Soup loads anything; 0: none. Prints a JSON line.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # after Soup's own packages

WARM_STEPS = 2
"""Not counted: kernels are chosen and loaded in them."""


def main() -> int:
    """Train; exit code 3 where Soup refuses or runs out of memory."""
    config, steps, cap = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # as `soup train` does before the card is touched
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.chdir(config.parent)  # it refuses outputs elsewhere
    from executor.card import Card

    card = Card()
    import torch

    on_card = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_card else torch.device("cpu")
    limit = None
    if on_card:
        from executor.vram_cap import VramCap

        card.open(device, torch.bfloat16, True)
        limit = VramCap(cap, card, device) if cap else None
    clock = Clock(steps, device)
    row: dict[str, Any] = {"steps": steps, "error": None}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            wrapper = prepare(config, device.type)
            if on_card:
                row["allocated_peak_of_setup_bytes"] = torch.cuda.max_memory_allocated()
                row["reserved_peak_of_setup_bytes"] = torch.cuda.max_memory_reserved()
                torch.cuda.reset_peak_memory_stats()
            wrapper.trainer.add_callback(clock.callback())
            wrapper.train()
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
    row |= clock.figures()
    if on_card:
        context = card.context_bytes() or 0
        row["allocated_peak_bytes"] = torch.cuda.max_memory_allocated()
        reserved = max(torch.cuda.max_memory_reserved(), row.get("reserved_peak_of_setup_bytes", 0))
        row["process_peak_bytes"] = reserved + context
        row["cap_kept"] = limit is None or row["process_peak_bytes"] <= cap
    print(json.dumps(row), flush=True)
    return 0 if row["error"] is None else 3


def prepare(config: Path, device: str) -> Any:
    """What the command does between reading the file and training: layers are quantized and packed here."""
    from soup_cli.config.loader import load_config
    from soup_cli.data.loader import load_dataset
    from soup_cli.trainer.sft import SFTTrainerWrapper

    asked = load_config(config)
    rows = load_dataset(asked.data)
    wrapper = SFTTrainerWrapper(asked, device=device)
    wrapper.setup(rows)
    return wrapper


class Clock:
    """When each step ended, and on how many tokens it was; ends the training after `steps`."""

    def __init__(self, steps: int, device: Any) -> None:
        self.steps, self.device = steps, device
        self.ends: list[float] = []
        self.losses: list[float] = []

    def callback(self) -> Any:
        """For transformers' Trainer."""
        import torch
        from transformers import TrainerCallback

        clock = self

        class OnStep(TrainerCallback):
            """Writes the time down."""

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
                """Once the card has done the step."""
                if clock.device.type == "cuda":
                    torch.cuda.synchronize()
                clock.ends.append(time.perf_counter())
                control.should_training_stop = len(clock.ends) >= clock.steps
                return control

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                """The loss of a step."""
                if logs and "loss" in logs:
                    clock.losses.append(float(logs["loss"]))

        return OnStep()

    def figures(self) -> dict[str, Any]:
        """Seconds of a step after the first ones; None where there were too few."""
        counted = len(self.ends) - WARM_STEPS
        seconds = (self.ends[-1] - self.ends[WARM_STEPS - 1]) / counted if counted > 0 else None
        return {"steps_done": len(self.ends), "seconds_per_step": seconds, "losses": self.losses}


if __name__ == "__main__":
    sys.exit(main())
