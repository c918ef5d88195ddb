"""A few layers replayed give what all layers give; the library's versions give what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the [executor] extra")

from tiny_models import tiny

from planner.estimate import normal, normal_strategy
from planner.exact.trace import trace_job
from planner.types import Strategy, Workload

pytestmark = pytest.mark.executor

TRAIN = Workload(task="train", method="lora", seq_len=128, batch_size=1, lora_dropout=0.0)
JOBS = {
    "infer": (Workload(prompt_tokens=128, new_tokens=40), Strategy()),
    "static": (Workload(prompt_tokens=128, new_tokens=40), Strategy(cache="static")),
    "lora": (TRAIN, Strategy(gradient_checkpointing=False)),
    "checkpointed": (TRAIN, Strategy()),
    "int8": (TRAIN, Strategy(quant="int8")),
    "full": (Workload(task="train", method="full", seq_len=128), Strategy()),
    "full, recorded": (
        Workload(task="train", method="full", seq_len=128),
        Strategy(gradient_checkpointing=False),
    ),
}
DEEP = {
    "llama": {"num_hidden_layers": 9},
    "gemma3_text": {"num_hidden_layers": 12, "sliding_window": 64},  # five sliding layers to a full one
    "deepseek_v3": {"num_hidden_layers": 9},  # dense first, experts after
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("model_type", DEEP)
def test_replayed_layers_are_the_layers(model_type: str, job: str) -> None:
    work, how = JOBS[job]
    facts = tiny(model_type, 500) | DEEP[model_type]
    facts.pop("layer_types", None)
    some, every = (trace_job(facts, work, how, 0, reduce=reduce) for reduce in (True, False))
    assert len(some.layers.kept) < len(every.layers.kept)
    assert some.memory.load_bytes == every.memory.load_bytes
    for moment, n in every.memory.by_moment.items():
        assert some.memory.by_moment[moment] == pytest.approx(n, rel=0.002), moment
    lines = {x.name: x.bytes for x in some.memory.peak.lines}
    assert sum(lines.values()) == some.memory.peak.bytes
    assert lines["weights"] == {x.name: x.bytes for x in every.memory.peak.lines}["weights"]


CALIBRATION = Path(__file__).resolve().parents[2] / "benchmarks" / "calibration"
MEASURED = (0, 2, 3, 6, 13, 23, 28, 34, 39, 41, 45, 48, 51)
"""One run of each kind of job; transformers' behaviour there is the same in every version since."""


@pytest.mark.parametrize("index", MEASURED)
def test_trace_is_what_was_measured(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(CALIBRATION), *sys.path])
    from report import read_model, read_runs

    run = read_runs()[1][index]
    model = read_model(CALIBRATION / "configs" / f"{run.model}.json")
    work = normal(run.workload)
    traced = trace_job(model.config, work, normal_strategy(run.strategy, work), 32 * 2**20).memory
    assert traced.peak.bytes == pytest.approx(run.measured.allocated_peak_bytes, rel=0.006)
    assert traced.load_bytes == pytest.approx(run.measured.load_bytes, rel=0.01)
