"""What a pass over more tokens costs, and what speculation makes of it, at acceptances chosen beforehand.

    python benchmarks/streaming/speculation.py PLAN [--cap SIZE] [--new-tokens N]

PLAN is rehearsed up to its loaded model: random weights in the real shapes, under the cap and with the
residency of the plan, which should be one with `--speculate lookup`. Then, in this process:

1. passes over 1 to 64 tokens after the prompt, over the same cache: the median of three each;
2. greedy generation of N tokens without speculation;
3. the same with drafts of which a share of 0, 0.5 and 0.8 is right, drawn by a seed.

Shares are forced: a logits processor makes the model say a text drawn beforehand (in both 2 and 3), and the
drafter knows it and spoils tokens. Without that, random weights decide by rounding, and passes of other
lengths round otherwise. Everything else is what `executor run --speculate lookup` does: the checking, the
choice of lengths, the cache. One JSON line is appended to speculation.jsonl and printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from transformers import DynamicCache, LogitsProcessor  # noqa: E402

import executor.attempt  # noqa: E402
from executor.cli import main as executor_main  # noqa: E402
from executor.pass_clock import PassClock  # noqa: E402
from executor.passes import Generated, Generation  # noqa: E402
from executor.speculation.assisted import SETTINGS, Speculation  # noqa: E402
from executor.speculation.length import DraftLength  # noqa: E402

LENGTHS = (1, 2, 4, 5, 8, 16, 17, 32, 64)
"""On an H200, bitsandbytes 0.50 leaves its fused kernel for dequantizing after 7, 16 or 64 tokens, by the
shape of a 70B's matrix (backends/cuda/ops.py)."""
SHARES = (0.0, 0.5, 0.8)
REPEATS = 3


def main() -> int:
    """Measure; the exit code of the rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--cap", help="--vram-cap (default: the memory the plan is for; none on the CPU)")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--results", type=Path, default=HERE / "speculation.jsonl")
    args = parser.parse_args()
    plan = json.loads(args.plan.read_text())
    gpus = plan["candidates"][0]["estimate"]["gpus"]
    size = args.cap or (f"{gpus[0]['budget_bytes'] // 2**20}MiB" if gpus else None)
    cap = ["--vram-cap", size] if size else []
    measured: dict[str, Any] = {}

    def instead(job: Generation) -> Generated:
        measured.update(measure(job, args.new_tokens))
        return Generated(prompts=1, largest_batch=1, most_new_tokens=args.new_tokens)

    executor.attempt.generate = instead
    with tempfile.TemporaryDirectory() as folder:
        code = executor_main(["rehearse", str(args.plan), "--candidate", "1", *cap, "--output", folder])
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    row = {"plan": args.plan.name, "plan_digest": plan["digest"], "cap": size, "date": date, **measured}
    with open(args.results, "a") as f:
        f.write(json.dumps(row, sort_keys=True) + "\n")
    print(json.dumps(row))
    return code


def measure(job: Generation, new: int) -> dict[str, Any]:
    """All figures of one loaded model."""
    model = job.loaded.model
    vocabulary = model.config.get_text_config().vocab_size
    draw = random.Random(job.options.seed)
    text = [draw.randrange(vocabulary) for _ in range(job.workload.prompt_tokens + new)]
    ids = torch.tensor([text[: job.workload.prompt_tokens]], device=job.device)
    passes = pass_seconds(model, ids, text)
    _generate(job, ids, text, 4, None)  # kernels are loaded at their first use
    plain, _ = _generate(job, ids, text, new, None)
    forced = {}
    for share in SHARES:
        rate, counts = _generate(job, ids, text, new, share)
        forced[str(share)] = {"tokens_per_s": rate, "times_plain": rate / plain, **counts}
    return {
        "layers_resident": job.loaded.layers_resident,
        "layers_streamed": job.loaded.layers_streamed,
        "pass_seconds": passes,
        "pass_64_over_1": passes["64"] / passes["1"],
        "plain_tokens_per_s": plain,
        "forced": forced,
        "traffic": job.loaded.traffic(),
    }


def pass_seconds(model: Any, ids: Any, text: Sequence[int]) -> dict[str, float]:
    """Seconds of a pass by its tokens; before each, the cache is what it was after the prompt."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.activate_past_recording()
    found: dict[str, float] = {}
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for length in LENGTHS:
            tokens = torch.tensor([list(text[:length])], device=ids.device)
            seconds = []
            for _ in range(REPEATS + 1):  # the first loads kernels
                _settle(ids.device)
                began = time.perf_counter()
                model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=length)
                _settle(ids.device)
                seconds.append(time.perf_counter() - began)
                cache.crop(-length)
            found[str(length)] = statistics.median(seconds[1:])
    return found


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _generate(
    job: Generation, ids: Any, text: Sequence[int], new: int, share: float | None
) -> tuple[float, dict[str, Any]]:
    """Decoded tokens a second, and what became of the drafts."""
    model = job.loaded.model
    speculation = None if share is None else Speculation(model, lambda: (Forced(text, share), DraftLength()))
    clock = PassClock(model)
    clock.start()
    with torch.no_grad(), speculation.attached() if speculation else nullcontext():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=0,
            eos_token_id=None,
            logits_processor=[Says(text)],
            **(SETTINGS if speculation else {}),
        )
    clock.stop(job.device)
    clock.remove()
    assert out[0].tolist() == list(text[: out.shape[1]]) and out.shape[1] == ids.shape[1] + new
    rate = (new - 1) / clock.decode_seconds
    if speculation is None:
        return rate, {}
    counts = speculation.counts
    return rate, {
        "drafted": counts.drafted,
        "accepted": counts.accepted,
        "passes": counts.passes,
        "tokens_per_pass": counts.tokens_per_pass,
    }


class Says(LogitsProcessor):
    """Makes the model say a text."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores, B x V, with the next token of the text far above all others."""
        # a pass may be asked one token beyond the end
        scores[:, self._text[min(input_ids.shape[1], len(self._text) - 1)]] = torch.finfo(scores.dtype).max
        return scores


class Forced:
    """Drafts a known text of which a share is right, the same tokens in every run."""

    def __init__(self, text: Sequence[int], share: float) -> None:
        right = [n < share * len(text) for n in range(len(text))]
        random.Random(7).shuffle(right)
        self._text = [token if good else token ^ 1 for token, good in zip(text, right, strict=True)]

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """What comes after `tokens`, as far as it is known."""
        return self._text[len(tokens) : len(tokens) + most]


if __name__ == "__main__":
    sys.exit(main())
