"""Experts in NF4 on the first card: memory of loading beside its prediction, stream beside resident.

    python benchmarks/streaming/experts.py [--model qwen3-30b-a3b] [--layers 6] [--load-only]

The first layers of a mixture in their real shapes, random weights. Prints a JSON line a case: bytes after
loading and at its peak, predicted and measured; logits of prefill and decode and adapter gradients, bit by
bit; seconds of a decode step. Exit code 1 if a comparison differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import equality  # noqa: E402
import torch  # noqa: E402

from executor.engines import LoadRequest, resident, stream  # noqa: E402
from executor.source import ModelSource  # noqa: E402
from planner.estimate import estimate  # noqa: E402
from planner.machine import machine_from_gpus  # noqa: E402
from planner.types import Candidate, Strategy, Workload  # noqa: E402
from profiles.catalogue import load_model, profile_from_config  # noqa: E402
from profiles.hardware import load_gpu  # noqa: E402

HOW = Strategy(quant="nf4", quant_experts="nf4")
JOB = Workload(task="infer", prompt_tokens=300, new_tokens=16)


def main() -> int:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--load-only", action="store_true")
    given = parser.parse_args()
    config = {**load_model(given.model).config, "num_hidden_layers": given.layers}
    profile = profile_from_config(config, given.model)

    def request(_model: str, _quant: str, kept: int | None, job: Workload, _outside: Any = ()) -> LoadRequest:
        answer = estimate(profile, machine_from_gpus([(load_gpu("h200"), 1)]), job, HOW)
        candidate = Candidate(
            rank=1, strategy=HOW, engine="stream", device_map={"": 0}, estimate=answer, speed=answer.speed
        )
        source = ModelSource(None, dict(profile.config))
        return LoadRequest(
            source=source,
            candidate=candidate,
            workload=job,
            device=equality.DEVICE,
            scratch=Path("nowhere"),
            seed=3,
            resident_layers=kept,
        )

    equality.request = request  # its comparisons, of this model
    loading(request)
    if given.load_only:
        return 0
    torch.use_deterministic_algorithms(True, warn_only=True)
    want, differ = equality.logits(equality.load(resident, "", "nf4", None)), 0
    for kept in (0, given.layers // 2):
        got = equality.logits(equality.load(stream, "", "nf4", kept))
        differ += equality.report("logits", "nf4+experts", kept, want, got)
    for mode in equality.MODES:
        want, got = (equality.gradients(e, "", "nf4", k, mode) for e, k in ((resident, None), (stream, 0)))
        differ += equality.report(f"gradients, checkpointing {mode}", "nf4+experts", 0, want, got)
    return int(differ > 0)


def loading(request: Any) -> None:
    """Bytes on the card after and while loading, and seconds of a decode step, resident."""
    asked = request("", "nf4", None, JOB)
    (predicted,) = asked.candidate.estimate.gpus
    torch.zeros(1, device=equality.DEVICE)
    torch.cuda.reset_peak_memory_stats()
    loaded = resident.load(asked)
    torch.cuda.synchronize()
    measured = {"load_bytes": torch.cuda.memory_allocated(), "load_peak": torch.cuda.max_memory_allocated()}
    said = {"load_bytes": predicted.load_bytes, "load_peak": predicted.moments["load"]}
    row = {
        name: {
            "predicted": said[name],
            "measured": value,
            "error": round(said[name] / value - 1, 4),
        }
        for name, value in measured.items()
    }
    print(json.dumps({"case": "loading", **row, "decode_seconds": decode_seconds(loaded.model)}), flush=True)
    equality._close(loaded)


def decode_seconds(model: Any) -> float:
    """Of one step after a short prompt, batch 1; median of 10."""
    ids = torch.arange(16, device=equality.DEVICE)[None]
    seconds = []
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        for _ in range(10):
            torch.cuda.synchronize()
            began = time.perf_counter()
            past = model(ids[:, :1], past_key_values=past, use_cache=True).past_key_values
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return round(sorted(seconds)[5], 5)


if __name__ == "__main__":
    sys.exit(main())
