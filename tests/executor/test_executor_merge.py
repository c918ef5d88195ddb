"""`executor merge`: equal to peft's own merge, loadable by plain transformers, nothing half-written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_plan, strategy

from executor.cli import main
from executor.merge_write import read_shards
from executor.weights import INDEX
from planner.types import Workload

pytestmark = pytest.mark.executor
IDS = torch.arange(3, 40)[None]


def make_base(folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16, **extra: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 80, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **{**shape, **tokens, "num_key_value_heads": 1, **extra})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="16KB")
    return folder


def make_adapter(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """An adapter that changes much: nothing in it is zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **settings}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.2 + parameter.data
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return folder


def adapted(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def merge(*args: Any) -> int:
    return main(["merge", *map(str, args)])


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
STACKED = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize(
    ("kind", "extra", "settings"),
    [
        ("qwen2", {}, {}),
        ("qwen2", {}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        ("qwen2", {"tie_word_embeddings": True}, {"use_dora": True}),
        ("qwen2", {}, {"modules_to_save": ["lm_head", "embed_tokens"]}),
        ("llama", {}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, {"use_dora": True}),
        ("mixtral", EXPERTS, {"target_modules": ["q_proj"], **STACKED}),
        ("qwen3_moe", EXPERTS, {"target_modules": ["q_proj"], **STACKED}),
    ],
)
def test_equals_merge_and_unload_bit_by_bit(
    tmp_path: Path, kind: str, extra: dict[str, Any], settings: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", kind, **extra)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    assert merge(adapter, "-o", tmp_path / "m") == 0
    peft = adapted(base, adapter).merge_and_unload().state_dict()
    ours = load(tmp_path / "m").state_dict()
    assert ours.keys() == peft.keys()
    for name, tensor in peft.items():
        assert torch.equal(ours[name], tensor), name
    assert any(not torch.equal(ours[n], t) for n, t in load(base).state_dict().items())
    # the same files with the same tensors, of the same bytes
    before, after = ({s.path.name: s.tensors for s in read_shards(f)} for f in (base, tmp_path / "m"))
    assert before == after and (len(before) > 1) == (tmp_path / "m" / INDEX).exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_those_of_the_adapter_model(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base", "llama", torch.float32)
    adapter = make_adapter(base, tmp_path / "adapter", dtype, use_dora=True)
    assert merge(adapter, "-o", tmp_path / "m") == 0
    with torch.no_grad():
        wanted = adapted(base, adapter).eval()(input_ids=IDS).logits
        torch.testing.assert_close(load(tmp_path / "m")(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(load(base)(input_ids=IDS).logits, wanted, atol=1e-1)


@pytest.mark.parametrize("settings", [
    {"target_modules": ["lm_head"]},
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
])  # fmt: skip
def test_tied_embeddings_come_apart_where_only_one_is_adapted(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", "llama", torch.float32, tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    assert merge(adapter, "-o", tmp_path / "m") == 0
    merged = load(tmp_path / "m")
    assert merged.config.tie_word_embeddings is False
    with torch.no_grad():
        wanted = adapted(base, adapter).eval()(input_ids=IDS).logits
        torch.testing.assert_close(merged(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_qlora_run_is_merged_into_the_16_bit_base(tmp_path: Path, tiny: Path, capsys: Any) -> None:
    workload = Workload(task="train", seq_len=64, batch_size=2, method="qlora")
    plan = make_plan(tmp_path / "plan.json", tiny, workload, strategy(quant="nf4"))
    data = ["--dataset", str(tiny / "data.jsonl"), "--max-steps", "2"]
    assert main(["run", str(plan), *data, "--output", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert merge(tmp_path / "run", "-o", tmp_path / "new" / "m", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "fitwright.merge/1" and report["base"] == str(tiny)
    assert report["changed"] == 28 and report["bytes"] == sum(
        t.bytes for s in read_shards(tiny) for t in s.tensors.values()
    )
    model = load(tmp_path / "new" / "m")
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "new" / "m" / name).read_bytes() == (tiny / name).read_bytes()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m"]
    assert merge(tmp_path / "run", "-o", tmp_path / "new" / "m") == 2
    assert "exists" in capsys.readouterr().err


def test_refusals_are_one_line_and_leave_nothing(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter")
    before = sorted(tmp_path.iterdir())

    def refused(says: str, run: Path, *more: Any) -> None:
        assert merge(run, "-o", tmp_path / "m", *more) == 2
        first, *rest = capsys.readouterr().err.splitlines()
        rest = [line for line in rest if not line.startswith(("reading", "merging"))]
        lines = [line for line in (first, *rest) if line.startswith("error: ")]
        assert len(lines) == 1 and says in lines[0], lines
        assert sorted(tmp_path.iterdir()) == before

    refused("is not there", tmp_path / "nothing")
    refused("no run and no adapter", base)
    refused("the base model", adapter, "--base", tmp_path / "elsewhere")
    (base / "outputs.jsonl").touch()
    refused("trained nothing", base)
    (base / "outputs.jsonl").rename(base / "run.json")
    refused("not finished", base)
    (base / "run.json").unlink()
    (base / "model").mkdir()
    shutil.copy(base / "config.json", base / "model")
    refused("full fine-tune", base)
    shutil.rmtree(base / "model")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        refused("free", adapter)
    staging = tmp_path / ".m.merging"
    staging.mkdir()
    lock = os.open(staging, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    before.append(staging)
    before.sort()
    refused("another merge", adapter)
    os.close(lock)


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("llama", {"num_hidden_layers": 1}),
        ("llama", {"num_hidden_layers": 3}),
        ("llama", {"hidden_size": 64}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, kind: str, other: dict[str, Any], capsys: Any
) -> None:
    adapter = make_adapter(
        make_base(tmp_path / "base", "llama"), tmp_path / "adapter", target_modules=["q_proj"]
    )
    base = make_base(tmp_path / "other", kind, **other)
    code = merge(adapter, "-o", tmp_path / "m", "--base", base)
    said = capsys.readouterr().err.splitlines()
    assert code == 2 and "does not belong to this model" in said[-2] and said[-1].startswith("hint: ")
    assert not (tmp_path / "m").exists()


def test_a_stop_or_a_kill_leaves_nothing_half_written(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from executor import merge as module

    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter")
    original = module.write_shard

    def stop_in_the_second(shard: Any, changes: Any, target: Path, done: Any) -> list[str]:
        if list(target.parent.iterdir()):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(shard, changes, target, done)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", stop_in_the_second)
        assert merge(adapter, "-o", tmp_path / "m") == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    killed = tmp_path / ".m.merging"
    killed.mkdir()
    (killed / "model-00001-of-00009.safetensors").write_bytes(b"half")
    assert merge(adapter, "-o", tmp_path / "m") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "m"]
    assert not (tmp_path / "m" / "model-00001-of-00009.safetensors").exists()


def test_other_bases_are_refused_by_what_they_store(tmp_path: Path, capsys: Any) -> None:
    from safetensors.torch import load_file, save_file

    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    for shard in read_shards(base):
        state = {
            n: t.to(torch.float8_e4m3fn) if "q_proj" in n else t for n, t in load_file(shard.path).items()
        }
        save_file(state, shard.path, metadata={"format": "pt"})
    assert merge(adapter, "-o", tmp_path / "m") == 2
    assert "is stored as F8_E4M3" in capsys.readouterr().err
    (base / read_shards(base)[0].path.name).unlink()
    assert merge(adapter, "-o", tmp_path / "m") == 2
    assert "is missing" in capsys.readouterr().err and not (tmp_path / "m").exists()
