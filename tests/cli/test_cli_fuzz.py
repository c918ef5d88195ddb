"""Any argument list ends in an exit code and, for bad input, in one line: no traceback, no defect."""

from __future__ import annotations

import io
import json
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.cli import DEFECT, build_parser, main
from profiles.catalogue import load_model

OPTIONS = sorted(
    {
        option
        for name in ("check", "plan", "estimate", "models")
        for action in build_parser()._subparsers._group_actions[0].choices[name]._actions  # type: ignore[union-attr]
        for option in action.option_strings
    }
    # Files are written elsewhere; help exits on its own; a traceback is what --debug asks for.
    - {"-o", "--output", "-h", "--help", "--debug"}
)
MODELS = ["qwen2.5-0.5b", "qwen2.5-7b", "gemma-2-9b", "llama-3.1-8b"]
NAMES = "rtx-3090 rtx-3090x2 h200 gtx-1060-6gb apple-m2-16gb"
CHOICES = (
    "train infer full lora qlora nf4 int8 none bf16 fp16 fp32 auto eager flash_attention_2 static quantized "
    "offloaded cpu mixed_offload disk_offload stream liger fused sgd adafactor dora attention lookup draft"
)
NUMBERS = "24GiB 1KB 0GB 1024 1 0 -1 1e9 nan 0.5 99999999"
WORDS = [*MODELS, *NAMES.split(), *CHOICES.split(), *NUMBERS.split(), "", "--", "-", ".", "\u202e", "\0"]


def run(argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return code, out.getvalue(), err.getvalue()


def hold(argv: list[str]) -> int:
    code, out, err = run(argv)
    assert code in (0, 1, 2), (argv, code)
    assert DEFECT not in err, (argv, err)
    if code == 2:
        lines = err.splitlines()
        assert out == "" and 1 <= len(lines) <= 2, (argv, out, err)
        assert lines[0].startswith("error: ") and all(line.isprintable() for line in lines)
    elif "--json" in argv:
        json.loads(out)
    return code


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


pairs = st.tuples(st.sampled_from(OPTIONS), st.one_of(st.sampled_from(WORDS), st.text(max_size=12)))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    command=st.sampled_from(["check", "plan", "estimate", "models"]),
    model=st.sampled_from(MODELS),
    options=st.lists(pairs, max_size=5),
)
def test_options_in_any_combination(command: str, model: str, options: list[tuple[str, str]]) -> None:
    hold([command, model, *(word for pair in options for word in pair)])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(argv=st.lists(st.one_of(st.sampled_from(WORDS + OPTIONS), st.text(max_size=20)), max_size=6))
def test_words_in_any_order(argv: list[str]) -> None:
    hold(["estimate", *argv])


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
)
CONFIG: dict[str, Any] = dict(load_model("qwen2.5-0.5b").config)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(sorted(CONFIG)), values, min_size=1, max_size=3))
def test_a_config_with_any_values(changes: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({**CONFIG, **changes}))
        hold(["estimate", folder, "--gpu", "rtx-3090", "--task", "train", "--json"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_a_config_of_any_bytes(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_bytes(raw)
        assert hold(["estimate", folder, "--gpu", "rtx-3090"]) == 2


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60))
def test_a_machine_of_any_bytes(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "machine.json")
        file.write_bytes(raw)
        assert hold(["check", "qwen2.5-0.5b", "--machine", str(file)]) == 2
