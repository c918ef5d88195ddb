"""Tokens and labels, batches, packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from executor.batches import Collator, Examples, RandomTokens, pack, split
from executor.errors import BadDataset
from executor.examples import IGNORED, Example, prepare
from executor.rows import Row
from executor.tiny import byte_tokenizer

pytestmark = pytest.mark.executor
HERE = Path("data.jsonl")
TALK = (
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def learned_text(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode([t for t in example.labels if t != IGNORED]))


def one(row: Row, tokenizer: Any, seq_len: int = 512) -> Example:
    return prepare(HERE, [row], tokenizer, seq_len).examples[0]


def test_answer_only_with_generation_template(tokenizer: Any) -> None:
    example = one(Row(1, messages=TALK), tokenizer)
    assert learned_text(tokenizer, example) == "two<|im_end|>four<|im_end|>"
    assert len(example.labels) == len(example.input_ids)


def test_answer_only_without_generation_template(tokenizer: Any) -> None:
    plain = byte_tokenizer()
    plain.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    assert learned_text(plain, one(Row(1, messages=TALK), plain)) == "two<|im_end|>four<|im_end|>"
    last = one(Row(1, messages=TALK, answer_from=2), plain)
    assert learned_text(plain, last) == "four<|im_end|>"


def test_answer_found_where_template_rewrites_earlier_turns(tokenizer: Any) -> None:
    odd = byte_tokenizer()
    odd.chat_template = (
        "{{ messages|length }}:{% for m in messages %}[{{ m['role'] }}|{{ m['content'] }}<|im_end|>]"
        "{% endfor %}"
        "{% if add_generation_prompt %}[assistant|{% endif %}"
    )
    assert learned_text(odd, one(Row(1, messages=TALK), odd)) == "two<|im_end|>four<|im_end|>"


def test_completion_and_text(tokenizer: Any) -> None:
    example = one(Row(1, prompt="ask ", completion="say"), tokenizer)
    assert learned_text(tokenizer, example) == "say<|im_end|>"
    assert tokenizer.decode(example.input_ids) == "ask say<|im_end|>"
    assert learned_text(tokenizer, one(Row(1, text="all"), tokenizer)) == "all<|im_end|>"


def test_truncation_counts_and_rows_without_answer(tokenizer: Any) -> None:
    rows = [Row(1, text="abcdefgh"), Row(2, prompt="a long question", completion="x"), Row(3, text="ab")]
    prepared = prepare(HERE, rows, tokenizer, 5)
    assert (len(prepared.examples), prepared.truncated, prepared.empty) == (2, 2, 1)
    assert all(len(e.input_ids) <= 5 for e in prepared.examples)
    with pytest.raises(BadDataset, match="no row has an answer"):
        prepare(HERE, rows[1:2], tokenizer, 5)


def test_no_chat_template_and_refusing_template(tokenizer: Any) -> None:
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(BadDataset, match="line 4: the tokenizer has no chat template"):
        one(Row(4, messages=TALK), bare)
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadDataset, match=r"line 4: .*roles must alternate"):
        one(Row(4, messages=TALK), bare)


def test_collator_pads_right_to_a_multiple_but_not_beyond_the_sequence_length() -> None:
    items = [{"input_ids": [1] * n, "labels": [2] * n} for n in (3, 9)]
    batch = Collator(0, multiple=8, seq_len=64)(items)
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["labels"][0].tolist() == [2] * 3 + [IGNORED] * 13
    assert Collator(0, multiple=8, seq_len=10)(items)["input_ids"].shape == (2, 10)


def test_pack_keeps_every_token_and_never_overflows() -> None:
    examples = [Example([n] * n, [n] * n) for n in (5, 3, 7, 2, 2, 6)]
    packed = pack(examples, 8)
    assert all(len(p.input_ids) == len(p.labels) == len(p.position_ids) <= 8 for p in packed)
    assert sorted(t for p in packed for t in p.input_ids) == sorted(t for e in examples for t in e.input_ids)
    assert len(packed) == 4
    for p in packed:
        starts = [i for i, position in enumerate(p.position_ids) if position == 0]
        assert all(p.labels[i] == IGNORED for i in starts)


def test_packed_rows_do_not_see_each_other(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.config.use_cache = False
    examples = [Example(ids, list(ids)) for ids in ([5, 6, 7, 8, 9], [20, 21, 22])]
    (packed,) = pack(examples, 8)
    batch = Collator(0, multiple=1, seq_len=8)([Examples([packed])[0]])
    with torch.no_grad():
        together = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        alone = [model(input_ids=torch.tensor([e.input_ids])).logits[0] for e in examples]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_split_is_seeded_and_complete() -> None:
    examples = [Example([i], [i]) for i in range(10)]
    train, held = split(examples, 0.3, seed=1)
    assert len(held) == 3 and sorted(e.input_ids[0] for e in train + held) == list(range(10))
    assert split(examples, 0.3, seed=1) == (train, held) != split(examples, 0.3, seed=2)
    assert split(examples[:1], 0.5, 0) == (examples[:1], [])


def test_random_tokens_are_seeded() -> None:
    a, b = RandomTokens(2, 16, 320, seed=1), RandomTokens(2, 16, 320, seed=1)
    assert a[0] == b[0] != a[1] and len(a[0]["input_ids"]) == 16
