"""Engine stream beside engine resident on the first card: logits and gradients, bit by bit.

    python benchmarks/streaming/equality.py [--model qwen2.5-0.5b]

Random weights in the real shapes. Every precision, no and half of the layers resident, prefill and decode;
gradients of LoRA adapters without checkpointing, reentrant and non-reentrant. Prints a JSON line a case; exit
code 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402  after the workspace is set

from executor.engines import LoadRequest, resident, stream  # noqa: E402
from executor.source import ModelSource  # noqa: E402
from planner.estimate import estimate  # noqa: E402
from planner.exact.adapters import add_adapters  # noqa: E402
from planner.machine import machine_from_gpus  # noqa: E402
from planner.types import Candidate, Quant, Strategy, Workload  # noqa: E402
from profiles.catalogue import load_model  # noqa: E402
from profiles.hardware import load_gpu  # noqa: E402

DEVICE = torch.device("cuda", 0)
QUANTS: tuple[Quant, ...] = ("none", "nf4", "int8")
MODES = ("none", "reentrant", "non-reentrant")


def main() -> int:
    """Compare everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b")
    model = parser.parse_args().model
    torch.use_deterministic_algorithms(True, warn_only=True)
    layers = load_model(model).config["num_hidden_layers"]
    differ = 0
    for quant in QUANTS:
        want = logits(load(resident, model, quant, None))
        for kept in (0, layers // 2):
            differ += report("logits", quant, kept, want, logits(load(stream, model, quant, kept)))
        for mode in MODES:
            want = gradients(resident, model, quant, None, mode)
            got = gradients(stream, model, quant, 0, mode)
            differ += report(f"gradients, checkpointing {mode}", quant, 0, want, got)
    return int(differ > 0)


def report(what: str, quant: str, kept: int, want: list[Any], got: list[Any]) -> bool:
    """Print one comparison; whether it differs."""
    equal = len(want) == len(got) and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    finite = all(bool(t.isfinite().all()) for t in want)
    row = {"case": what, "quant": quant, "resident_layers": kept, "tensors": len(want), "equal": equal}
    print(json.dumps({**row, "finite": finite}), flush=True)
    return not (equal and finite)


def request(model: str, quant: Quant, kept: int | None, job: Workload) -> LoadRequest:
    """To load random weights of `model` with `kept` resident layers."""
    profile, how = load_model(model), Strategy(quant=quant)
    answer = estimate(profile, machine_from_gpus([(load_gpu("h200"), 1)]), job, how)
    candidate = Candidate(
        rank=1, strategy=how, engine="stream", device_map={"": 0}, estimate=answer, speed=answer.speed
    )
    return LoadRequest(
        source=ModelSource(None, dict(profile.config)),
        candidate=candidate,
        workload=job,
        device=DEVICE,
        scratch=Path("nowhere"),
        seed=3,
        resident_layers=kept,
    )


def load(engine: Any, model: str, quant: Quant, kept: int | None) -> Any:
    """The loaded model of an engine for inference."""
    return engine.load(request(model, quant, kept, Workload(task="infer")))


def logits(loaded: Any) -> list[torch.Tensor]:
    """Of a prefill over 300 tokens and eight decode steps, twice over."""
    ids = torch.randint(0, 1000, (2, 300), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    seen = []
    with torch.no_grad():
        for _round in range(2):
            step = loaded.model(ids, use_cache=True)
            seen.append(step.logits[:, -1].cpu())
            for at in range(8):
                past = step.past_key_values
                step = loaded.model(ids[:, at : at + 1], past_key_values=past, use_cache=True)
                seen.append(step.logits[:, -1].cpu())
    _close(loaded)
    return seen


def gradients(engine: Any, name: str, quant: Quant, kept: int | None, mode: str) -> list[torch.Tensor]:
    """Loss and adapter gradients of two micro-batches of different lengths."""
    job = Workload(task="train", method="lora" if quant == "none" else "qlora", lora_dropout=0.0)
    asked = request(name, quant, kept, job)
    loaded = engine.load(asked)
    torch.manual_seed(0)
    model = add_adapters(loaded.model, job, asked.candidate.strategy).train()
    model.config.use_cache = False
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0.0, 0.05)
    if mode != "none":
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    if mode == "reentrant":
        model.enable_input_require_grads()
    draws = torch.Generator().manual_seed(4)
    seen = []
    for length in (256, 130):
        ids = torch.randint(0, 1000, (2, length), generator=draws).to(DEVICE)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        seen.append(loss.detach().cpu())
    seen += [p.grad.cpu() for p in model.parameters() if p.grad is not None]
    _close(loaded)
    return seen


def _close(loaded: Any) -> None:
    torch.cuda.synchronize()
    loaded.close()
    loaded.model = None
    torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
