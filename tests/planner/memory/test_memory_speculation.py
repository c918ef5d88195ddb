"""Speculation and prompts in parts: what they add to a card, and what they take off it."""

from __future__ import annotations

from planner.estimate import architecture_of, estimate
from planner.machine import machine_from_gpus
from planner.memory.infer import CHECKED_TOKENS
from planner.rules import Case, broken_rule
from planner.types import GpuEstimate, Strategy, Workload
from planner.units import MIB
from profiles.catalogue import load_model
from profiles.hardware import load_gpu

MODEL, DRAFT = load_model("qwen2.5-7b"), load_model("qwen2.5-0.5b")
CARD = machine_from_gpus([(load_gpu("h200"), 1)])
LONG = Workload(prompt_tokens=16384, new_tokens=256)


def card(work: Workload, **how: object) -> GpuEstimate:
    return estimate(MODEL, CARD, work, Strategy(**how)).gpus[0]  # type: ignore[arg-type]


def test_a_draft_model_stands_beside_the_model() -> None:
    plain, drafted = card(Workload()), card(Workload(), speculate="draft", draft="qwen2.5-0.5b")
    weights = estimate(DRAFT, CARD, Workload(), Strategy()).gpus[0].load_bytes
    assert drafted.load_bytes == plain.load_bytes + weights
    assert drafted.allocated_peak_bytes >= plain.allocated_peak_bytes + weights
    assert drafted.allocated_peak_bytes <= plain.allocated_peak_bytes + weights + 512 * MIB
    assert sum(line.bytes for line in drafted.components) == drafted.allocated_peak_bytes
    found = estimate(MODEL, CARD, Workload(), Strategy(speculate="draft", draft="qwen2.5-0.5b"))
    assert found.verdict == "fits"


def test_a_draft_nobody_knows_is_told() -> None:
    found = estimate(MODEL, CARD, Workload(), Strategy(speculate="draft", draft="no-such-model"))
    assert found.verdict == "unknown" and "no-such-model" in found.reasons[0]


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    """Tables of one family differ by padding: 152,064 rows and 151,936."""
    arch = architecture_of(MODEL)
    for name, refused in (("qwen2.5-0.5b", False), ("llama-3.2-1b", True)):
        how = Strategy(speculate="draft", draft=name)
        rule = broken_rule(Case(arch, CARD, Workload(), how))
        assert (rule is not None and rule.name == "speculation_vocabulary") == refused


def test_a_draft_is_downloaded_too() -> None:
    how = Strategy(speculate="draft", draft="qwen2.5-0.5b")
    plain, drafted = (estimate(MODEL, CARD, Workload(), each).disk for each in (Strategy(), how))
    assert DRAFT.parameters is not None
    assert drafted.bytes == plain.bytes + 2 * DRAFT.parameters


def test_checking_a_draft_holds_its_logits() -> None:
    plain, guessed = card(Workload()), card(Workload(), speculate="lookup")
    added = guessed.moments["decode"] - plain.moments["decode"]
    logits = CHECKED_TOKENS * MODEL.config["vocab_size"] * (2 + 4 + 4)
    assert logits <= added <= logits + 64 * MIB
    assert guessed.moments["prefill"] == plain.moments["prefill"]


def test_a_prompt_in_parts_needs_less_the_smaller_they_are() -> None:
    peaks = [card(LONG, prefill_chunk_tokens=part).moments["prefill"] for part in (0, 8192, 2048, 512)]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    cache = LONG.prompt_tokens * 28 * 2 * 4 * 128 * 2
    assert peaks[-1] > card(LONG).load_bytes + cache, "all of the cache is there however small the parts"
    for part in (LONG.prompt_tokens, 10**6):
        assert card(LONG, prefill_chunk_tokens=part).moments == card(LONG).moments
    whole, parts = (card(LONG, prefill_chunk_tokens=part).moments["decode"] for part in (0, 512))
    assert abs(whole - parts) < MIB
