"""A prompt in several passes: the answers of one pass, whatever generates them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from conftest import make_plan, strategy
from streaming_models import request, write_model

from executor.chunked_prefill import chunked_prefill, parts
from executor.cli import main
from executor.engines import resident, stream
from executor.speculation.assisted import SETTINGS, Speculation
from executor.speculation.draft_model import Draft, ModelDrafter
from executor.speculation.length import DraftLength
from planner.types import Workload

pytestmark = pytest.mark.executor


def lengths_of_passes(model: Any) -> list[int]:
    """Filled with the tokens of every pass from now on."""
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """Six tokens after left-padded prompts, with their logits."""
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 258}
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings
        )


@pytest.mark.parametrize("kind", ["llama", "gemma2", "deepseek_v3", "gpt2"])
def test_logits_are_those_of_one_pass(tmp_path: Path, kind: str) -> None:
    """Left padding, windows of 8, compressed caches, learned positions; equal up to float32's rounding."""
    model = resident.load(request(write_model(tmp_path, kind), dtype="fp32")).model
    ids = torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    whole = generate(model, ids, mask)
    seen = lengths_of_passes(model) if hasattr(model, "model") else []
    with chunked_prefill(model, 8):
        chunked = generate(model, ids, mask)
    assert torch.equal(chunked.sequences, whole.sequences)
    for a, b in zip(chunked.logits, whole.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if seen:
        assert seen == [8, 8, 5] + [1] * 5 and parts(21, 8) == 3
    assert "prepare_inputs_for_generation" not in vars(model), "the model is left as it was"


def test_drafts_are_checked_after_a_prompt_in_parts(tmp_path: Path) -> None:
    """Over windows of 8 tokens, whose layers remember more while drafts may be rejected."""
    model = resident.load(request(write_model(tmp_path, "mistral"), dtype="fp32")).model
    ids = torch.tensor([[5, 6, 7, 8, 9] * 5])
    plain = generate(model, ids, torch.ones_like(ids))
    speculation = Speculation(model, lambda: (ModelDrafter(Draft(model, 0.0), 6), DraftLength()))
    with torch.no_grad(), chunked_prefill(model, 6), speculation.attached():
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 258}
        guessed = model.generate(ids, attention_mask=torch.ones_like(ids), **SETTINGS, **settings)
    assert torch.equal(guessed, plain.sequences)
    assert speculation.counts.accepted == speculation.counts.drafted > 0


def test_streamed_layers_give_the_bits_of_resident_ones(tmp_path: Path) -> None:
    source = write_model(tmp_path, "qwen2")
    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(0))
    results = []
    for engine in (resident, stream):
        loaded = engine.load(request(source, resident=2))
        with chunked_prefill(loaded.model, 6):
            results.append(generate(loaded.model, ids, torch.ones_like(ids)))
        loaded.close()
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(results[0].logits, results[1].logits, strict=True))


@pytest.mark.parametrize(
    "how", [{"cache": "static"}, {"cache": "quantized"}, {"speculate": "lookup"}, {"speculate": "draft"}]
)
def test_command_line_with_any_cache_and_with_drafts(tmp_path: Path, tiny: Path, how: dict[str, Any]) -> None:
    """Parts of 16 tokens, in batches of two where that goes; what is measured tells prompt from answer."""
    rows = []
    for chunk in (0, 16):
        job = Workload(task="infer", prompt_tokens=64, new_tokens=8, batch_size=2)
        extra = {"draft": str(tiny)} if how.get("speculate") == "draft" else {}
        plan = make_plan(
            tmp_path / "plan.json",
            tiny,
            job,
            strategy(dtype="fp32", prefill_chunk_tokens=chunk, **how, **extra),
        )
        output = tmp_path / str(chunk)
        prompts = ("--prompt", "one two three one two three", "--prompt", "x")
        assert main(["run", *map(str, (plan, *prompts, "--greedy", "--output", output))]) == 0
        rows.append((output / "outputs.jsonl").read_text())
        report = json.loads((output / "report.json").read_text())
        assert report["prefill_tokens_per_s"] > 0 and report["decode_tokens_per_s"] > 0
    assert rows[0] == rows[1]
