"""When memory runs out: everything is released, the line that was too small named, the next way taken."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from conftest import make_plan, strategy

from executor.cli import main
from executor.ladder import forget_frames, release
from executor.memory_errors import Shortage, is_out_of_memory, shortage
from executor.output import OutputDirectory
from executor.predicted_lines import lines_at
from planner.plan import make_plan as planned
from planner.types import Plan, Workload

pytestmark = pytest.mark.executor
MIB = 2**20
TRAIN = Workload(task="train", seq_len=64, batch_size=2, method="lora")
CUDA = (
    "CUDA out of memory. Tried to allocate {asked} MiB. GPU 0 has a total capacity of 8.00 GiB of which "
    "{free} MiB is free. {allowed}Of the allocated memory {allocated} MiB is allocated by PyTorch, and "
    "10.00 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large"
)


def out_of_memory(asked: int = 100, free: int = 50, allocated: int = 900, allowed: int | None = None) -> Any:
    """As torch words it."""
    import torch

    cap = "" if allowed is None else f"{allowed}.00 MiB allowed; "
    return torch.OutOfMemoryError(CUDA.format(asked=asked, free=free, allocated=allocated, allowed=cap))


def test_embeddings_known_to_8_bit_optimizers_are_let_go_of() -> None:
    import bitsandbytes
    import torch

    embedding = torch.nn.Embedding(4, 4)
    gone = weakref.ref(embedding)
    # as transformers' Trainer does for every embedding
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    del embedding
    assert gone() is not None
    release()
    assert gone() is None


def test_frames_of_every_linked_error_are_let_go_of() -> None:
    """An error that was raised while another was handled keeps the other's frames too, however far back."""
    kept = []

    def fails(depth: int) -> None:
        tensor = Held()
        kept.append(weakref.ref(tensor))
        if depth == 0:
            raise MemoryError
        try:
            fails(depth - 1)
        except (MemoryError, RuntimeError):
            raise RuntimeError from None

    try:
        fails(3)
    except RuntimeError as error:
        assert all(ref() is not None for ref in kept) and len(kept) == 4
        forget_frames(error)
        gc.collect()
        assert all(ref() is None for ref in kept)


class Held:
    """Stands for a tensor in the locals of a function."""


# --------------------------------------------------------------------------- what was too small


@pytest.fixture(scope="module")
def real() -> Plan:
    """The planner's own plan of a QLoRA on a card: its lines are those of a user's plan."""
    from planner.machine import machine_from_gpus
    from profiles.catalogue import load_model
    from profiles.hardware import load_gpu

    machine = machine_from_gpus([(load_gpu("rtx-4090"), 1)])
    job, pinned = Workload(task="train", seq_len=1024), {"loss": "full", "kernels": "torch"}
    return planned(load_model("qwen2.5-0.5b"), machine, job, pinned=pinned)


@pytest.mark.parametrize("moment", ["forward", "loss", "backward", "optimizer_step", "load"])
def test_the_lines_of_every_moment_add_up_to_the_plans_figure(real: Plan, moment: str) -> None:
    candidate = real.candidates[0]
    lines = lines_at(real, candidate, moment)
    assert lines and sum(lines.values()) == candidate.estimate.gpus[0].moments[moment]


@pytest.mark.parametrize("task", ["train", "infer"])
def test_so_do_those_of_a_model_that_streams(task: str) -> None:
    from planner.machine import machine_from_gpus
    from profiles.catalogue import load_model

    machine = machine_from_gpus([], vram_bytes=3 * 2**30, ram_bytes=64 * 2**30)
    pinned = {"quant": "nf4", "placement": "mixed_offload"}
    streams = planned(load_model("llama-3.1-8b"), machine, Workload(task=task), pinned=pinned)
    candidate = streams.candidates[0]
    assert candidate.engine == "stream"
    for moment, predicted in candidate.estimate.gpus[0].moments.items():
        lines = lines_at(streams, candidate, moment)
        assert sum(lines.values()) == predicted and (moment == "load" or lines["slots"])


def at(real: Plan, moment: str, over: int, **held: int) -> Shortage:
    """Out of memory so many MiB beyond what is predicted for the moment."""
    candidate = real.candidates[0]
    total = candidate.estimate.gpus[0].moments[moment] // MIB
    error = out_of_memory(asked=100, allocated=total - 100 + over, allowed=total)
    return shortage(error, real, candidate, moment, held=held)


def test_the_line_of_the_moment_is_named_with_predicted_and_needed(real: Plan) -> None:
    found = at(real, "loss", over=300)
    predicted = lines_at(real, real.candidates[0], "loss")["logits and loss"]
    assert found.line == "logits and loss" and found.line_predicted_bytes == predicted
    assert found.line_wanted_bytes is not None
    assert abs(found.line_wanted_bytes - predicted - 300 * MIB) <= MIB
    said = str(found)
    assert said.startswith("out of memory in loss: logits and loss: predicted") and "\n" not in said


def test_a_line_that_was_measured_is_blamed_for_its_own_part(real: Plan) -> None:
    weights = lines_at(real, real.candidates[0], "loss")["weights"]
    found = at(real, "loss", over=300, weights=weights + 290 * MIB)
    assert (found.line, found.line_wanted_bytes) == ("weights", weights + 290 * MIB)


def test_where_nothing_was_too_small_the_room_was(real: Plan) -> None:
    found = at(real, "loss", over=-50)
    assert found.line_wanted_bytes is None and "no line was under-estimated" in str(found)
    assert "there was room for" in str(found) and "the largest is" in str(found)


def test_a_message_without_figures_is_passed_on(real: Plan) -> None:
    import torch

    found = shortage(
        torch.OutOfMemoryError("CUDA error: out of memory"), real, real.candidates[0], "backward"
    )
    assert "the largest line is" in str(found) and "CUDA error: out of memory" in str(found)
    bare = shortage(MemoryError(), real, real.candidates[0], None)
    assert str(bare).startswith("out of memory in load")


def test_what_counts_as_out_of_memory() -> None:
    wrapped = ValueError("loading failed")
    wrapped.__cause__ = out_of_memory()
    assert is_out_of_memory(out_of_memory()) and is_out_of_memory(MemoryError()) and is_out_of_memory(wrapped)
    assert is_out_of_memory(
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
    )
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("memory"))


# --------------------------------------------------------------------------- the next candidate


@pytest.fixture
def fails_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`fails_at(rank, step)`: training of candidate `rank` runs out of memory in the loss of that step."""
    from executor import attempt
    from executor.trainer import RunTrainer

    now = {}
    failing: dict[int, int] = {}
    models: list[Any] = []
    run, step = attempt.Attempt.run, RunTrainer.training_step

    def noting(self: Any) -> Any:
        now["rank"] = self.candidate.rank
        # everything of the candidates before must be gone before the next one is loaded
        assert all(model() is None for model in models)
        return run(self)

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        models.append(weakref.ref(self.model))
        if self.state.global_step + 1 == failing.get(now["rank"]):
            self.meter.enter("loss")
            raise out_of_memory()
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(attempt.Attempt, "run", noting)
    monkeypatch.setattr(RunTrainer, "training_step", training_step)
    return failing.__setitem__


def train(folder: Path, tiny: Path, *ways: Any, code: int = 0) -> dict[str, Any]:
    gc.collect()
    plan = folder / "plan.json"
    if ways:
        make_plan(plan, tiny, TRAIN, *ways)
    options = ["--max-steps", "6", "--save-steps", "2", "--output", str(folder / "o"), "--json"]
    assert main(["run", str(plan), "--dataset", str(tiny / "data.jsonl"), *options]) == code
    report = folder / "o" / "report.json"
    return dict(json.loads(report.read_text())) if code == 0 else {}


FUSED = strategy(optimizer="adamw_torch_fused")
PLAIN = strategy(optimizer="adamw_torch", loss="fused")
OTHER = strategy(optimizer="adamw_8bit")


def test_the_next_candidate_goes_on_from_the_checkpoint(
    tmp_path: Path, tiny: Path, fails_at: Any, capsys: Any
) -> None:
    fails_at(1, 4)
    report = train(tmp_path, tiny, FUSED, PLAIN)
    assert (report["candidate"], report["resumed_from_step"], report["steps"]) == (2, 2, 6)
    assert len(report["losses"]) == 6
    assert report["skipped"][0].startswith("candidate 1: out of memory in loss: ")
    said = capsys.readouterr().err
    assert "resuming from step 2 of 6" in said and "could not be given back" not in said
    assert not list((tmp_path / "o").glob(".left/*")) and not gc.garbage


def test_another_optimizers_state_is_not_used_and_not_lost(
    tmp_path: Path, tiny: Path, fails_at: Any, capsys: Any
) -> None:
    fails_at(1, 4)
    fails_at(2, 1)
    train(tmp_path, tiny, FUSED, OTHER, code=3)
    said = capsys.readouterr()
    assert "training begins again" in said.err and said.out == ""
    assert (tmp_path / "o" / ".left" / "adamw" / "checkpoint-2").is_dir()
    # more memory now: the first candidate goes on where it was
    fails_at(1, 0)
    report = train(tmp_path, tiny)
    assert (report["candidate"], report["resumed_from_step"]) == (1, 2)
    assert not (tmp_path / "o" / ".left").exists()


def test_all_gone_ends_with_a_table_and_exit_3(
    tmp_path: Path, tiny: Path, fails_at: Any, capsys: Any
) -> None:
    fails_at(1, 1)
    fails_at(2, 1)
    train(tmp_path, tiny, FUSED, PLAIN, code=3)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "Traceback" not in err
    assert lines[-2].startswith("error: out of memory on every candidate tried: candidate 1: ")
    assert lines[-1].startswith("hint: ")
    table = [line.split() for line in lines if line.startswith((" 1: bf16", " 2: bf16"))]
    assert len(table) == 2 and all("loss" in row and "cpu" in row for row in table)
    assert any(line.split()[:3] == ["candidate", "ran", "out"] for line in lines)


def test_a_resumed_run_begins_with_the_candidate_it_had_come_to(
    tmp_path: Path, tiny: Path, fails_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_at(1, 1)
    from executor import trainer

    finish = trainer.RunTrainer._save_checkpoint

    def killed_after(self: Any, *args: Any) -> None:
        finish(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer.RunTrainer, "_save_checkpoint", killed_after)
        train(tmp_path, tiny, FUSED, PLAIN, code=130)
    fails_at(1, 0)  # it would run now, and must not: the run is the second candidate's
    report = train(tmp_path, tiny)
    assert (report["candidate"], report["resumed_from_step"]) == (2, 2)
    assert report["skipped"][0].startswith("candidate 1: out of memory")


def test_loading_that_runs_out_while_quantizing_is_out_of_memory(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import bitsandbytes as bnb

    # transformers notes errors of quantizing in a log and raises another one
    def full(*_: Any, **__: Any) -> Any:
        raise out_of_memory()

    monkeypatch.setattr(bnb.nn.Params4bit, "_quantize", full)
    plan = make_plan(tmp_path / "plan.json", tiny, Workload(prompt_tokens=16, new_tokens=4),
                     strategy(quant="nf4"), strategy())  # fmt: skip
    assert main(["run", str(plan), "--prompt", "x", "--output", str(tmp_path / "o"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["candidate"] == 2 and "out of memory in load" in report["skipped"][0]


def test_checkpoints_come_back_to_the_candidate_that_made_them(tmp_path: Path) -> None:
    output = OutputDirectory(tmp_path)
    output.open("digest", {}, restart=False)
    assert output.take_up(1, (), "adamw") is False
    (tmp_path / "checkpoint-4").mkdir()
    assert output.take_up(2, ("candidate 1: x",), "sgd") is True and not output.checkpoints()
    (tmp_path / "checkpoint-2").mkdir()
    assert output.reached == (2, ("candidate 1: x",))
    assert output.take_up(3, (), "adamw") is True
    assert [p.name for p in output.checkpoints()] == ["checkpoint-4"]
    output.finish()
    assert not (tmp_path / ".left").exists()
    output.close()
