"""Speculation gives the tokens of plain greedy generation, in fewer passes, and says what it did."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import msgspec
import torch
from conftest import make_plan, strategy
from streaming_models import request, write_model

from executor.cli import main
from executor.engines import accelerate, resident, stream
from executor.errors import CannotHonour
from executor.live_text import LiveText
from executor.speculation.assisted import SETTINGS, Speculation
from executor.speculation.draft_model import Draft, ModelDrafter
from executor.speculation.length import DraftLength
from executor.speculation.lookup import Lookup
from planner.placement import Tiers, stream_map
from planner.types import Workload
from profiles.architecture import architecture

pytestmark = pytest.mark.executor
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
NEW = 24


class Knowing:
    """Knows the whole text and spoils every `wrong`-th token of what it proposes."""

    def __init__(self, text: Sequence[int], wrong: int) -> None:
        self._text, self._wrong = list(text), wrong

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        assert list(tokens) == self._text[: len(tokens)], "what was accepted is the text"
        places = range(len(tokens), min(len(tokens) + most, len(self._text)))
        return [(self._text[i] + (i % self._wrong == 0)) % 320 for i in places]


def generate(model: Any, **more: Any) -> torch.Tensor:
    ends = {"eos_token_id": 257, "pad_token_id": 258, "do_sample": False}
    with torch.no_grad():
        return model.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), **{"max_new_tokens": NEW, **ends, **more}
        )


def guessed(model: Any, drafter: Any, **more: Any) -> tuple[torch.Tensor, Speculation]:
    speculation = Speculation(model, lambda: (drafter, DraftLength()))
    with speculation.attached():
        return generate(model, **SETTINGS, **more), speculation


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "deepseek_v3", "gpt_oss"])
def test_same_tokens_with_right_and_wrong_drafts(tmp_path: Path, kind: str) -> None:
    """Windows of 8 tokens too, whose layers must take back what they had dropped."""
    source = write_model(tmp_path, kind)
    loaded = stream.load(request(source, dtype="fp32", resident=2))
    plain = generate(loaded.model)
    for wrong in (1, 3, 10**6):
        tokens, speculation = guessed(loaded.model, Knowing(plain[0].tolist(), wrong))
        assert torch.equal(tokens, plain)
        counts = speculation.counts
        assert counts.passes + counts.accepted == plain.shape[1] - PROMPT.shape[1] - 1
        assert (counts.accepted == 0) == (wrong == 1) and (counts.accepted == counts.drafted) == (wrong > 3)
    assert counts.passes < 5
    loaded.close()


def test_engines_draft_alike_and_compute_the_same_bits(tmp_path: Path) -> None:
    source = write_model(tmp_path, "qwen2")
    whole = resident.load(request(source)).model
    loaded = stream.load(request(source, resident=2))
    runs = [
        guessed(model, Lookup(), output_logits=True, return_dict_in_generate=True)
        for model in (whole, loaded.model)
    ]
    assert torch.equal(runs[0][0].sequences, runs[1][0].sequences)
    assert all(torch.equal(a, b) for a, b in zip(*(run[0].logits for run in runs), strict=True))
    assert runs[0][1].counts == runs[1][1].counts and runs[0][1].counts.drafted > 0
    loaded.close()


def test_offloaded_by_accelerate(tmp_path: Path) -> None:
    source = write_model(tmp_path, "llama")
    facts = json.loads((tmp_path / "config.json").read_text())
    placed = stream_map(architecture(facts), Tiers(resident=2)).device_map
    asked = request(source, dtype="fp32", resident=None, placement="mixed_offload", engine="accelerate")
    candidate = msgspec.structs.replace(asked.candidate, device_map=placed)
    loaded = accelerate.load(dataclasses.replace(asked, candidate=candidate, scratch=tmp_path / "scratch"))
    assert loaded.layers_streamed > 0
    plain = generate(loaded.model)
    tokens, speculation = guessed(loaded.model, Knowing(plain[0].tolist(), 4))
    assert torch.equal(tokens, plain) and 0 < speculation.counts.accepted < speculation.counts.drafted
    loaded.close()


def test_an_end_inside_a_draft_ends_the_text(tmp_path: Path) -> None:
    model = resident.load(request(write_model(tmp_path, "llama"), dtype="fp32")).model
    plain = generate(model)[0].tolist()
    end = plain[PROMPT.shape[1] + 5]
    stopped = generate(model, eos_token_id=end)
    tokens, _ = guessed(model, Knowing(plain, 10**6), eos_token_id=end)
    assert torch.equal(tokens, stopped) and int(tokens[0, -1]) == end


def test_a_draft_model_reads_each_token_once_and_forgets_what_was_rejected(tmp_path: Path) -> None:
    model = resident.load(request(write_model(tmp_path, "mistral"), dtype="fp32")).model
    plain = generate(model)
    for chunk in (0, 5):
        drafter = ModelDrafter(Draft(model, 0.1), chunk)
        tokens, speculation = guessed(model, drafter)
        assert torch.equal(tokens, plain)
        assert speculation.counts.accepted == speculation.counts.drafted, "it is the model itself"
    # after tokens it had not guessed
    drafter.propose(PROMPT[0].tolist(), 4)
    other = [*PROMPT[0].tolist(), 200, 100]
    assert drafter.propose(other, 3) == ModelDrafter(Draft(model, 0.1)).propose(other, 3)


def test_states_that_cannot_go_back_are_refused(tmp_path: Path) -> None:
    from executor.quantized_cache import quantized_cache

    model = resident.load(request(write_model(tmp_path, "llama"), dtype="fp32")).model
    with pytest.raises(CannotHonour, match="cannot give rejected drafts back"):
        guessed(model, Lookup(), past_key_values=quantized_cache(model.config))
    assert "_get_candidate_generator" not in vars(model), "the model is left as it was"
    model._is_stateful = True
    with pytest.raises(CannotHonour, match="keeps a state"):
        Speculation(model, lambda: (Lookup(), DraftLength()))


def planned(folder: Path, tiny: Path, **how: Any) -> Path:
    """A plan for 16 tokens in fp32."""
    job = Workload(task="infer", prompt_tokens=64, new_tokens=16, batch_size=how.pop("batch", 1))
    return make_plan(folder / "plan.json", tiny, job, strategy(**{"dtype": "fp32", **how}))


def run(plan: Path, output: Path, *more: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    prompts = ("--prompt", "one two one two one two", "--prompt", "three")
    assert main(["run", *map(str, (plan, *prompts, "--output", output, *more))]) == 0
    rows = [json.loads(line) for line in (output / "outputs.jsonl").read_text().splitlines()]
    return rows, json.loads((output / "report.json").read_text())


@pytest.mark.parametrize("engine", ["resident", "stream"])
@pytest.mark.parametrize("how", [{"speculate": "lookup"}, {"speculate": "draft"}])
def test_command_line(
    tmp_path: Path, tiny: Path, engine: str, how: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, without = run(planned(tmp_path, tiny), tmp_path / "plain", "--greedy")
    draft = {"draft": str(tiny)} if how["speculate"] == "draft" else {}
    plan = planned(tmp_path, tiny, batch=2, **how, **draft)
    rows, report = run(plan, tmp_path / "guessed", "--greedy", "--engine", engine)
    assert rows == plain and without["speculation"] is None
    found = report["speculation"]
    assert 0 < found["accepted"] <= found["drafted"]
    assert found["acceptance_rate"] == found["accepted"] / found["drafted"]
    assert found["tokens_per_pass"] == 1 + found["accepted"] / found["passes"] > 1
    assert f"{found['accepted']} of {found['drafted']} drafted tokens were right" in capsys.readouterr().out
    assert report["error"].get("decode_tokens_per_s") is None, "what was predicted is a token a pass"
    assert report["workload"]["batch_size"] == 1
    assert any("one sequence at a time" in note for note in report["notes"])
    if draft:
        assert found["acceptance_rate"] == 1.0, "the model drafted for itself"


def test_samples_are_those_of_the_seed(tmp_path: Path, tiny: Path) -> None:
    plan = planned(tmp_path, tiny, speculate="draft", draft=str(tiny))
    seeds = (1, 1, 2)
    first, again, other = (
        run(plan, tmp_path / str(i), "--temperature", 1.5, "--seed", seed)[0] for i, seed in enumerate(seeds)
    )
    assert first == again != other


def test_another_vocabulary_is_refused(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    write_model(other, "llama")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["!"], words['"'] = words['"'], words["!"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    plan = planned(tmp_path, tiny, speculate="draft", draft=str(other))
    assert main(["run", str(plan), "--prompt", "x", "--output", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert f"error: the draft model {other} has another vocabulary" in said and "hint: " in said


def test_a_draft_model_that_is_nowhere_is_told_before_loading(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(tmp_path, tiny, speculate="draft", draft="./nowhere")
    assert main(["run", str(plan), "--prompt", "x", "--output", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert "error: no such file or folder: ./nowhere" in said and "loading" not in said


def test_rehearsal_with_a_draft_of_other_rows(tmp_path: Path, tiny: Path) -> None:
    """Padding to other sizes is no other vocabulary; a rehearsal draws tokens from the padding, too."""
    small = tmp_path / "small"
    small.mkdir()
    facts = json.loads((tiny / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**facts, "vocab_size": 256}))
    plan = planned(tmp_path, tiny, speculate="draft", draft=str(small))
    assert main(["rehearse", str(plan), "--output", str(tmp_path / "o")]) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["speculation"]["passes"] > 0
    assert any("share their vocabulary" in note for note in report["notes"])


def test_words_appear_while_drafts_are_accepted(tiny: Path) -> None:
    import io

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    file = io.StringIO()
    shown = LiveText(AutoTokenizer.from_pretrained(tiny), file)
    plain = generate(model)
    guessed(model, Knowing(plain[0].tolist(), 4), streamer=shown)
    text = shown.tokenizer.decode(plain[0, PROMPT.shape[1] :], skip_special_tokens=True)
    assert file.getvalue() == text + "\n"


def test_a_draft_model_with_a_state_is_refused(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Qwen2ForCausalLM

    monkeypatch.setattr(Qwen2ForCausalLM, "_is_stateful", True)
    plan = planned(tmp_path, tiny, speculate="draft", draft=str(tiny))
    assert main(["run", str(plan), "--prompt", "x", "--output", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert f"error: the draft model {tiny} keeps a state" in said and "hint: " in said
