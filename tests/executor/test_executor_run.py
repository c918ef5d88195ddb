"""Whole runs on a tiny model: every method, generation, reports, resuming, refusing."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import digest, make_plan, strategy

from executor.cli import main
from planner.types import RunReport, Workload

pytestmark = pytest.mark.executor
TRAIN = {"task": "train", "seq_len": 64, "batch_size": 2}


def train_plan(folder: Path, tiny: Path, method: str = "qlora", **changes: Any) -> Path:
    how = {"quant": "nf4" if method == "qlora" else "none", **changes}
    return make_plan(folder / "plan.json", tiny, Workload(**TRAIN, method=method), strategy(**how))


def run(*args: Any) -> int:
    return main(["run", *map(str, args)])


def train(plan: Path, tiny: Path, output: Path, *more: Any, steps: int = 8) -> RunReport:
    code = run(plan, "--dataset", tiny / "data.jsonl", "--output", output, "--max-steps", steps, *more)
    assert code == 0
    return msgspec.json.decode((output / "report.json").read_bytes(), type=RunReport, strict=True)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("qlora", {"optimizer": "paged_adamw_8bit"}),
        ("lora", {"loss": "fused"}),
        ("full", {"gradient_checkpointing": False, "optimizer": "adamw_torch"}),
    ],
)
def test_training_learns_and_reports(
    tmp_path: Path, tiny: Path, method: str, changes: dict[str, Any]
) -> None:
    output = tmp_path / "o"
    report = train(train_plan(tmp_path, tiny, method, **changes), tiny, output, steps=20)
    assert report.steps == 20 == len(report.losses) and report.losses[-1] < report.losses[0]
    assert (report.status, report.engine, report.candidate, report.resumed_from_step) == (
        "finished",
        "resident",
        1,
        0,
    )
    assert (report.layers_resident, report.layers_streamed, report.allocated_peak_bytes) == (4, 0, None)
    assert report.host_peak_bytes and report.train_tokens_per_s and report.environment["libraries"]["torch"]
    assert report.error["ram_bytes"] == report.host_peak_bytes / 10**9 - 1
    assert [p.name for p in output.glob("checkpoint-*")] and not (output / ".partial").exists()
    _loads_with_plain_libraries(tiny, output, method)


def _loads_with_plain_libraries(tiny: Path, output: Path, method: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny)
    before = base(input_ids=ids).logits
    if method == "full":
        after = AutoModelForCausalLM.from_pretrained(output / "model")(input_ids=ids).logits
        assert json.loads((output / "model" / "config.json").read_text())["use_cache"] is True
    else:
        after = PeftModel.from_pretrained(base, output / "adapter")(input_ids=ids).logits
    assert not torch.equal(before, after)


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path, tiny: Path) -> None:
    plan = train_plan(tmp_path, tiny)
    adapters = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(plan, tiny, tmp_path / name, "--seed", seed, steps=3)
        adapters.append(digest(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert adapters[0] == adapters[1] != adapters[2]


def test_resume_from_any_checkpoint_ends_with_the_same_bytes(tmp_path: Path, tiny: Path) -> None:
    plan = train_plan(tmp_path, tiny)
    epochs = ("--seed", 1, "--save-steps", 5)  # 48 steps are one pass over the data: the run crosses it
    whole = train(plan, tiny, tmp_path / "whole", *epochs, steps=55)
    for kept in ("checkpoint-50", "checkpoint-55"):
        cut = tmp_path / f"cut-{kept}"
        shutil.copytree(tmp_path / "whole", cut)
        for name in {"checkpoint-50", "checkpoint-55"} - {kept}:
            if name > kept:
                shutil.rmtree(cut / name)
        shutil.rmtree(cut / "adapter")
        state = json.loads((cut / "run.json").read_text())
        (cut / "run.json").write_text(json.dumps({**state, "status": "unfinished"}))
        report = train(plan, tiny, cut, *epochs, steps=55)
        assert report.resumed_from_step == int(kept.split("-")[1])
        assert report.losses == whole.losses and report.steps == 55
        same = [digest(d / "adapter/adapter_model.safetensors") for d in (tmp_path / "whole", cut)]
        assert same[0] == same[1]


def test_finished_run_is_shown_and_not_repeated(tmp_path: Path, tiny: Path, capsys: Any) -> None:
    plan = train_plan(tmp_path, tiny)
    first = train(plan, tiny, tmp_path / "o", steps=2)
    stamp = (tmp_path / "o" / "report.json").stat().st_mtime_ns
    capsys.readouterr()
    second = train(plan, tiny, tmp_path / "o", "--json", steps=2)
    assert second == first and (tmp_path / "o" / "report.json").stat().st_mtime_ns == stamp
    assert json.loads(capsys.readouterr().out)["schema"] == "fitwright.run/1"
    again = train(plan, tiny, tmp_path / "o", "--restart", steps=3)
    assert again.steps == 3


def test_other_settings_plan_and_lock_are_refused(tmp_path: Path, tiny: Path, capsys: Any) -> None:
    plan, output = train_plan(tmp_path, tiny), tmp_path / "o"
    train(plan, tiny, output, steps=2)
    same = (plan, "--dataset", tiny / "data.jsonl", "--output", output, "--max-steps")
    assert run(*same, 3) == 2
    assert "max_steps was 2, now 3" in capsys.readouterr().err
    (tmp_path / "p").mkdir()
    other = train_plan(tmp_path / "p", tiny, "lora")
    assert run(other, *same[1:], 2) == 2
    assert "another plan" in capsys.readouterr().err
    with open(output / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(*same, 2) == 2
    assert "another run is working" in capsys.readouterr().err


def test_packing_evaluation_split_and_accumulation(tmp_path: Path, tiny: Path) -> None:
    workload = Workload(**{**TRAIN, "seq_len": 128}, method="lora", gradient_accumulation_steps=2)
    plan = make_plan(tmp_path / "plan.json", tiny, workload, strategy())
    report = train(
        plan, tiny, tmp_path / "o", "--packing", "--eval-split", 0.25, "--lr-schedule", "cosine", steps=3
    )
    assert len(report.losses) == 3
    assert any(note.startswith("packed into") for note in report.notes)
    assert any(note.startswith("evaluation loss") and "24 held-out" in note for note in report.notes)


@pytest.mark.parametrize("variant", ["dora", "rslora"])
def test_adapter_variants(tmp_path: Path, tiny: Path, variant: str) -> None:
    workload = Workload(
        **TRAIN, method="lora", lora_variant=variant, lora_targets="attention", adapter_dtype="bf16"
    )
    plan = make_plan(tmp_path / "plan.json", tiny, workload, strategy(dtype="bf16"))
    train(plan, tiny, tmp_path / "o", steps=2)
    config = json.loads((tmp_path / "o" / "adapter" / "adapter_config.json").read_text())
    assert config[f"use_{variant}"] is True
    assert (
        all("self_attn" in name for name in config["target_modules"]) and len(config["target_modules"]) == 16
    )


def infer_plan(folder: Path, tiny: Path, **changes: Any) -> Path:
    workload = Workload(task="infer", prompt_tokens=48, new_tokens=12, batch_size=2)
    return make_plan(folder / "plan.json", tiny, workload, strategy(**changes))


def outputs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_generation(tmp_path: Path, tiny: Path, quant: str, capsys: Any) -> None:
    plan = infer_plan(tmp_path, tiny, quant=quant)
    prompts = ("--prompt", "one", "--prompt", "a second, longer one", "--prompt", "three")
    assert run(plan, *prompts, "--greedy", "--output", tmp_path / "o", "--json") == 0
    rows = outputs(tmp_path / "o")
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row["prompt"] for row in rows] == list(prompts[1::2])
    for row in rows:
        assert row.keys() == {"index", "prompt", "text", "tokens", "finish_reason"}
        assert 1 <= row["tokens"] <= 12 and row["finish_reason"] == (
            "length" if row["tokens"] == 12 else "stop"
        )
    report = json.loads(capsys.readouterr().out)
    assert (
        report["task"] == "infer" and report["decode_tokens_per_s"] > 0 and report["prefill_tokens_per_s"] > 0
    )
    assert report["losses"] == [] and report["steps"] is None


def test_greedy_batch_equals_greedy_alone_in_fp32(tmp_path: Path, tiny: Path) -> None:
    plan = infer_plan(tmp_path, tiny, dtype="fp32")
    assert (
        run(plan, "--prompt", "one", "--prompt", "much longer two", "--greedy", "--output", tmp_path / "o")
        == 0
    )
    assert run(plan, "--prompt", "one", "--greedy", "--output", tmp_path / "p") == 0
    assert outputs(tmp_path / "o")[0]["text"] == outputs(tmp_path / "p")[0]["text"]


@pytest.mark.parametrize("left", [2, 3])
def test_interrupted_generation_goes_on_with_the_same_draws(tmp_path: Path, tiny: Path, left: int) -> None:
    """Also where a failing disk has spoilt a line in the middle of a batch of two."""
    plan = infer_plan(tmp_path, tiny)
    rows = [{"prompt": f"question {i}"} for i in range(5)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampled = (plan, "--prompts", file, "--temperature", 1.0, "--top-p", 0.9, "--seed", 3, "--output")
    assert run(*sampled, tmp_path / "whole") == 0
    assert run(*sampled, tmp_path / "cut") == 0
    lines = (tmp_path / "cut" / "outputs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "outputs.partial.jsonl").write_text("".join(lines[:left]))
    for name in ("outputs.jsonl", "report.json"):
        (tmp_path / "cut" / name).unlink()
    assert run(*sampled, tmp_path / "cut") == 0
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")


def test_rehearsal_needs_no_weights_and_leaves_no_model(tmp_path: Path, tiny: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny / "config.json", bare)
    for plan in (train_plan(tmp_path, bare), infer_plan(tmp_path, bare, quant="nf4")):
        output = tmp_path / f"o-{plan.stat().st_mtime_ns}"
        assert main(["rehearse", str(plan), "--output", str(output), "--max-steps", "2"]) == 0
        assert sorted(p.name for p in output.iterdir() if p.name != ".lock") == ["report.json", "run.json"]


def test_later_candidate_is_taken_after_out_of_memory(
    tmp_path: Path, tiny: Path, monkeypatch: Any, capsys: Any
) -> None:
    import torch

    from executor.engines import resident

    def load(request: Any) -> Any:
        if request.candidate.rank < 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return original(request)

    original = resident.load
    monkeypatch.setattr(resident, "load", load)
    ways = (strategy(), strategy(quant="int8"), strategy(quant="nf4"))
    workload = Workload(task="infer", prompt_tokens=16, new_tokens=4)
    plan = make_plan(tmp_path / "plan.json", tiny, workload, *ways)
    assert run(plan, "--prompt", "x", "--output", tmp_path / "o", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["candidate"] == 3 and len(report["skipped"]) == 2
    assert report["skipped"][0].startswith("candidate 1: out of memory in load")
    assert run(plan, "--prompt", "x", "--candidate", "1", "--output", tmp_path / "p") == 3
    assert "out of memory on every candidate" in capsys.readouterr().err
