"""Reading datasets and prompts: forms, errors named by line."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from executor.errors import BadDataset
from executor.inputs import read_inputs
from executor.options import RunOptions
from executor.rows import read_examples, read_prompts
from planner.types import Workload

ANSWERED = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_three_forms_and_blank_lines(tmp_path: Path) -> None:
    rows = read_examples(
        write(tmp_path / "d", ANSWERED, "", {"prompt": "p", "completion": "c"}, {"text": "t", "extra": 1})
    )
    assert [row.line for row in rows] == [1, 3, 4]
    assert rows[0].messages is not None and rows[1].completion == "c" and rows[2].text == "t"


def test_conversational_prompt_and_completion_learn_only_the_completion(tmp_path: Path) -> None:
    messages = ANSWERED["messages"]
    (row,) = read_examples(write(tmp_path / "d", {"prompt": messages, "completion": messages}))
    assert row.answer_from == 2 and row.messages is not None and len(row.messages) == 4


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("nope", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("3", "not a JSON object"),
        ({"text": 3}, '"text"'),
        ({"text": ""}, '"text"'),
        ({"prompt": "a"}, "needs"),
        ({"prompt": "a", "completion": None}, '"completion"'),
        ({"messages": []}, "list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        ({"messages": [{"content": "x"}]}, '"role"'),
        ({"messages": [{"role": "assistant", "content": None}]}, '"content"'),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, bad: Any, says: str) -> None:
    with pytest.raises(BadDataset) as caught:
        read_examples(write(tmp_path / "d", ANSWERED, bad))
    assert "line 2" in str(caught.value) and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_not_utf8_missing_and_empty(tmp_path: Path) -> None:
    file = tmp_path / "d"
    with pytest.raises(BadDataset, match="cannot read"):
        read_examples(file)
    file.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(BadDataset, match="line 1: is not UTF-8"):
        read_examples(file)
    file.write_bytes(b"\n\n")
    with pytest.raises(BadDataset, match="no rows"):
        read_examples(file)
    with pytest.raises(BadDataset, match="cannot read"):
        read_examples(tmp_path)


def test_prompts(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "d", {"prompt": "p"}, ANSWERED))
    assert prompts[0] == "p" and prompts[1] == tuple(ANSWERED["messages"])
    with pytest.raises(BadDataset, match="line 1"):
        read_prompts(write(tmp_path / "d", {"text": "x"}))


def test_a_pipe_is_read_once_and_known_by_what_came_through_it(tmp_path: Path) -> None:
    """As a shell's `<(...)` gives it: read a second time it is empty, so that all would look alike."""
    content = write(tmp_path / "d", {"prompt": "p"}).read_bytes()
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    options = RunOptions(plan=tmp_path / "plan.json", prompts_file=Path(f"/dev/fd/{reading}"))
    found = read_inputs(Workload(task="infer"), options)
    os.close(reading)
    assert found.prompts == ("p",) and found.digest == hashlib.sha256(content).hexdigest()
