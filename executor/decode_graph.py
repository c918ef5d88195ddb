"""Decoding by replay: one step of the model's own forward pass, recorded once in a CUDA graph.

Decoding eagerly, the host launches hundreds of small kernels for every token and the card waits for it. Over
a static cache every step launches the same kernels on the same addresses, so one step can be recorded and
launched whole. (transformers would compile the step instead, which takes minutes.)

`DecodeGraph` stands in for `model.forward` while `generate` runs, which keeps its own sampling, stopping and
streaming. The first decode steps of a shape run eagerly and are listened to: a step in which the host reads
from the card cannot be recorded. Then a step is recorded, and from there on replayed. Whatever cannot be
recorded runs eagerly over the same static cache, and `note` says why.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_LISTENED_STEPS = 2
"""Eager steps in which a read on the host is forgiven: what is set up at its first use may read once."""
_PLAIN = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class Recording:
    """A recorded step: `output` is overwritten by every `replay`."""

    output: Any
    replay: Callable[[], None]
    pool_bytes: int = 0
    """Memory kept for what the step allocates."""


class Recorder(Protocol):
    """What records a step; a stand-in where there is no card."""

    def stream(self) -> AbstractContextManager[None]:
        """Work in here can be recorded."""

    def listen(self) -> AbstractContextManager[list[str]]:
        """Collects what the step did that cannot be recorded."""

    def record(self, step: Callable[[], Any]) -> Recording:
        """Note down what `step` launches, without running it. Errors: `RuntimeError`."""


class CudaRecorder:
    """Records on a side stream of one card, since the default stream cannot be recorded."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A whole generation runs in here, prefill included: one cuBLAS workspace, one set of free blocks."""
        outer = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            yield
        outer.wait_stream(self._stream)

    @contextmanager
    def listen(self) -> Iterator[list[str]]:
        """Reads of device memory on the host, as torch's debug mode reports them."""
        heard: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield heard
            finally:
                torch.cuda.set_sync_debug_mode(before)
        heard += [str(each.message) for each in caught if "synchronizing" in str(each.message)]

    def record(self, step: Callable[[], Any]) -> Recording:
        """Capture `step` into a CUDA graph with a memory pool of its own."""
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads of this process go on calling CUDA; only this one's calls are recorded
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                output = step()
        except RuntimeError:
            self._abandon(graph)
            raise
        return Recording(output, graph.replay, _pool_bytes(graph))

    def _abandon(self, graph: Any) -> None:
        """After a failed capture the allocator may still take it for under way."""
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(index, graph.pool())
        with suppress(Exception):
            graph.reset()


def _pool_bytes(graph: Any) -> int:
    with suppress(Exception):  # a figure for the report, from an interface that may change
        pool = tuple(graph.pool())
        return sum(
            int(segment["total_size"])
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment.get("segment_pool_id", ())) == pool
        )
    return 0


def why_not(model: Any, quant: str, device: torch.device) -> str | None:
    """Why the decode step of `model` is not worth recording, None where it is worth trying."""
    if device.type != "cuda":
        return "there is no CUDA card"
    if quant == "int8":
        return "LLM.int8 looks for outliers on the host"
    if not getattr(model, "_can_compile_fullgraph", False):
        return "transformers says that this model's forward pass decides things on the host"
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"{model.config._attn_implementation} reads the mask on the host"
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    return "its layers are split over several devices" if len(places) > 1 else None


class DecodeGraph:
    """The decode step of one model over one static cache of `tokens` tokens.

    `on_replay` is called before every replay, in which the hooks of the model's modules stay silent.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        tokens: int,
        recorder: Recorder,
        on_replay: Sequence[Callable[[], None]] = (),
    ) -> None:
        self.cache, self.tokens, self.replays = cache, tokens, 0
        self.gave_up: str | None = _cannot_hold(cache, tokens)
        self._model, self._recorder, self._on_replay = model, recorder, on_replay
        self._mask: torch.Tensor | None = None
        self._forward: Any = None
        self._prepare: Any = None
        self._masks_inside = _builds_masks_inside(model, cache)
        self._start_over(None)

    @property
    def note(self) -> str:
        """How decoding went, for the report."""
        if self.gave_up is not None:
            return f"decode steps ran eagerly over the static cache: {self.gave_up}"
        if self._recording is None:
            return "decode steps ran eagerly over the static cache: too few to record one"
        pool = self._recording.pool_bytes / 2**20
        return f"decode steps were replayed from a CUDA graph, whose memory pool holds {pool:.0f} MiB"

    @contextmanager
    def attached(self, mask: torch.Tensor) -> Iterator[None]:
        """Decode steps of `model.generate` go through the graph in here.

        `mask` is the prompts' padding mask, B x T. The cache is emptied first.
        """
        if any(layer.is_initialized for layer in self.cache.layers):
            self.cache.reset()
        model = self._model
        padded = torch.nn.functional.pad(mask.bool(), (0, self.tokens - mask.shape[1]), value=True)
        self._mask = padded if self._mask is None else self._mask.copy_(padded)
        before = {name: model.__dict__.get(name) for name in ("forward", "prepare_inputs_for_generation")}
        self._forward, self._prepare = model.forward, model.prepare_inputs_for_generation
        model.forward = _in_place_of(self._forward, self._step)
        model.prepare_inputs_for_generation = _in_place_of(self._prepare, self._inputs)
        try:
            with self._recorder.stream():
                yield
        finally:
            for name, value in before.items():
                if value is None:
                    delattr(model, name)
                else:
                    setattr(model, name, value)

    def _inputs(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What a decode step needs; `generate` would build a mask over the whole cache for every token on the
        host, so the model builds it from the padding mask inside the recorded step."""
        known = {"next_sequence_length", "past_key_values", "attention_mask", "position_ids", "use_cache"}
        if (
            args
            or self.gave_up is not None
            or not self._masks_inside
            or kwargs.get("past_key_values") is not self.cache
            or kwargs.get("next_sequence_length") != 1
            or not kwargs.keys() <= known | {"logits_to_keep"}
        ):
            return dict(self._prepare(input_ids, *args, **kwargs))
        del kwargs["next_sequence_length"]
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][..., -1:]
        return {**kwargs, "input_ids": input_ids[:, -1:], "attention_mask": self._mask}

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        decodes = ids is not None and ids.shape[1] == 1 and kwargs.get("past_key_values") is self.cache
        if self.gave_up is not None or args or not decodes:
            return self._forward(*args, **kwargs)
        shape = _shape(kwargs)
        if shape != self._recorded_shape:
            self._start_over(shape)
        if self._recording is not None:
            return self._replay(kwargs)
        return self._record(kwargs) if self._quiet else self._listen(kwargs)

    def _start_over(self, shape: object) -> None:
        self._recorded_shape = shape
        self._recording: Recording | None = None
        self._buffers: dict[str, Any] = {}
        self._counts: list[tuple[Any, str, int]] = []
        self._listened, self._quiet = 0, False

    def _listen(self, kwargs: dict[str, Any]) -> Any:
        with self._recorder.listen() as heard:
            output = self._forward(**kwargs)
        self._listened, self._quiet = self._listened + 1, not heard
        if heard and self._listened >= _LISTENED_STEPS:
            self.gave_up = "a decode step of this model reads from the card on the host"
        return output

    def _record(self, kwargs: dict[str, Any]) -> Any:
        buffers = _cloned(kwargs)
        if kwargs.get("attention_mask") is self._mask:
            buffers["attention_mask"] = self._mask  # it stays where it is while the cache is used
        before = _counters(self.cache)
        try:
            recording = self._recorder.record(lambda: self._forward(**buffers))
        except RuntimeError as error:
            for layer, name, value in before:
                setattr(layer, name, value)
            said = str(error).strip().splitlines()
            self.gave_up = f"recording failed: {said[0][:160] if said else type(error).__name__}"
            return self._forward(**kwargs)
        after = _counters(self.cache)
        self._counts = [(o, name, new - old) for (o, name, old), (*_, new) in zip(before, after, strict=True)]
        self._recording, self._buffers = recording, buffers
        recording.replay()  # recording ran nothing: this is the step itself
        return recording.output

    def _replay(self, kwargs: dict[str, Any]) -> Any:
        assert self._recording is not None
        for told in self._on_replay:
            told()
        _fill(self._buffers, kwargs)
        self._recording.replay()
        self.replays += 1
        for layer, name, by in self._counts:
            setattr(layer, name, getattr(layer, name) + by)
        return self._recording.output


def _in_place_of(original: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """`stand_in` with the signature of `original`, which `generate` reads."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return stand_in(*args, **kwargs)

    return call


def _builds_masks_inside(model: Any, cache: Any) -> bool:
    """Whether the model's forward pass may build its masks in the recorded step: sliding layers count their
    tokens on the host, and a model with inputs of its own keeps its own way of preparing them."""
    from transformers import GenerationMixin

    plain = type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
    return plain and not any(layer.is_sliding for layer in cache.layers)


def _cannot_hold(cache: Any, tokens: int) -> str | None:
    """Why steps over this cache differ from each other: a full sliding layer takes another path."""
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    if any(type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers):
        return "its cache has layers that are not plain keys and values"
    shorter = any(layer.max_cache_len < tokens for layer in cache.layers)
    return "its sliding window is shorter than the text" if shorter else None


def _counters(cache: Any) -> list[tuple[Any, str, int]]:
    """What the layers of a cache count on the host, which a replay does not."""
    return [
        (layer, name, value)
        for layer in cache.layers
        for name, value in vars(layer).items()
        if type(value) is int and name.startswith("cumulative_length")
    ]


def _shape(value: Any) -> object:
    """What must be the same for a recording to serve again."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, dict):
        return tuple((name, _shape(each)) for name, each in value.items())
    return value if isinstance(value, _PLAIN) else id(value)


def _cloned(value: Any) -> Any:
    """The same arguments in memory of their own."""
    if isinstance(value, dict):
        return {name: _cloned(each) for name, each in value.items()}
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, torch.Tensor) else value


def _fill(buffers: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value is not buffers[name]:
            buffers[name].copy_(value)
        elif isinstance(value, dict):
            _fill(buffers[name], value)
