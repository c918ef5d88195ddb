"""Which cause it is where bf16 logits of streamed layers differ from a resident model's: order or algorithm.

Qwen2.5-0.5B with no resident layer is bound by the link: layers wait for their copies, and copies for layers.
Each test changes one thing, so that those that fail name the cause:

- resident beside itself: kernels whose results change from run to run;
- copies or layers that are late on purpose: a wait that is missing, of a layer for its copy or of a copy for
  the last reader of its slot;
- one copy at a time, with nothing else on the card: no wait can be missing, what differs is the arithmetic;
- other alignments of tensors in a slot, and products whose weight begins there: a library that chooses its
  algorithm by the pointer;
- bytes in the slots beside those of a resident model: a slab that is wrong already in host memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.executor]
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "streaming"))

MODEL = "qwen2.5-0.5b"
ROUNDS = 3
CYCLES = 3_000_000
"""About 1.5 ms of a card: three times what a layer of the model needs on the link."""


@pytest.fixture(scope="module")
def equality() -> Any:
    """The benchmark's program, for its models."""
    import equality

    return equality


@pytest.fixture(autouse=True, scope="module")
def deterministic(equality: Any) -> Iterator[None]:
    """As the benchmark sets it."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def opened(equality: Any, kept: int | None) -> Iterator[Any]:
    """The model under engine stream, or resident for None."""
    import torch

    from executor.engines import resident, stream

    loaded = equality.load(stream if kept is not None else resident, MODEL, "none", kept)
    try:
        yield loaded
    finally:
        torch.cuda.synchronize()
        loaded.close()
        loaded.model = None
        torch.cuda.empty_cache()


def passes(model: Any) -> dict[str, Any]:
    """Logits of a prefill over 2 x 300 tokens and six decode steps, `ROUNDS` times over."""
    import torch

    ids = torch.randint(0, 1000, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()
    seen = {}
    with torch.no_grad():
        for number in range(ROUNDS):
            step = model(ids, use_cache=True)
            seen[f"round {number}, prefill"] = step.logits[:, -1].clone()
            for at in range(6):
                past = step.past_key_values
                step = model(ids[:, at : at + 1], past_key_values=past, use_cache=True)
                seen[f"round {number}, step {at}"] = step.logits[:, -1].clone()
    return {name: logits.cpu() for name, logits in seen.items()}


def differences(want: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """One line for every pass that is not equal."""
    import torch

    return [
        f"{name}: {int((want[name] != got[name]).sum())} of {got[name].numel()} values, at most by "
        f"{float((want[name].float() - got[name].float()).abs().max()):.4g}"
        for name in want
        if not torch.equal(want[name], got[name])
    ]


@pytest.fixture(scope="module")
def want(equality: Any) -> dict[str, Any]:
    """Of the resident model."""
    with opened(equality, None) as loaded:
        return passes(loaded.model)


def test_resident_beside_itself(equality: Any, want: dict[str, Any]) -> None:
    for _ in range(2):
        with opened(equality, None) as loaded:
            assert differences(want, passes(loaded.model)) == []


def test_rounds_of_the_resident_model_are_equal(want: dict[str, Any]) -> None:
    first = {name.partition(", ")[2]: logits for name, logits in want.items() if name.startswith("round 0")}
    for number in range(1, ROUNDS):
        assert differences({f"round {number}, {name}": value for name, value in first.items()}, want) == []


@pytest.mark.parametrize("attempt", range(2))
@pytest.mark.parametrize("kept", [0, 1])
def test_streamed(equality: Any, want: dict[str, Any], kept: int, attempt: int) -> None:
    with opened(equality, kept) as loaded:
        assert differences(want, passes(loaded.model)) == []


def test_late_copies(equality: Any, want: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that did not wait would read what the slot held before."""
    import torch

    from executor.streaming.link import CudaLink

    stock = CudaLink.send

    def late(link: Any, *arguments: Any) -> None:
        with torch.cuda.stream(link._stream):
            torch.cuda._sleep(CYCLES)
        stock(link, *arguments)

    monkeypatch.setattr(CudaLink, "send", late)
    with opened(equality, 0) as loaded:
        assert differences(want, passes(loaded.model)) == []


@pytest.mark.parametrize("after", ["input_layernorm", "self_attn", "mlp.up_proj"])
def test_late_layers(equality: Any, want: dict[str, Any], after: str) -> None:
    """A copy that did not wait would overwrite what the rest of the layer reads."""
    import torch

    with opened(equality, 0) as loaded:
        for layer in loaded.model.model.layers:
            layer.get_submodule(after).register_forward_hook(lambda *_: torch.cuda._sleep(CYCLES))
        assert differences(want, passes(loaded.model)) == []


def test_one_copy_at_a_time(equality: Any, want: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """If this alone is equal, a wait is missing; if this differs too, it is the arithmetic."""
    import torch

    from executor.streaming.link import CudaLink

    stock = CudaLink.send

    def alone(link: Any, *arguments: Any) -> None:
        torch.cuda.synchronize()
        stock(link, *arguments)
        torch.cuda.synchronize()

    monkeypatch.setattr(CudaLink, "send", alone)
    with opened(equality, 0) as loaded:
        assert differences(want, passes(loaded.model)) == []


@pytest.mark.parametrize("alignment", [256, 512, 4096])
def test_alignment_of_tensors_in_a_slot(
    equality: Any, want: dict[str, Any], monkeypatch: pytest.MonkeyPatch, alignment: int
) -> None:
    monkeypatch.setattr("executor.streaming.slab.TENSOR_ALIGNMENT", alignment)
    with opened(equality, 0) as loaded:
        assert differences(want, passes(loaded.model)) == []


def test_bytes_in_the_slots(equality: Any) -> None:
    """Every weight, as a slot holds it after passes, beside the resident one's."""
    import torch

    with opened(equality, None) as loaded:
        there = {name: p.detach().cpu() for name, p in loaded.model.model.layers.named_parameters()}
    with opened(equality, 0) as loaded:
        passes(loaded.model)
        streamer = loaded.traffic.__self__
        wrong = []
        for layer in streamer.layers:
            streamer.acquire(layer)
            torch.cuda.synchronize()
            wrong += [
                f"layer {layer.index}: {name}"
                for name, parameter in layer.module.named_parameters()
                if not torch.equal(there[f"{layer.index}.{name}"], parameter.detach().cpu())
            ]
        assert wrong == []


@pytest.mark.parametrize("tokens", [2, 600])
@pytest.mark.parametrize(("outputs", "inputs"), [(896, 896), (128, 896), (4864, 896), (896, 4864)])
def test_a_product_does_not_depend_on_where_its_weight_begins(outputs: int, inputs: int, tokens: int) -> None:
    """With bias, as the library is called for queries, and without."""
    import torch
    from torch.nn import functional

    draws = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16, generator=draws)
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16, generator=draws)
    bias = torch.randn(outputs, device="cuda", dtype=torch.bfloat16, generator=draws)
    want = [functional.linear(x, weight), functional.linear(x, weight, bias)]
    memory = torch.empty(weight.nbytes + bias.nbytes + 8192, dtype=torch.uint8, device="cuda")
    different = []
    for offset in (0, 16, 128, 256, 512, 768, 1024, 2048, 4096):
        moved = memory[offset : offset + weight.nbytes].view(torch.bfloat16).view_as(weight).copy_(weight)
        end = offset + weight.nbytes
        added = memory[end : end + bias.nbytes].view(torch.bfloat16).copy_(bias)
        got = [functional.linear(x, moved), functional.linear(x, moved, added)]
        different += [
            (offset, "with bias" if number else "no bias", float((a - b).abs().max()))
            for number, (a, b) in enumerate(zip(want, got, strict=True))
            if not torch.equal(a, b)
        ]
    at_ours = [case for case in different if case[0] % 256 == 0]
    assert at_ours == [], f"all offsets that differ: {different}"
