"""Training in every way: resumed to the same bytes, schedules, small data, evaluation, curves."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import make_plan, strategy

from executor.cli import main
from executor.tiny import write_tiny_model
from planner.types import Workload

pytestmark = pytest.mark.executor
ADAPTER, MODEL = "adapter/adapter_model.safetensors", "model/model.safetensors"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers and 13 rows of several lengths: with batches of two and three the last one is incomplete."""
    folder = tmp_path_factory.mktemp("small") / "model"
    write_tiny_model(folder, layers=2, hidden=64)
    rows = [{"prompt": f"{n} and {n}", "completion": " make " + "x" * (2 * n)} for n in range(1, 14)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def plan_of(folder: Path, model: Path, work: dict[str, Any], how: dict[str, Any]) -> Path:
    workload = Workload(task="train", **{"seq_len": 64, "batch_size": 2, "method": "lora", **work})
    return make_plan(folder / "plan.json", model, workload, strategy(**how))


def run(plan: Path, model: Path, output: Path, *more: Any) -> dict[str, Any]:
    data = ["--dataset", model / "data.jsonl", "--output", output, "--seed", 1]
    assert main(["run", *map(str, [plan, *data, *more])]) == 0
    return dict(json.loads((output / "report.json").read_text()))


def cut(whole: Path, target: Path, step: int) -> Path:
    """The folder of a run as a kill after `step` would have left it."""
    shutil.copytree(whole, target)
    for name in ("adapter", "model"):
        shutil.rmtree(target / name, ignore_errors=True)
    (target / "report.json").unlink()
    state = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps({**state, "status": "unfinished"}))
    for checkpoint in target.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    assert (target / f"checkpoint-{step}").is_dir()
    return target


def test_operations_are_counted_as_trainer_does_from_one_walk_over_the_parameters() -> None:
    torch = pytest.importorskip("torch")
    from transformers import Trainer

    from executor.trainer import RunTrainer

    walks = []

    class Model:
        main_input_name = "input_ids"

        def num_parameters(self, **_: Any) -> int:
            walks.append(1)
            return 1_000_003

        def floating_point_ops(self, inputs: Any) -> int:
            return 6 * int(inputs["input_ids"].numel()) * self.num_parameters()

    stock, ours = Trainer.__new__(Trainer), RunTrainer.__new__(RunTrainer)
    stock.model = ours.model = Model()
    ours._operations_per_token = None
    batches = [{"input_ids": torch.zeros(shape, dtype=torch.long)} for shape in ((2, 7), (1, 64), (3, 5))]
    want = [stock.floating_point_ops(batch) for batch in batches]
    walks.clear()
    assert [ours.floating_point_ops(batch) for batch in batches] == want and len(walks) == 1


# an epoch has 7 batches of two, or 4 steps of two such batches, or fewer where rows are packed or held out
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[Any, ...]]] = {
    "lora": ({"lora_dropout": 0.3}, {}, ()),
    "dora": ({"lora_variant": "dora", "lora_dropout": 0.1}, {}, ()),
    "rslora bf16": ({"lora_variant": "rslora", "adapter_dtype": "bf16"}, {}, ("--lr-schedule", "cosine")),
    "qlora": ({"method": "qlora"}, {"quant": "nf4", "optimizer": "paged_adamw_8bit"}, ()),
    "qlora dora": ({"method": "qlora", "lora_variant": "dora"}, {"quant": "nf4"}, ()),
    "qlora int8": ({"method": "qlora"}, {"quant": "int8"}, ()),
    "full 8-bit": ({"method": "full"}, {"optimizer": "adamw_8bit"}, ()),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"loss": "fused"}, ("--warmup-ratio", 0.3)),
    "packing": ({"lora_targets": "attention"}, {}, ("--packing", "--eval-split", 0.2)),
}
STEPS = {"lora": (5, 7, 12), "accumulation": (4, 5)}
"""Where to break off: within an epoch, at its end, and with only the result missing."""


@pytest.mark.parametrize("way", WAYS)
def test_resumed_runs_end_with_the_bytes_of_unbroken_ones(
    tmp_path: Path, small: Path, way: str, monkeypatch: Any
) -> None:
    from executor import trainer

    monkeypatch.setattr(trainer, "KEPT_CHECKPOINTS", 12)
    work, how, more = WAYS[way]
    plan = plan_of(tmp_path, small, work, how)
    more = (*more, "--max-steps", 12, "--save-steps", 1)
    first = run(plan, small, tmp_path / "whole", *more)
    result = MODEL if work.get("method") == "full" else ADAPTER
    for step in STEPS.get(way, (6,)):
        part = cut(tmp_path / "whole", tmp_path / f"cut-{step}", step)
        resumed = run(plan, small, part, *more)
        assert resumed["resumed_from_step"] == step and resumed["steps"] == 12
        assert resumed["losses"] == first["losses"] and len(set(first["losses"])) == 12
        assert len(first["step_seconds"]) == 12 and min(first["step_seconds"]) > 0
        assert len(resumed["step_seconds"]) == 12 - step, "those of this process"
        same = (tmp_path / "whole" / result).read_bytes() == (part / result).read_bytes()
        assert same, f"resumed from step {step}"
        assert resumed["notes"] == first["notes"]


@pytest.mark.parametrize("step", [6, 8])
def test_a_stop_loses_no_evaluation(tmp_path: Path, small: Path, monkeypatch: Any, step: int) -> None:
    """Neither of a step at which it comes instead of the evaluation, nor of the last."""
    from executor.trainer import RunTrainer

    plan = plan_of(tmp_path, small, {"lora_dropout": 0.3}, {})
    more = ("--eval-split", 0.4, "--max-steps", 8, "--save-steps", 3)
    whole = run(plan, small, tmp_path / "whole", *more)
    take_step = RunTrainer.take_step

    def stopping(trainer: RunTrainer) -> tuple[float, int]:
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "take_step", stopping)
        asked = [
            "run",
            plan,
            "--dataset",
            small / "data.jsonl",
            "--output",
            tmp_path / "o",
            "--seed",
            1,
            *more,
        ]
        assert main([str(argument) for argument in asked]) == (130 if step < 8 else 0)
    again = run(plan, small, tmp_path / "o", *more)
    assert [entry["step"] for entry in whole["evaluations"]] == [3, 6, 8]
    assert again["evaluations"] == whole["evaluations"] and again["losses"] == whole["losses"]


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_other_weights_under_a_resumed_run_are_said(
    tmp_path: Path, small: Path, capsys: Any, quant: str
) -> None:
    """The checkpoint of an adapter holds nothing of the model below it."""
    model = tmp_path / "model"
    shutil.copytree(small, model)
    plan = plan_of(tmp_path, model, {"method": "qlora" if quant == "nf4" else "lora"}, {"quant": quant})
    more = ("--max-steps", 4, "--save-steps", 2)
    run(plan, model, tmp_path / "whole", *more)
    same = run(plan, model, cut(tmp_path / "whole", tmp_path / "same", 2), *more)
    assert not any("frozen weights" in note for note in same["notes"])
    write_tiny_model(model, layers=2, hidden=64, seed=1)
    other = run(plan, model, cut(tmp_path / "whole", tmp_path / "other", 2), *more)
    assert any("other frozen weights" in note for note in other["notes"])
    assert "warning: resumed over other frozen weights" in capsys.readouterr().err


def test_a_resumed_run_takes_the_threads_of_the_first(tmp_path: Path) -> None:
    import torch

    model = tmp_path / "model"  # of a size at which four threads give other sums than one, on some CPUs
    write_tiny_model(model, layers=1, hidden=256)
    (model / "data.jsonl").write_text("".join(json.dumps({"text": "abc " * n}) + "\n" for n in range(40, 60)))
    plan = plan_of(
        tmp_path,
        model,
        {"method": "full", "seq_len": 200, "batch_size": 1},
        {"dtype": "fp32", "gradient_checkpointing": False},
    )
    more = ("--max-steps", 8, "--save-steps", 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run(plan, model, tmp_path / "whole", *more)
        torch.set_num_threads(4)
        report = run(plan, model, cut(tmp_path / "whole", tmp_path / "cut", 4), *more)
        assert report["environment"]["threads"] == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "cut" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()


def test_other_versions_on_resume_are_said_and_not_refused() -> None:
    import torch

    from executor.continuity import go_on_as, numerics

    device = torch.device("cpu")
    now = numerics(device)
    assert go_on_as(now, device) == [] == go_on_as({}, device)
    before = {**now, "libraries": {**now["libraries"], "torch": "2.9.0"}, "instructions": "NO AVX"}
    (line,) = go_on_as(before, device)
    assert f"torch 2.9.0 → {now['libraries']['torch']}" in line and "instructions NO AVX → " in line


@pytest.mark.parametrize(
    ("schedule", "warm", "expected"),
    [
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 0.25, [0.0, 1.0, 2 / 3, 1 / 3]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
        ("constant", 0.0, [1.0] * 4),
        ("constant", 0.5, [0.0, 0.5, 1.0, 1.0]),
        ("constant_with_warmup", 0.5, [0.0, 0.5, 1.0, 1.0]),
    ],
)
def test_schedules(
    tmp_path: Path, small: Path, monkeypatch: Any, schedule: str, warm: float, expected: list[float]
) -> None:
    from executor.trainer import RunCallback

    rates: list[float] = []
    original = RunCallback.on_pre_optimizer_step

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        rates.append(kwargs["optimizer"].param_groups[0]["lr"])
        original(self, *args, **kwargs)

    monkeypatch.setattr(RunCallback, "on_pre_optimizer_step", note)
    plan = plan_of(tmp_path, small, {}, {})
    more = ("--lr-schedule", schedule, "--warmup-ratio", warm, "--learning-rate", 0.01, "--max-steps", 4)
    run(plan, small, tmp_path / "o", *more)
    assert rates == pytest.approx([0.01 * part for part in expected])


@pytest.mark.parametrize(
    ("batch", "accumulation", "epochs", "steps"),
    [(2, 1, 1, 7), (2, 2, 2, 8), (3, 4, 1, 2), (64, 1, 3, 3), (2, 64, 2, 2), (2, 1, 0.5, 4), (2, 1, 1.5, 11)],
)
def test_steps_of_incomplete_batches_small_datasets_and_part_epochs(
    tmp_path: Path, small: Path, batch: int, accumulation: int, epochs: float, steps: int
) -> None:
    work = {"batch_size": batch, "gradient_accumulation_steps": accumulation}
    report = run(plan_of(tmp_path, small, work, {}), small, tmp_path / "o", "--epochs", epochs)
    assert report["steps"] == len(report["losses"]) == steps


def test_a_step_is_the_same_however_it_is_cut_into_batches(tmp_path: Path, small: Path) -> None:
    """Every learned token weighs the same: 13 rows as one batch, or as batches of 3, 3, 3, 3 and 1."""
    losses = []
    for number, (batch, accumulation) in enumerate(((13, 1), (3, 5))):
        folder = tmp_path / str(number)
        folder.mkdir()
        work = {"batch_size": batch, "gradient_accumulation_steps": accumulation, "lora_dropout": 0.0}
        plan = plan_of(folder, small, work, {"dtype": "fp32"})
        losses.append(run(plan, small, folder / "o", "--epochs", 3, "--learning-rate", 0.01)["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_held_out_loss_is_a_mean_over_tokens(tmp_path: Path, small: Path) -> None:
    """Equal to the loss of the merged model over the held-out rows in one go."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from executor.batches import split
    from executor.examples import prepare
    from executor.rows import read_examples

    plan = plan_of(tmp_path, small, {"method": "full"}, {"dtype": "fp32"})
    more = ("--eval-split", 0.4, "--epochs", 2, "--save-steps", 3)
    report = run(plan, small, tmp_path / "o", *more)
    (note,) = [n for n in report["notes"] if n.startswith("evaluation loss")]
    assert "after step 8 over 5 held-out" in note
    assert [entry["step"] for entry in report["evaluations"]] == [3, 6, 8]
    progress = json.loads((tmp_path / "o" / "checkpoint-8" / "progress.json").read_text())
    assert [step for step, _ in progress["evaluations"]] == [3, 6, 8]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o" / "model")
    tokenizer = AutoTokenizer.from_pretrained(small)
    data = small / "data.jsonl"
    _, held = split(prepare(data, read_examples(data), tokenizer, 64).examples, 0.4, 1)
    total, count = 0.0, 0
    for example in held:
        learned = sum(label != -100 for label in example.labels[1:])
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        total, count = total + float(model(input_ids=ids, labels=labels).loss) * learned, count + learned
    assert progress["evaluations"][-1][1] == pytest.approx(total / count, rel=1e-5)


def test_packing_counts_no_padding_as_tokens(tmp_path: Path, small: Path, monkeypatch: Any) -> None:
    from executor.trainer import RunTrainer

    counted: list[int] = []
    original = RunTrainer.take_step

    def note(self: Any) -> tuple[float, int]:
        loss, tokens = original(self)
        counted.append(tokens)
        return loss, tokens

    monkeypatch.setattr(RunTrainer, "take_step", note)
    tokens = []
    for number, more in enumerate(((), ("--packing",))):
        (tmp_path / str(number)).mkdir()
        plan = plan_of(tmp_path / str(number), small, {"seq_len": 100}, {})
        report = run(plan, small, tmp_path / str(number) / "o", *more)
        assert report["steps"] == (7, 2)[number]
        tokens.append(sum(counted))
        counted.clear()
    assert tokens[0] == tokens[1]


def test_curves_can_be_read_back_and_go_on_after_a_kill(tmp_path: Path, small: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = plan_of(tmp_path, small, {}, {})
    more = ("--report-to", "tensorboard", "--max-steps", 6, "--save-steps", 2, "--eval-split", 0.2)
    run(plan, small, tmp_path / "o", *more)
    report = run(plan, small, cut(tmp_path / "o", tmp_path / "cut", 4), *more)
    assert report["resumed_from_step"] == 4 and len(list((tmp_path / "cut" / "logs").iterdir())) == 2
    curves = EventAccumulator(str(tmp_path / "cut" / "logs")).Reload()
    assert sorted(curves.Tags()["scalars"]) == [
        "eval/loss", "train/learning_rate", "train/loss", "train/tokens_per_s",
    ]  # fmt: skip
    points = curves.Scalars("train/loss")
    assert [p.step for p in points] == [1, 2, 3, 4, 5, 6]
    assert [p.value for p in points] == pytest.approx(report["losses"])
    rates = [p.value for p in curves.Scalars("train/learning_rate")]
    assert rates == pytest.approx([2e-4 * (1 - i / 6) for i in range(6)])
    assert all(p.value > 0 for p in curves.Scalars("train/tokens_per_s"))
    assert [p.step for p in curves.Scalars("eval/loss")] == [2, 4, 6]


@pytest.mark.parametrize("bits", ["32bit", "8bit"])
def test_an_optimizer_that_pages_everywhere_runs_unpaged_on_the_cpu(
    tmp_path: Path, tiny: Path, bits: str
) -> None:
    """With weights large enough for bitsandbytes to ask for managed memory, which no CPU has."""
    paged = plan_of(tmp_path, tiny, {"method": "full"}, {"optimizer": f"paged_ademamix_{bits}"})
    report = run(paged, tiny, tmp_path / "o", "--max-steps", 1)
    assert report["steps"] == 1 and any("ran unpaged" in note for note in report["notes"])


def test_tensorboard_missing_is_one_line(tmp_path: Path, small: Path, monkeypatch: Any, capsys: Any) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "tensorboard" else found(n, *a)
    )
    plan = plan_of(tmp_path, small, {}, {})
    args = [plan, "--dataset", small / "data.jsonl", "--output", tmp_path / "o", "--report-to", "tensorboard"]
    assert main(["run", *map(str, args)]) == 2
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said == ["error: tensorboard is not installed", "hint: pip install tensorboard"]


def test_learning_rate_of_help_is_that_of_the_run(capsys: Any) -> None:
    from executor.options import LEARNING_RATE

    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"default: {LEARNING_RATE['lora']:g}; method full: {LEARNING_RATE['full']:g}" in text
