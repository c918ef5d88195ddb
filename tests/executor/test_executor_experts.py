"""Fused experts in NF4: what they compute, what they take, and how they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from streaming_models import logits, random_source, request, write_model

from executor.engines import resident, stream
from executor.errors import BadWeights, CannotHonour
from executor.packed_experts import STACKS, PackedExperts, Packing, dequantized, pack
from executor.random_weights import LazyStack
from executor.source import ModelSource
from planner.exact.adapters import target_modules
from planner.memory.stream import slabs, streamed_layers
from profiles.architecture import architecture

pytestmark = pytest.mark.executor
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "gpt_oss")


def experts_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "is_transposed")]


def rounded_to_nf4(stack: torch.Tensor, transposed: bool) -> torch.Tensor:
    packed = pack(stack, len(stack), transposed)
    weights = [dequantized(packed, expert) for expert in range(len(stack))]
    return torch.stack([w.t() if transposed else w for w in weights])


@pytest.mark.parametrize("kind", MIXTURES)
def test_stock_experts_with_rounded_weights_compute_the_same(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own code on weights that went through NF4 and back, bit by bit, and on the originals
    nearly."""
    from transformers.integrations import moe

    # the CPU's grouped kernel sums in another order than a product per expert
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    source = write_model(tmp_path, kind)
    got = logits(resident.load(request(source, "nf4+experts")).model)
    stock = resident.load(request(source, "nf4")).model
    plain = logits(stock)
    for module in experts_of(stock):
        for name in STACKS[::2]:
            stack = getattr(module, name)
            stack.data = rounded_to_nf4(stack.data, module.is_transposed)
    assert torch.equal(got, logits(stock))
    assert 0 < (got - plain).abs().max() < 0.4 * plain.abs().max()


@pytest.mark.parametrize("kind", MIXTURES)
def test_streamed_equals_resident(tmp_path: Path, kind: str) -> None:
    source = write_model(tmp_path, kind)
    want = logits(resident.load(request(source, "nf4+experts")).model)
    loaded = stream.load(request(source, "nf4+experts", 1))
    arch = architecture(json.loads((source.folder / "config.json").read_text()))  # type: ignore[operator]
    sizes = slabs(arch, "nf4", "bf16", "nf4")
    filled = sum(sizes[layer] for layer in streamed_layers(arch, 1)[: loaded.slots])
    assert loaded.traffic()["bytes_streamed"] == filled, "slabs are as large as they are planned"
    assert torch.equal(logits(loaded.model), want)
    assert torch.equal(logits(loaded.model), want), "and from whatever the slots held before"
    loaded.close()


def test_few_rows_are_multiplied_without_a_look_at_their_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token, as a recorded decode step needs it: the same results, nothing read on the host."""
    source = write_model(tmp_path, "gpt_oss")
    (module, *_) = experts_of(resident.load(request(source, "nf4+experts")).model)
    x, index = torch.randn(1, 64).bfloat16(), torch.tensor([[3, 1]])
    weights = torch.tensor([[0.75, 0.25]])
    want = module(x, index, weights).detach()  # gradients are on: grouped
    monkeypatch.setattr(PackedExperts, "_groups", None)
    with torch.no_grad():
        assert torch.equal(module(x, index, weights), want)


def test_a_rehearsal_draws_and_packs_expert_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = watch_packing(monkeypatch)
    want = logits(resident.load(request(random_source("mixtral"), "nf4+experts")).model)
    assert sizes == {2 * 128 * 64 * 2, 64 * 128 * 2}, "bytes of one gate_up_proj and one down_proj"
    loaded = stream.load(request(random_source("mixtral"), "nf4+experts", 0))
    assert torch.equal(logits(loaded.model), want)
    loaded.close()


def test_loading_holds_one_expert_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = watch_packing(monkeypatch)
    model = resident.load(request(write_model(tmp_path, "mixtral"), "nf4+experts")).model
    assert sizes == {2 * 128 * 64 * 2, 64 * 128 * 2}
    for module in experts_of(model):
        assert isinstance(module, PackedExperts) and type(module).__name__ == "MixtralExperts"
        assert [p.dtype for p in module.parameters()] == [torch.uint8, torch.uint8]
        assert sum(p.numel() for p in module.parameters()) == 4 * 3 * 128 * 64 // 2


def watch_packing(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Bytes of the memory behind every weight that is packed."""
    sizes: set[int] = set()
    stock = Packing.add

    def add(self: Packing, weight: torch.Tensor) -> None:
        sizes.add(weight.untyped_storage().nbytes())
        stock(self, weight)

    monkeypatch.setattr(Packing, "add", add)
    return sizes


def test_a_stack_that_comes_whole_is_packed(tmp_path: Path) -> None:
    """As some checkpoints have them, and with the same result."""
    from safetensors.torch import load_file, save_file

    source = write_model(tmp_path, "olmoe")
    want = logits(resident.load(request(source, "nf4+experts")).model)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(5):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{e}.{name}.weight") for e in range(4)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], 1)
        tensors[f"{prefix}.down_proj"] = down
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(resident.load(request(source, "nf4+experts")).model), want)


def test_experts_of_another_shape_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = write_model(tmp_path, "mixtral")
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("w2.weight")]:
        tensors[name] = tensors[name][:, :32].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadWeights, match=r"layers\.0.*down_proj has the shape 4x64x32 and .* 4x64x128"):
        resident.load(request(source, "nf4+experts"))


def test_experts_in_code_of_their_own_are_refused() -> None:
    llama4 = {"num_local_experts": 2, "intermediate_size_mlp": 128, "head_dim": 16, "moe_layers": [0, 1]}
    source = ModelSource(None, {**random_source("llama").config, "model_type": "llama4_text", **llama4})
    with pytest.raises(CannotHonour, match="experts of Llama4ForCausalLM in code of its own"):
        resident.load(request(source, "nf4+experts"))


def test_adapters_go_where_they_go_without(tmp_path: Path) -> None:
    source = write_model(tmp_path, "olmoe")
    packed, plain = (resident.load(request(source, quant)).model for quant in ("nf4+experts", "nf4"))
    for wanted in ("all-linear", "attention"):
        assert target_modules(packed, wanted) == target_modules(plain, wanted) != []


def test_a_lazy_stack_passes_through_unread() -> None:
    lazy = LazyStack("experts", (2, 4, 8), torch.float32, "cpu", 1, 0.02)
    assert lazy[...] is lazy and lazy.to("cpu") is lazy
    one, two = lazy.experts()
    assert one.shape == (4, 8) and not torch.equal(one, two)
