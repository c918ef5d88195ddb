"""Where the time of one decode step goes: the recorded step, its kernels, and attention by how it is called.

    python benchmarks/decode/step.py [PLAN ...]

Random weights in the real shapes of each plan's model, in bf16, on the first card. Prints a JSON line a plan.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, StaticCache

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from executor.decode_graph import CudaRecorder, DecodeGraph  # noqa: E402  found beside this folder
from executor.load import make_config  # noqa: E402

DEVICE = torch.device("cuda", 0)
PROMPT, NEW = 512, 128


def main() -> int:
    """Measure every plan named, or the two bf16 ones of this folder."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    names = sys.argv[1:] or [str(HERE / f"{model}-bf16-static.plan.json") for model in ("qwen05", "qwen7b")]
    for name in names:
        config = make_config(json.loads(Path(name).read_text())["model"]["config"])
        parts: dict[str, Callable[[Any], Any]] = {"attention": attention_variants, "step": step_times}
        row: dict[str, Any] = {"plan": Path(name).name, "torch": torch.__version__}
        for part, measure in parts.items():
            row[part] = _tried(lambda measure=measure, config=config: measure(config))
            torch.cuda.empty_cache()
        print(json.dumps(row), flush=True)
    return 0


def _tried(measure: Callable[[], Any]) -> Any:
    try:
        return measure()
    except Exception:  # one part that fails must not take the others with it
        return {"failed": traceback.format_exc()[-3000:]}


def step_times(config: Any) -> dict[str, Any]:
    """Seconds a token of `generate`, of a replay alone and of its kernels."""
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (1, PROMPT), device=DEVICE)
    mask, tokens = torch.ones_like(ids), PROMPT + NEW
    cache = StaticCache(config=config, max_cache_len=tokens)
    graph = DecodeGraph(model, cache, tokens, CudaRecorder(DEVICE))
    common = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "pad_token_id": 0}

    def generate(new: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.no_grad(), graph.attached(mask):
            model.generate(
                **common, past_key_values=cache, disable_compile=True, max_new_tokens=new, min_new_tokens=new
            )
        torch.cuda.synchronize()
        return time.perf_counter() - began

    first = generate(4)
    short, whole = generate(4), generate(NEW)
    found: dict[str, Any] = {
        "note": graph.note,
        "first_call_seconds": round(first, 3),
        "milliseconds_a_token": 1e3 * (whole - short) / (NEW - 4),
    }
    if graph._recording is None:
        return found
    cache.reset()
    found["milliseconds_a_replay"] = 1e3 * _seconds(graph._recording.replay, 50)
    found["kernels"] = _tried(lambda: _kernels(graph._recording.replay))
    return found


def _kernels(replay: Callable[[], None]) -> dict[str, Any]:
    """How many kernels a replay launches, their time, and the largest: name, count, milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    return {
        "count": sum(event.count for event in kernels),
        "milliseconds": sum(event.self_device_time_total for event in kernels) / 1e3,
        "largest": [[e.key[:70], e.count, round(e.self_device_time_total / 1e3, 3)] for e in kernels[:12]],
    }


def attention_variants(config: Any) -> dict[str, float]:
    """Microseconds of one layer's attention for one token over the whole static cache, recorded."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    width, groups, length = config.hidden_size // heads, heads // kv, PROMPT + NEW
    q = torch.randn(1, heads, 1, width, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(1, kv, length, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=DEVICE)

    def repeated() -> torch.Tensor:
        wide = [
            t[:, :, None].expand(1, kv, groups, length, width).reshape(1, heads, length, width)
            for t in (k, v)
        ]
        return scaled_dot_product_attention(q, *wide, attn_mask=mask)

    def packed() -> torch.Tensor:
        return scaled_dot_product_attention(q.view(1, kv, groups, width), k, v, attn_mask=mask)

    def plain() -> torch.Tensor:
        scores = (q.view(1, kv, groups, width) @ k.transpose(2, 3)) * width**-0.5
        return scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(v.dtype) @ v

    def unmasked() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    variants = {"repeated keys": repeated, "packed queries": packed, "products": plain, "no mask": unmasked}
    return {name: 1e6 * _recorded_seconds(call) for name, call in variants.items()}


def _recorded_seconds(call: Callable[[], Any]) -> float:
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(20):
                call()
        return _seconds(graph.replay, 20) / 20


def _seconds(call: Callable[[], Any], times: int) -> float:
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


if __name__ == "__main__":
    sys.exit(main())
