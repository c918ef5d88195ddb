"""`planner explain` as a shell sees it."""

from __future__ import annotations

import json

import pytest

from planner.cli import main

JOBS = (
    ["qwen2.5-7b", "--gpu", "rtx-3090"],
    ["qwen2.5-7b", "--gpu", "rtx-3090", "--task", "train"],
    ["gpt-oss-20b", "--gpu", "h200"],
    ["qwen2.5-14b", "--gpu", "rtx-3080-10gb", "--placement", "mixed_offload", "--ram", "64GiB"],
    ["llama-3-70b", "--gpu", "rtx-3090x2", "--quant", "nf4"],
    ["qwen3-4b", "--vram", "24GiB", "--task", "train", "--method", "full", "--no-gradient-checkpointing"],
)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize("job", JOBS, ids=lambda job: "-".join(job[:3]))
def test_screen_fits_80_columns_and_ends_as_estimate_does(job, capsys):
    code = main(["explain", *job])
    out, err = capsys.readouterr()
    assert err == "" and all(len(line) <= 80 for line in out.splitlines())
    assert "the peak is the moment" in out and "weights by group" in out and "process, GiB" in out
    assert main(["estimate", *job]) == code


@pytest.mark.parametrize("job", JOBS[:2], ids=lambda job: "-".join(job[:4]))
def test_json_explains_the_figures_of_estimate(job, capsys):
    main(["explain", *job, "--json"])
    shown = json.loads(capsys.readouterr().out)
    main(["estimate", *job, "--json"])
    found = json.loads(capsys.readouterr().out)
    card, gpu = shown["cards"][0], found["gpus"][0]
    assert shown["schema"] == "fitwright.explanation/1" and shown["verdict"] == found["verdict"]
    assert [(line["name"], line["bytes"]) for line in card["lines"]] == [
        (line["name"], line["bytes"]) for line in gpu["components"]
    ]
    held = gpu["load_bytes"] - sum(group["bytes"] for group in shown["weights"])
    assert 0 <= held < 0.01 * gpu["load_bytes"], "what the allocator holds besides the tensors"
    for end in ("low", "high"):
        assert sum(step[end] for step in card["steps"]) == gpu[f"{end}_bytes"]


def test_what_does_not_fit_is_explained_all_the_same(capsys):
    assert main(["explain", "qwen2.5-72b", "--gpu", "rtx-3090"]) == 1
    assert "too big" in capsys.readouterr().out


def test_a_wrong_option_is_one_line(capsys):
    assert main(["explain", "qwen2.5-7b", "--gpu", "rtx-3090", "--seq-len", "512"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --seq-len belongs to --task train") and "Traceback" not in err
