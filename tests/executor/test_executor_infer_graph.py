"""Replayed decode steps with a stand-in for the CUDA graph: what they are given, and equal answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from executor.caches import Caches, bytes_of
from executor.decode_graph import DecodeGraph, Recording, why_not
from planner.types import Strategy

pytestmark = pytest.mark.executor
CPU = torch.device("cpu")
TOKENS = 64


class FakeRecorder:
    """A graph on the CPU: recording leaves the cache as it was, and a replay repeats the recorded Python with
    what the host had counted then, into the recorded output, without counting on."""

    def __init__(self, cache: Any, heard: tuple[str, ...] = (), error: str | None = None) -> None:
        self.cache, self.heard, self.error, self.recorded = cache, list(heard), error, 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        yield

    @contextmanager
    def listen(self) -> Iterator[list[str]]:
        yield self.heard

    def record(self, step: Callable[[], Any]) -> Recording:
        self.recorded += 1
        tensors = [(t, t.clone()) for layer in self.cache.layers for t in _tensors(layer)]
        then = self._counts()
        output = step()
        for tensor, before in tensors:
            tensor.copy_(before)
        if self.error is not None:
            raise RuntimeError(self.error)

        def replay() -> None:
            now = self._counts()
            self._set(then)
            output.logits.copy_(step().logits)
            self._set(now)

        return Recording(output, replay, 2**20)

    def _counts(self) -> list[dict[str, int]]:
        return [{n: v for n, v in vars(layer).items() if type(v) is int} for layer in self.cache.layers]

    def _set(self, counts: list[dict[str, int]]) -> None:
        for layer, values in zip(self.cache.layers, counts, strict=True):
            vars(layer).update(values)


def _tensors(layer: Any) -> list[torch.Tensor]:
    return [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]


def model_of(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, vocab_size=300, eos_token_id=258, pad_token_id=257, bos_token_id=None,
        initializer_range=0.2, tie_word_embeddings=False, **more,  # others repeat one token
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def batch(rows: int, width: int, padding: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 250, (rows, width), generator=torch.Generator().manual_seed(width))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


GREEDY = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 257}


def replayed(model: Any, graph: DecodeGraph, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with graph.attached(inputs["attention_mask"]):
        return model.generate(**inputs, past_key_values=graph.cache, disable_compile=True, **GREEDY)


@pytest.mark.parametrize(
    ("kind", "more"), [("qwen2", {}), ("mistral", {"sliding_window": TOKENS}), ("gemma3_text", {})]
)
def test_replayed_tokens_are_those_of_the_dynamic_cache(kind: str, more: dict[str, Any]) -> None:
    model = model_of(kind, **more)
    cache = StaticCache(config=model.config, max_cache_len=TOKENS)
    recorder, told = FakeRecorder(cache), []
    graph = DecodeGraph(model, cache, TOKENS, recorder, (lambda: told.append(1),))
    assert graph.gave_up is None
    for width, padding in ((12, 0), (20, 3), (9, 5)):  # one recording serves prompts of every length
        inputs = batch(2, width, padding)
        expected = model.generate(**inputs, **GREEDY)
        assert (
            torch.equal(replayed(model, graph, inputs), expected) and expected[:, width:].unique().numel() > 8
        )
    assert recorder.recorded == 1 and len(told) == graph.replays == 27 + 29 + 29
    assert "pool holds 1 MiB" in graph.note
    assert not {"forward", "prepare_inputs_for_generation"} & vars(model).keys()


def test_reads_on_the_host_and_failed_recordings_end_in_eager_steps() -> None:
    model = model_of("qwen2")
    inputs = batch(2, 12, 2)
    expected = model.generate(**inputs, **GREEDY)
    for trouble, why in (
        ({"heard": ("called a synchronizing CUDA operation",)}, "reads from the card"),
        ({"error": "operation not permitted when stream is capturing\nmore"}, "not permitted when stream"),
    ):
        cache = StaticCache(config=model.config, max_cache_len=TOKENS)
        graph = DecodeGraph(model, cache, TOKENS, FakeRecorder(cache, **trouble))
        assert torch.equal(replayed(model, graph, inputs), expected)
        assert graph.replays == 0 and why in graph.note and "more" not in graph.note
        assert torch.equal(replayed(model, graph, inputs), expected)


def test_sliding_window_that_fills_up_is_not_recorded() -> None:
    model = model_of("mistral", sliding_window=16)
    cache = StaticCache(config=model.config, max_cache_len=TOKENS)
    graph = DecodeGraph(model, cache, TOKENS, FakeRecorder(cache))
    inputs = batch(2, 12, 2)
    assert torch.equal(replayed(model, graph, inputs), model.generate(**inputs, **GREEDY))
    assert graph.replays == 0 and "sliding window is shorter" in graph.note


def test_what_cannot_be_recorded_is_known_beforehand() -> None:
    model, card = model_of("qwen2"), torch.device("cuda", 0)
    assert why_not(model, "none", card) is None and why_not(model, "nf4", card) is None
    assert "no CUDA card" in str(why_not(model, "none", CPU))
    assert "LLM.int8" in str(why_not(model, "int8", card))
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    assert "several devices" in str(why_not(model, "none", card))
    del model.hf_device_map
    model.config._attn_implementation = "flash_attention_2"
    assert "reads the mask" in str(why_not(model, "none", card))


def test_static_cache_and_recording_serve_batches_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = model_of("qwen2"), []

    def recorder(self: Caches) -> FakeRecorder:
        made.append(FakeRecorder(cache=None))
        return made[-1]

    monkeypatch.setattr("executor.decode_graph.why_not", lambda *_: None)
    monkeypatch.setattr(Caches, "_recorder", recorder)
    caches = Caches(model, Strategy(cache="static"), CPU, tokens=41)
    for rows in (2, 2, 1):
        inputs = batch(rows, 11, 1 if rows > 1 else 0)
        with caches.open(inputs["attention_mask"]) as arguments:
            made[-1].cache = arguments["past_key_values"]
            got = model.generate(**inputs, **arguments, **GREEDY)
        assert torch.equal(got, model.generate(**inputs, **GREEDY))
        # 41 tokens rounded up to 48, keys and values of two layers and heads of 8 numbers in fp32
        assert bytes_of(arguments["past_key_values"]) == rows * 48 * 2 * 2 * 2 * 8 * 4
    assert len(made) == 2 and [each.recorded for each in made] == [1, 1]
    assert "replayed from a CUDA graph" in caches.notes[0]


def test_static_cache_without_a_card_runs_eagerly() -> None:
    model = model_of("qwen2")
    caches = Caches(model, Strategy(cache="static"), CPU, tokens=42)
    inputs = batch(2, 12, 2)
    for _ in range(2):
        with caches.open(inputs["attention_mask"]) as arguments:
            got = model.generate(**inputs, **arguments, **GREEDY)
        assert torch.equal(got, model.generate(**inputs, **GREEDY))
    assert caches.notes == ["decode steps ran eagerly over the static cache: there is no CUDA card"]
