"""`planner estimate --exact`: the contract's JSON, architectures nobody described, and clear refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the [executor] extra")

from planner.cli import main

pytestmark = pytest.mark.executor


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["estimate", *argv])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_json_is_that_of_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("qwen2.5-0.5b", "--gpu", "rtx-3090", "--task", "train", "--json")
    code, out, _ = run(capsys, *argv, "--exact")
    exact = json.loads(out)
    fast = json.loads(run(capsys, *argv)[1])
    assert code == 0 and exact["schema"] == "fitwright.estimate/1"
    assert exact.keys() == fast.keys() and exact["gpus"][0].keys() == fast["gpus"][0].keys()
    gpu = exact["gpus"][0]
    assert sum(line["bytes"] for line in gpu["components"]) == gpu["allocated_peak_bytes"]
    assert {line["basis"] for line in gpu["components"]} >= {"traced", "measured"}
    assert gpu["allocated_peak_bytes"] == pytest.approx(fast["gpus"][0]["allocated_peak_bytes"], rel=0.005)
    assert any("of 24 layers run" in reason for reason in exact["reasons"])


def test_an_architecture_without_trait_file_gets_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model_type": "doge", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, str(tmp_path), "--gpu", "rtx-3090")
    assert code == 2 and "doge" in err
    code, out, _ = run(capsys, str(tmp_path), "--gpu", "rtx-3090", "--exact", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["verdict"] == "fits"
    assert answer["gpus"][0]["load_bytes"] >= 2 * answer["model"]["parameters"]
    assert answer["speed"]["decode_tokens_per_s"]["typical"] > 0


def test_an_architecture_transformers_does_not_know_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nobody_made_this"}')
    code, _, err = run(capsys, str(tmp_path), "--gpu", "rtx-3090", "--exact")
    assert code == 2 and err.startswith("error: ") and "nobody_made_this" in err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("--placement", "mixed_offload"), "on one card as a whole"),
        (("--cache", "quantized"), "does not trace"),
    ],
)
def test_what_is_not_traced_is_refused(
    argv: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "qwen2.5-0.5b", "--gpu", "rtx-3090", "--exact", *argv)
    assert code == 2 and text in err


def test_packed_experts_are_not_traced(capsys: pytest.CaptureFixture[str]) -> None:
    packed = ("--quant", "nf4", "--quant-experts", "nf4")
    code, _, err = run(capsys, "mixtral-8x7b-v0.1", "--gpu", "h200", "--exact", *packed)
    assert code == 2 and "not packed ones" in err


def test_without_the_libraries_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else found(name, *rest)
    )
    code, _, err = run(capsys, "qwen2.5-0.5b", "--gpu", "rtx-3090", "--exact")
    assert code == 2
    first, second = err.splitlines()
    assert first.startswith("error: ") and "torch is not installed" in first
    assert second.startswith("hint: ") and "fitwright[executor]" in second
