"""Generation: prompts, templates, padding, sampling, what is shown live, caches."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_plan, strategy

from executor.answering import _refuse_empty
from executor.cli import main
from executor.errors import BadOption
from executor.prompts import encode, lengths, render
from executor.tiny import byte_tokenizer
from planner.types import Workload

pytestmark = pytest.mark.executor


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plan_of(folder: Path, tiny: Path, batch: int = 1, new: int = 12, **changes: Any) -> Path:
    workload = Workload(task="infer", prompt_tokens=48, new_tokens=new, batch_size=batch)
    return make_plan(folder / "plan.json", tiny, workload, strategy(**{"dtype": "fp32", **changes}))


def run(plan: Path, output: Path, *more: Any) -> list[dict[str, Any]]:
    assert main(["run", str(plan), "--output", str(output), *map(str, more)]) == 0
    return [json.loads(line) for line in (output / "outputs.jsonl").read_text().splitlines()]


def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report.json").read_text())
    return found


def test_prompts_are_rendered_and_padded_on_the_left() -> None:
    tokenizer = byte_tokenizer()
    chat = render("hi", tokenizer)
    assert chat == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
    messages = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"})
    assert render(messages, tokenizer).startswith("<|im_start|>system\nbe brief")
    texts = [chat, render("a longer one", tokenizer)]
    batch = encode(texts, tokenizer)
    padding = int((batch["attention_mask"][0] == 0).sum())
    assert padding == 10 and batch["attention_mask"][0, :padding].sum() == 0
    assert max(lengths(texts, tokenizer)) == batch["input_ids"].shape[1]
    tokenizer.chat_template = None
    assert render("as it is", tokenizer) == "as it is"
    with pytest.raises(BadOption, match="no chat template"):
        render(messages, tokenizer)


def test_messages_and_prompts_in_batches_equal_each_alone(tmp_path: Path, tiny: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "one"},
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}]},
        {"prompt": "a third, much longer than the others"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    together = run(plan_of(tmp_path, tiny, batch=4), tmp_path / "o", "--prompts", file, "--greedy")
    alone = run(plan_of(tmp_path, tiny), tmp_path / "p", "--prompts", file, "--greedy")
    assert [row["text"] for row in together] == [row["text"] for row in alone]
    assert [row["prompt"] for row in together] == ["one", lines[1]["messages"], lines[2]["prompt"]]


def test_same_seed_same_samples_other_seed_others(tmp_path: Path, tiny: Path) -> None:
    plan = plan_of(tmp_path, tiny, batch=2, new=24)
    sampled = ("--prompt", "x", "--prompt", "yy", "--prompt", "z", "--temperature", 1.5, "--seed")
    first, again, other = (run(plan, tmp_path / str(i), *sampled, seed) for i, seed in enumerate((1, 1, 2)))
    assert first == again != other
    narrow = run(plan, tmp_path / "n", *sampled, 1, "--top-p", 0.001)
    greedy = run(plan, tmp_path / "g", *sampled[:6], "--greedy")
    assert [row["text"] for row in narrow] == [row["text"] for row in greedy]  # only the likeliest is left


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--greedy", "--top-p", "0.5"), "--greedy leaves nothing to sample"),
        (("--temperature", "0"), "--temperature 0 is greedy"),
        (("--temperature", "1e-40"), "--temperature 1e-40 is greedy"),
        (("--top-p", "0"), "--top-p 0 is greedy"),
    ],
)
def test_sampling_options_that_exclude_each_other(
    tmp_path: Path, tiny: Path, capsys: Any, options: tuple[str, ...], why: str
) -> None:
    assert main(["run", str(plan_of(tmp_path, tiny)), "--prompt", "x", *options]) == 2
    assert f"error: {why}" in capsys.readouterr().err


def test_model_authors_sampling_is_kept_where_nothing_else_is_asked(tiny: Path) -> None:
    from transformers import GenerationConfig

    from executor.options import RunOptions
    from executor.sampling import sampling

    authors = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    options = RunOptions(plan=tiny)
    assert sampling(options, authors) == {}
    warm = sampling(RunOptions(plan=tiny, temperature=1.2), authors)
    assert warm == {"do_sample": True, "temperature": 1.2, "top_p": 0.8, "top_k": 20}
    assert sampling(RunOptions(plan=tiny, top_p=0.5), GenerationConfig())["top_k"] == 0
    assert sampling(RunOptions(plan=tiny, greedy=True), authors)["do_sample"] is False


@pytest.mark.parametrize("as_json", [False, True])
def test_one_prompt_is_answered_live_on_a_terminal(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    out, err = Terminal() if not as_json else io.StringIO(), Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    more = ("--prompt", "x", "--greedy", *(["--json"] if as_json else []))
    (row,) = run(plan_of(tmp_path, tiny), tmp_path / "o", *more)
    text = (err if as_json else out).getvalue()
    assert row["text"] and f"{row['text']}\n" in text
    if as_json:
        assert json.loads(out.getvalue())["schema"] == "fitwright.run/1"


def test_nothing_is_shown_live_in_a_pipe_or_for_several_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    from executor.live_text import live_text

    tokenizer = byte_tokenizer()
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert live_text(tokenizer, prompts=1, as_json=False) is None
    monkeypatch.setattr("sys.stdout", Terminal())
    assert live_text(tokenizer, prompts=2, as_json=False) is None
    assert live_text(tokenizer, prompts=1, as_json=False) is not None


def test_stop_request_ends_a_generation_at_the_next_token(tmp_path: Path, tiny: Path, capsys: Any) -> None:
    from executor.errors import Interrupted
    from executor.sampling import StopSoon
    from executor.stopping import StopRequest

    stop = StopRequest()
    soon = StopSoon(stop)
    assert soon(torch.zeros(3, 5, dtype=torch.long), None).tolist() == [False] * 3
    stop.requested = True
    with pytest.raises(Interrupted):
        soon(torch.zeros(3, 6, dtype=torch.long), None)


@pytest.mark.parametrize("cache", ["static", "quantized"])
def test_caches_on_the_cpu(tmp_path: Path, tiny: Path, cache: str) -> None:
    prompts = ("--prompt", "one", "--prompt", "a longer two", "--prompt", "three", "--greedy")
    usual = run(plan_of(tmp_path, tiny, batch=2), tmp_path / "d", *prompts)
    rows = run(plan_of(tmp_path, tiny, batch=2, cache=cache), tmp_path / "o", *prompts)
    assert rows == usual  # no prompt is long enough to be packed
    notes = report(tmp_path / "o")["notes"]
    assert any("eagerly over the static cache" in note for note in notes) == (cache == "static")


def test_offloaded_cache_needs_a_card(tmp_path: Path, tiny: Path, capsys: Any) -> None:
    plan = plan_of(tmp_path, tiny, cache="offloaded")
    assert main(["run", str(plan), "--prompt", "x", "--output", str(tmp_path / "o")]) == 2
    assert "error: the offloaded cache moves between card and RAM" in capsys.readouterr().err


def test_quantized_cache_packs_what_is_not_recent() -> None:
    from executor.caches import bytes_of
    from executor.quantized_cache import QuantizedLayer, pack, unpack

    torch.manual_seed(0)
    for width in (16, 64, 80, 128):
        states = torch.randn(2, 3, 50, width, dtype=torch.bfloat16)
        packed = pack(states)
        assert packed[0].numel() * 2 == states.numel()
        low, high = states.float().aminmax(dim=-1, keepdim=True)
        # half a step of 15 over the range, and the rounding of bf16 scales and offsets
        allowed = (high - low) / 15 * 0.5 + states.float().abs().amax() * 2**-6
        assert ((unpack(packed).float() - states.float()).abs() <= allowed).all()

    layer = QuantizedLayer()
    prompt = torch.randn(1, 2, 200, 64)
    keys, values = layer.update(prompt, prompt + 1)
    assert torch.equal(keys, prompt) and torch.equal(values, prompt + 1)  # the prompt's own pass is exact
    for n in range(1, 131):
        new = torch.full((1, 2, 1, 64), float(n))
        keys, values = layer.update(new, new)
        assert keys.shape == values.shape == (1, 2, 200 + n, 64) == (1, 2, layer.get_seq_length(), 64)
        assert torch.equal(keys[..., -1:, :], new)
    assert (keys[..., :200, :] - prompt).abs().max() < 0.4 and layer.keys.shape[-2] == 2
    packed_bytes = 2 * 2 * 328 * (64 // 2 + 2 * 4)
    assert bytes_of(type("Cache", (), {"layers": [layer]})) == packed_bytes + 2 * 2 * 2 * 64 * 4


def test_quantized_cache_answers_long_prompts_nearly_as_the_dynamic_one(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    from executor.quantized_cache import QuantizedLayer, quantized_cache

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(0))
    cache = quantized_cache(model.config)
    assert {type(layer) for layer in cache.layers} == {QuantizedLayer}
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)
        near = model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1]
        exact = model(input_ids=ids).logits[0, -1]
    difference = (near - exact).norm() / exact.norm()
    assert 0 < difference < 0.05, difference


def test_more_tokens_than_the_model_was_made_for_are_told_before_and_after(
    tmp_path: Path, tiny: Path, capsys: Any
) -> None:
    context = json.loads((tiny / "config.json").read_text())["max_position_embeddings"]
    run(plan_of(tmp_path, tiny, new=2), tmp_path / "o", "--prompt", "x" * context, "--greedy")
    said = f"and 2 new tokens are more than the {context} this model was made for"
    assert said in capsys.readouterr().err
    assert any(said in note for note in report(tmp_path / "o")["notes"])


def test_an_empty_prompt_without_a_template_is_refused() -> None:
    tokenizer = byte_tokenizer()
    _refuse_empty([render("", tokenizer)], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(BadOption, match="prompt 2 is empty"):
        _refuse_empty(["x", render("", tokenizer)], tokenizer)
