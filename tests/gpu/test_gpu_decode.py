"""Recorded decode steps on a real card: the same tokens as without, and a way out where it cannot be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.executor]
TOKENS, NEW = 64, 32


def model_of(kind: str = "qwen2", dtype: str = "float32", quant: str = "none", **more: Any) -> Any:
    """A small model with random weights on the card."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    config = AutoConfig.for_model(
        kind, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, head_dim=64,
        num_key_value_heads=2, vocab_size=512, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        initializer_range=0.2, tie_word_embeddings=False, **more,  # others repeat one token
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if quant == "none":
        return model.to("cuda").eval()
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how: dict[str, Any] = {"nf4": four, "int8": {"load_in_8bit": True}}[quant]
    how["bnb_4bit_compute_dtype"] = getattr(torch, dtype)
    state = dict(model.state_dict())
    loaded = type(model).from_pretrained(
        None, config=config, state_dict=state, dtype=getattr(torch, dtype), device_map={"": "cuda:0"},
        quantization_config=BitsAndBytesConfig(**how),
    )  # fmt: skip
    return loaded.eval()


def batch(rows: int, width: int, padding: int) -> dict[str, Any]:
    """Random prompts on the card, the first with padding on its left."""
    import torch

    ids = torch.randint(2, 500, (rows, width), generator=torch.Generator().manual_seed(width)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def graph_of(model: Any) -> Any:
    """A graph over a new static cache."""
    import torch
    from transformers import StaticCache

    from executor.decode_graph import CudaRecorder, DecodeGraph

    cache = StaticCache(config=model.config, max_cache_len=TOKENS)
    return DecodeGraph(model, cache, TOKENS, CudaRecorder(torch.device("cuda", 0)))


def replayed(model: Any, graph: Any, inputs: dict[str, Any]) -> list[list[int]]:
    """Tokens by way of the graph."""
    import torch

    with torch.no_grad(), graph.attached(inputs["attention_mask"]):
        made = model.generate(**inputs, past_key_values=graph.cache, disable_compile=True, **GREEDY)
    return list(made.tolist())


def eager(model: Any, inputs: dict[str, Any], static: bool = False) -> list[list[int]]:
    """Tokens of `generate` as transformers makes them, uncompiled."""
    import torch
    from transformers import StaticCache

    more: dict[str, Any] = {}
    if static:
        cache = StaticCache(config=model.config, max_cache_len=TOKENS)
        more = {"past_key_values": cache, "disable_compile": True}
    with torch.no_grad():
        return list(model.generate(**inputs, **more, **GREEDY).tolist())


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "qwen3_moe"])
def test_replayed_tokens_are_those_of_the_dynamic_cache(kind: str) -> None:
    model = model_of(kind)
    graph = graph_of(model)
    for rows, width, padding in ((2, 12, 3), (2, 20, 0), (2, 9, 5)):
        inputs = batch(rows, width, padding)
        expected = eager(model, inputs)
        assert replayed(model, graph, inputs) == expected and len(set(expected[0][width:])) > 8
    print(kind, graph.note)
    if kind != "qwen3_moe":  # experts may decide on the host
        # three prefills, one or two steps that are listened to, and the recording itself are not replays
        assert 3 * NEW - 3 - 3 <= graph.replays <= 3 * NEW - 3 - 2, graph.note
        assert graph._recording.pool_bytes < 64 * 2**20, graph.note


@pytest.mark.parametrize(("quant", "rows"), [("none", 1), ("none", 4), ("nf4", 1), ("nf4", 4)])
def test_replayed_bf16_tokens_are_those_of_the_eager_static_cache(quant: str, rows: int) -> None:
    model = model_of(dtype="bfloat16", quant=quant)
    graph, inputs = graph_of(model), batch(rows, 16, 0)
    assert replayed(model, graph, inputs) == eager(model, inputs, static=True)
    assert graph.replays == NEW - 3, graph.note


def test_int8_reads_on_the_host_and_is_heard() -> None:
    model = model_of(dtype="float16", quant="int8")
    graph, inputs = graph_of(model), batch(1, 16, 0)
    made = replayed(model, graph, inputs)
    print("int8", graph.note)
    assert made == eager(model, inputs, static=True)


def test_host_reads_and_failed_recordings_leave_a_card_that_works() -> None:
    import torch

    model = model_of()
    inputs = batch(2, 12, 2)
    expected = eager(model, inputs)
    graph = graph_of(model)
    reads = model.model.layers[1].register_forward_hook(lambda _m, _i, out: (out[0].sum().item(), None)[1])
    assert replayed(model, graph, inputs) == expected and "reads from the card" in graph.note, graph.note
    deaf = graph_of(model)
    deaf._quiet = True
    deaf._start_over = lambda shape: setattr(deaf, "_recorded_shape", shape)  # what it heard is forgotten
    assert replayed(model, deaf, inputs) == expected and "recording failed" in deaf.note, deaf.note
    reads.remove()
    torch.cuda.empty_cache()
    fresh = graph_of(model)
    assert replayed(model, fresh, inputs) == expected and fresh.replays > 0, fresh.note


@pytest.mark.parametrize("cache", ["static", "offloaded", "quantized"])
def test_caches_from_plan_to_report(tmp_path: Path, cache: str) -> None:
    from executor.tiny import write_tiny_model

    write_tiny_model(tmp_path / "tiny")
    plan = tmp_path / "plan.json"
    job = ("--prompt-tokens", 64, "--new-tokens", 32, "--batch-size", 2)
    way = ("--quant", "none", "--dtype", "fp32", "--placement", "full_gpu", "--cache", cache)
    command("planner", "plan", tmp_path / "tiny", "--gpu", "h200", *job, *way, "-o", plan)
    prompts = [x for text in ("one", "a second one", "three") for x in ("--prompt", text)]
    done = command("executor", "run", plan, *prompts, "--greedy", "--output", tmp_path / "o", "--json")
    report = json.loads(done.stdout)
    print(cache, report["decode_tokens_per_s"], report["notes"])
    assert any("replayed from a CUDA graph" in note for note in report["notes"]) == (cache == "static")
    rows = [json.loads(line) for line in (tmp_path / "o" / "outputs.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]


def command(module: str, *args: Any) -> subprocess.CompletedProcess[str]:
    """`planner` or `executor` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done
