"""Smaller parts: random weights, reports and their table, memory errors, measuring on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from conftest import candidate, strategy

from executor.device import check_abilities
from executor.errors import CannotHonour
from executor.load import attention_for, load_model, make_config
from executor.measure import HostSampler, MomentMeter, resident_bytes, tensor_bytes
from executor.memory_errors import is_out_of_memory
from executor.random_weights import LazyTensor, lazy_state_dict
from executor.source import ModelSource
from planner.exact.adapters import target_modules
from planner.types import Workload

pytestmark = pytest.mark.executor
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 80, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CPU = torch.device("cpu")


def made(kind: str, seed: int = 0, quant: str = "none", **extra: Any) -> Any:
    source = ModelSource(None, {"model_type": kind, **SMALL, **extra})
    return load_model(source, strategy(quant=quant, attention="eager"), {"": "cpu"}, CPU, seed)


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    a, b, c = made("llama"), made("llama"), made("llama", seed=1)
    for (name, x), y, z in zip(
        a.state_dict().items(), b.state_dict().values(), c.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y), name
        assert torch.equal(x, z) == (x.dim() == 1), name
    q, k = a.model.layers[0].self_attn.q_proj.weight, a.model.layers[1].self_attn.q_proj.weight
    assert not torch.equal(q, k) and 0.015 < q.float().std() < 0.025
    assert torch.equal(a.model.norm.weight, torch.ones(32, dtype=torch.bfloat16))


def test_tied_weights_are_made_once_and_stay_tied() -> None:
    config = make_config({"model_type": "llama", **SMALL, "tie_word_embeddings": True})
    _, state = lazy_state_dict(config, torch.bfloat16, CPU, 0, "eager")
    assert "lm_head.weight" not in state and "model.embed_tokens.weight" in state
    model = made("llama", tie_word_embeddings=True)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_nothing_is_made_before_it_is_asked_for() -> None:
    lazy = LazyTensor("huge.weight", (2**20, 2**20), torch.bfloat16, CPU, 0, 0.02)
    assert lazy.get_shape() == [2**20, 2**20] and lazy.get_dtype() == "BF16"


@pytest.mark.parametrize(("quant", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_linears_are_quantized_while_they_are_made_but_the_head_is_not(quant: str, kind: str) -> None:
    model = made("qwen2", quant=quant)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == kind
    assert type(model.lm_head) is torch.nn.Linear
    assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()


def test_fused_experts_are_left_alone_by_adapters() -> None:
    model = made("olmoe", num_experts=4, num_experts_per_tok=2)
    names = target_modules(model, "all-linear")
    assert isinstance(names, list) and {n.rsplit(".", 1)[-1] for n in names} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert target_modules(made("llama"), "all-linear") == "all-linear"
    assert len(target_modules(made("llama"), "attention")) == 8


def test_attention_falls_back_where_the_class_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    config = make_config({"model_type": "llama", **SMALL})
    assert attention_for(config, strategy(attention="sdpa")) == "sdpa"
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    assert attention_for(config, strategy(attention="sdpa")) == "eager"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_host_peak_sees_memory_that_was_given_back() -> None:
    before = resident_bytes()
    assert before is not None
    sampler = HostSampler()
    block = bytearray(200 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    sampler._take()
    del block
    peak = sampler.stop()
    assert peak is not None and peak > before + 150 * 2**20


def test_storages_are_counted_once_and_the_cpu_has_no_moments() -> None:
    base = torch.zeros(100, dtype=torch.float32)
    assert tensor_bytes([base, base[:10], None, torch.zeros(3, dtype=torch.uint8)]) == 403
    meter = MomentMeter(CPU)
    meter.enter("forward")
    meter.leave()
    assert meter.moments == {} and meter.peak_bytes() is None


def test_weights_of_another_shape_are_refused(tiny: Path) -> None:
    import json

    from executor.errors import BadWeights
    from executor.source import find_weights
    from planner.types import PlanModel

    config = json.loads((tiny / "config.json").read_text())
    assert (
        find_weights(PlanModel(id="t", parameters=1, path=str(tiny), config=config), offline=True).bytes > 0
    )
    other = PlanModel(id="t", parameters=1, path=str(tiny), config={**config, "hidden_size": 128})
    with pytest.raises(BadWeights, match="hidden_size is 256, planned was 128"):
        find_weights(other, offline=True)
    with pytest.raises(BadWeights, match="is not there"):
        find_weights(PlanModel(id="t", parameters=1, path=str(tiny / "no")), offline=True)
    with pytest.raises(BadWeights, match="names no weights"):
        find_weights(PlanModel(id="t", parameters=1), offline=True)


@pytest.mark.parametrize(
    ("work", "how", "places", "says"),
    [
        (
            {"task": "train"},
            {"activation_offload": True, "gradient_checkpointing": False},
            {"": "cpu"},
            "checkpointing is off",
        ),
        ({"task": "train", "method": "full"}, {"dtype": "fp16"}, {"": "cpu"}, "cannot scale"),
        ({}, {"speculate": "lookup", "cache": "static"}, {"": "cpu"}, "takes rejected tokens back"),
        ({}, {"speculate": "draft"}, {"": "cpu"}, "drafts with no model"),
        ({}, {}, {"model": 0, "lm_head": 99}, "over cards 0, 99"),
    ],
)
def test_what_nothing_here_carries_out_is_refused(
    work: dict[str, Any], how: dict[str, Any], places: dict[str, Any], says: str
) -> None:
    asked = msgspec.structs.replace(candidate(1, strategy(**how)), device_map=places)
    with pytest.raises(CannotHonour, match=says):
        check_abilities(asked, Workload(**work), CPU)
    check_abilities(candidate(1, strategy()), Workload(**work), CPU)
