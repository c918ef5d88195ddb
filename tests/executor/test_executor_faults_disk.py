"""Disks that are full and files that were spoilt: one clear line, nothing half-written or lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import fails, make_plan, strategy

from executor.cli import main
from planner.types import Workload

pytestmark = pytest.mark.executor
TRAIN = Workload(task="train", seq_len=64, batch_size=2, method="lora")
INFER = Workload(task="infer", prompt_tokens=32, new_tokens=4)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that takes no more: longer writes fail with an error of the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def train(plan: Path, tiny: Path, output: Path, steps: int = 6) -> list[Any]:
    return [
        plan,
        "--dataset",
        tiny / "data.jsonl",
        "--max-steps",
        steps,
        "--save-steps",
        2,
        "--output",
        output,
    ]


def adapter(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """An unbroken run of six steps, checkpoints after 4 and 6; its plan lies beside it."""
    folder = tmp_path_factory.mktemp("whole")
    plan = make_plan(folder / "plan.json", tiny, TRAIN, strategy())
    assert main(["run", *map(str, train(plan, tiny, folder / "o"))]) == 0
    return folder


def test_no_room_for_a_checkpoint(tmp_path: Path, tiny: Path, whole: Path, capsys: Any) -> None:
    plan, output = whole / "plan.json", tmp_path / "o"
    # optimizer.pt is what does not fit: torch's writer, which hides the system's reason
    size = (whole / "o" / "checkpoint-6" / "adapter_model.safetensors").stat().st_size
    for limit in (size // 2, size + 1000):
        with files_of_at_most(limit):
            said = fails(capsys, *train(plan, tiny, output))
        assert "cannot write" in said and "free)" in said and "free some space" in said
        assert not output.exists()
    assert main(["run", *map(str, train(plan, tiny, output))]) == 0
    assert adapter(output) == adapter(whole / "o")


def unfinished(whole: Path, output: Path, *without: str) -> None:
    """The state of an earlier moment of a finished run."""
    shutil.copytree(whole / "o", output)
    for name in without:
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**state, "status": "unfinished"}))


def test_no_room_for_the_result_keeps_the_last_checkpoint(
    tmp_path: Path, tiny: Path, whole: Path, capsys: Any
) -> None:
    output = tmp_path / "o"
    unfinished(whole, output, "adapter", "report.json", "checkpoint-6")
    with files_of_at_most(50_000):
        said = fails(capsys, *train(whole / "plan.json", tiny, output))
    assert "the same command goes on from the last checkpoint" in said
    assert sorted(p.name for p in output.iterdir() if p.name != ".lock") == ["checkpoint-4", "run.json"]
    assert main(["run", *map(str, train(whole / "plan.json", tiny, output))]) == 0
    assert adapter(output) == adapter(whole / "o")
    assert json.loads((output / "report.json").read_text())["resumed_from_step"] == 4


def test_no_room_for_report_or_answers(
    tmp_path: Path, tiny: Path, whole: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _data: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    output = tmp_path / "o"
    unfinished(whole, output, "adapter", "report.json")
    with monkeypatch.context() as patched:
        patched.setattr("executor.report.write_atomically", full)
        assert "report.json: No space left on device" in fails(
            capsys, *train(whole / "plan.json", tiny, output)
        )
    assert main(["run", *map(str, train(whole / "plan.json", tiny, output))]) == 0
    assert adapter(output) == adapter(whole / "o") and (output / "report.json").exists()
    plan = make_plan(tmp_path / "infer.json", tiny, INFER, strategy())
    with monkeypatch.context() as patched:
        patched.setattr("executor.answering.write_atomically", full)
        assert "No space left" in fails(capsys, plan, "--prompt", "x", "--output", tmp_path / "answers")
    assert not (tmp_path / "answers").exists()


@pytest.mark.parametrize("damage", ["cut", "zeroed", "gone"])
def test_a_damaged_last_checkpoint_is_named_and_the_one_before_taken(
    tmp_path: Path, tiny: Path, whole: Path, damage: str, capsys: Any
) -> None:
    output = tmp_path / "o"
    unfinished(whole, output, "adapter", "report.json")
    victim = output / "checkpoint-6" / "optimizer.pt"
    size = victim.stat().st_size
    os.truncate(victim, size - 1)
    if damage == "zeroed":
        victim.write_bytes(bytes(size))
    if damage == "gone":
        victim.unlink()
    assert main(["run", *map(str, train(whole / "plan.json", tiny, output))]) == 0
    said = capsys.readouterr().err
    assert "checkpoint-6 is damaged: optimizer.pt" in said and "going back to checkpoint-4" in said
    assert adapter(output) == adapter(whole / "o")


def test_a_spoilt_report_or_answers_of_a_broken_off_run(tmp_path: Path, tiny: Path, capsys: Any) -> None:
    plan = make_plan(tmp_path / "plan.json", tiny, INFER, strategy())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(3)))
    output = tmp_path / "o"
    run = [plan, "--prompts", prompts, "--greedy", "--output", output]
    assert main(["run", *map(str, run)]) == 0
    whole = (output / "outputs.jsonl").read_text()
    (output / "report.json").write_text("{")
    assert "cannot read the report" in fails(capsys, *run)
    (output / "report.json").unlink()
    lines = whole.splitlines(keepends=True)
    (output / "outputs.partial.jsonl").write_text(lines[0] + lines[1][:20])
    (output / "outputs.jsonl").unlink()
    assert main(["run", *map(str, run)]) == 0
    assert (output / "outputs.jsonl").read_text() == whole


def test_an_error_nobody_foresaw_is_a_line_too(
    tmp_path: Path, tiny: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strange(*_: Any) -> Any:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("executor.attempt.Attempt.run", strange)
    plan = make_plan(tmp_path / "plan.json", tiny, INFER, strategy())
    said = fails(capsys, plan, "--prompt", "x", "--output", tmp_path / "o")
    assert "(RuntimeError: first line)" in said and "--debug shows where" in said
    with pytest.raises(RuntimeError, match="second line"):
        main(["run", str(plan), "--prompt", "x", "--output", str(tmp_path / "o"), "--debug"])


def test_a_link_in_the_output_is_not_followed(tmp_path: Path, tiny: Path, whole: Path, capsys: Any) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (".partial", "checkpoint-2", ".lock", "adapter"):
        output = tmp_path / f"o-{name}"
        output.mkdir()
        (output / name).symlink_to(outside)
        said = fails(capsys, *train(whole / "plan.json", tiny, output), "--restart")
        assert "link" in said or "symbolic" in said.lower() or "directory" in said.lower(), said
        assert not list(outside.iterdir()) and (output / name).is_symlink()
