"""What is refused before anything is loaded: impossible plans, what is no text, options of the other task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import make_plan, strategy

from executor import rows
from executor.cli import main
from executor.errors import BadDataset
from executor.rows import read_examples
from planner.plan import digest_of, read_plan, write_plan
from planner.types import Workload

INFER = Workload(task="infer", prompt_tokens=32, new_tokens=4)
TRAIN = Workload(task="train", seq_len=64, method="lora")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """All that is read of a model before these refusals."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    return tmp_path / "tiny"


def refused(capsys: Any, *arguments: Any) -> str:
    """The command must end with exit code 2, one error line, at most one hint, nothing else."""
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[0].startswith("error: ") and "defect" not in lines[0], err
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), err
    return str(lines[0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"seq_len": 10**12}, "seq_len is 1000000000000"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1"),
    ],
)
def test_a_plan_with_an_impossible_job(
    tmp_path: Path, model: Path, changes: dict[str, Any], says: str, capsys: Any
) -> None:
    plan = make_plan(tmp_path / "p", model, msgspec.structs.replace(INFER, **changes), strategy())
    assert says in refused(capsys, "run", plan, "--prompt", "x", "--output", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_plan_with_an_optimizer_that_is_not_known(tmp_path: Path, model: Path, capsys: Any) -> None:
    plan = make_plan(tmp_path / "p", model, INFER, strategy(optimizer="x"))
    assert "its optimizer is 'x'" in refused(capsys, "run", plan, "--prompt", "x")


@pytest.mark.parametrize("ranks", [(-3,), (1, 1), (2, 1)])
def test_a_plan_whose_candidates_cannot_be_told_apart(
    tmp_path: Path, model: Path, ranks: tuple[int, ...], capsys: Any
) -> None:
    plan = read_plan(make_plan(tmp_path / "p", model, INFER, *(strategy() for _ in ranks)))
    pairs = zip(plan.candidates, ranks, strict=True)
    moved = tuple(msgspec.structs.replace(candidate, rank=rank) for candidate, rank in pairs)
    plan = msgspec.structs.replace(plan, candidates=moved)
    write_plan(msgspec.structs.replace(plan, digest=digest_of(msgspec.to_builtins(plan))), tmp_path / "p")
    assert "candidates are ranked" in refused(capsys, "run", tmp_path / "p", "--prompt", "x")


def test_a_model_whose_name_would_steer_the_terminal(tmp_path: Path, model: Path, capsys: Any) -> None:
    plan = make_plan(tmp_path / "p", model, INFER, strategy(), id="\x1b[31mred\n")
    assert r"'\x1b[31mred\n'" in refused(capsys, "run", plan, "--prompt", "x")


def test_a_name_with_a_line_break_stays_in_its_line(tmp_path: Path, capsys: Any) -> None:
    assert r"a\nb" in refused(capsys, "run", tmp_path / "a\nb", "--prompt", "x")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--packing"],
        ["--epochs", 2],
        ["--save-steps", 3],
        ["--lr-schedule", "cosine"],
        ["--report-to", "tensorboard"],
    ],
    ids=str,
)
def test_an_option_of_training_for_a_plan_of_inference(
    tmp_path: Path, model: Path, arguments: list[Any], capsys: Any
) -> None:
    plan = make_plan(tmp_path / "p", model, INFER, strategy())
    said = refused(capsys, "run", plan, "--prompt", "x", *arguments)
    assert said == f"error: {arguments[0]} is for training and the plan is for inference"


@pytest.mark.parametrize("command", ["run", "rehearse"])
def test_an_option_of_inference_for_a_plan_of_training(
    tmp_path: Path, model: Path, command: str, capsys: Any
) -> None:
    plan = make_plan(tmp_path / "p", model, TRAIN, strategy())
    assert "--greedy is for inference" in refused(capsys, command, plan, "--greedy")


@pytest.mark.parametrize(
    ("argument", "value"), [("--learning-rate", 0), ("--epochs", 0), ("--max-new-tokens", 10**20)]
)
def test_numbers_that_make_no_run(argument: str, value: int, capsys: Any) -> None:
    assert "must be " in refused(capsys, "run", "plan.json", argument, value)


def test_bytes_that_are_no_text(tmp_path: Path, model: Path, capsys: Any) -> None:
    plan = make_plan(tmp_path / "p", model, INFER, strategy())
    assert "prompt 2 is not UTF-8 text" in refused(capsys, "run", plan, "--prompt", "x", "--prompt", "\udcff")


def test_half_a_surrogate_pair_in_a_row(tmp_path: Path) -> None:
    file = tmp_path / "d"
    file.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read_examples(file)[0].text == "\U0001f600"
    file.write_text('{"text": "x"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(BadDataset, match="line 2: has half of a surrogate pair"):
        read_examples(file)


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONGEST_ROW_BYTES", 2**20)
    with pytest.raises(BadDataset, match="line 1: is longer than 1 MiB"):
        read_examples(Path("/dev/zero"))


def test_a_number_too_long_to_read_is_not_called_nested(tmp_path: Path) -> None:
    (tmp_path / "d").write_text('{"text": ' + "1" * 5000 + "}\n")
    with pytest.raises(BadDataset, match="line 1: is not JSON: Exceeds the limit"):
        read_examples(tmp_path / "d")


def test_the_only_answer_is_printed_where_nobody_watched_it_being_made(tmp_path: Path) -> None:
    from executor.table import _only_answer

    assert _only_answer(tmp_path) is None
    (tmp_path / "outputs.jsonl").write_text('{"text": "four"}\n')
    assert _only_answer(tmp_path) == "four"
    (tmp_path / "outputs.jsonl").write_text('{"text": "four"}\n{"text": "five"}\n')
    assert _only_answer(tmp_path) is None
