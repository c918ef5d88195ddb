"""A small real task under engine resident and engine stream: the loss of every step must be the same number.

    python benchmarks/streaming/loss_curve.py [--steps 60] [--quant nf4] [--cpu]

The conversations that come with the package, through `executor run` as a user would: a byte-level model of
eight layers that is first taught to spell, then adapters over bf16, NF4 and LLM.int8, deterministic kernels,
no layer resident under engine stream. All runs are started at once. Prints a JSON line a precision, with the
curve; exit code 1 unless all losses and the adapters are equal and the loss has fallen by a tenth. `--cpu`:
on the CPU, one after the other, with a narrower model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import runs  # noqa: E402  found beside this file

QUANTS = ("none", "nf4", "int8")
ENGINES = {"resident": [], "stream": ["--resident-layers", 0]}
LAYERS = 8
SPELLING_STEPS = 100


def main() -> int:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--quant", nargs="+", choices=QUANTS, default=QUANTS)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teach_to_spell(folder / "model", *((128, "cpu") if args.cpu else (512, "cuda")))
        ended = train(folder, args.quant, args.steps, args.cpu)
    failed = 0
    for quant in args.quant:
        row = compare(quant, ended[quant, "resident"], ended[quant, "stream"], args.steps)
        print(json.dumps({**row, "seconds_of_all": round(time.monotonic() - began, 1)}), flush=True)
        failed += not row["passed"]
    return int(failed > 0)


def teach_to_spell(folder: Path, hidden: int, device: str) -> None:
    """A byte-level model that has seen the letters of the text: on random ones, adapters learn nothing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from executor.tiny import write_tiny_model

    write_tiny_model(folder, layers=LAYERS, hidden=hidden)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    text = torch.tensor(AutoTokenizer.from_pretrained(folder)(runs.TEXT.read_text())["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draws = torch.Generator().manual_seed(0)
    for _ in range(SPELLING_STEPS):
        starts = torch.randint(0, len(text) - 128, (8,), generator=draws).tolist()
        ids = torch.stack([text[at : at + 128] for at in starts]).to(device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)


def train(
    folder: Path, quants: Sequence[str], steps: int, cpu: bool
) -> dict[tuple[str, str], dict[str, Any]]:
    """What every run leaves, by precision and engine."""
    job = ["--seq-len", 256, "--batch-size", 8, "--placement", "cpu" if cpu else "full_gpu"]
    options = ["--max-steps", steps, "--epochs", 100, "--learning-rate", 2e-3, "--lr-schedule", "cosine"]
    started, ended = {}, {}
    for quant in quants:
        method = ["--method", "lora" if quant == "none" else "qlora", "--quant", quant]
        runs.make_plan(folder / "model", folder / f"{quant}.json", [*job, *method])
    for quant, engine in itertools.product(quants, ENGINES):
        output = folder / f"{quant}-{engine}"
        chosen = [*options, "--engine", engine, *ENGINES[engine]]
        process = started[quant, engine] = runs.start(folder / f"{quant}.json", output, chosen)
        if cpu:
            process.wait()
    for (quant, engine), process in started.items():
        ended[quant, engine] = runs.finish(process, folder / f"{quant}-{engine}")
    return ended


def compare(quant: str, want: dict[str, Any], got: dict[str, Any], steps: int) -> dict[str, Any]:
    """The two curves of a precision."""
    left, right = want["losses"] or [], got["losses"] or []
    differing = [step for step, pair in enumerate(zip(left, right, strict=False), 1) if len(set(pair)) > 1]
    whole = len(left) == len(right) == steps and all(map(math.isfinite, left))
    fell = whole and sum(left[-5:]) < 0.9 * sum(left[:5])
    as_asked = (want["engine"], got["engine"], got["layers_streamed"]) == ("resident", "stream", LAYERS)
    same_adapter = want["adapter"] == got["adapter"] is not None
    return {
        "quant": quant,
        "steps": steps,
        "layers_streamed": got["layers_streamed"],
        "slots": got["slots"],
        "losses_equal": whole and not differing,
        "first_differing_step": differing[0] if differing else None,
        "adapters_equal": same_adapter,
        "fell": fell,
        "errors": [each["error"] for each in (want, got) if each["error"]],
        "passed": whole and not differing and same_adapter and fell and as_asked,
        "losses": left,
    }


if __name__ == "__main__":
    sys.exit(main())
