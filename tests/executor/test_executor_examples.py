"""Tokens and labels, batches, packing."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from executor.batches import Collator, Examples, RandomTokens, count_tokens, split
from executor.errors import BadDataset, CannotHonour
from executor.examples import IGNORED, Example, prepare
from executor.packing import pack, refuse_mixing
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


def packed_batch(flat: bool = False) -> tuple[list[Example], dict[str, Any]]:
    """Rows of several lengths in two sequences of 32, the second padded, unless flat."""
    lengths = (14, 10, 8, 9, 3, 2, 7)
    rows = [Example([(7 * n + i) % 300 for i in range(n)], [IGNORED] * 2 + [5] * (n - 2)) for n in lengths]
    packed = pack(rows, 32)
    assert len(packed) == 2 and len(packed[1].input_ids) < 32
    return rows, Collator(0, 1, 32, flat)([Examples(packed)[i] for i in range(2)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_compute_what_they_compute_alone(tiny: Path, attention: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation=attention)
    rows, batch = packed_batch()
    assert int(count_tokens(batch)) == sum(len(row.input_ids) for row in rows)
    packed = {tuple(ids): logits for ids, logits in _rows_of(batch, model)}
    learned = int((batch["labels"][:, 1:] != IGNORED).sum())
    total = 0.0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
            out = model(input_ids=ids, labels=labels, num_items_in_batch=learned)
            torch.testing.assert_close(packed[tuple(row.input_ids)], out.logits[0], rtol=1e-4, atol=1e-4)
            total += float(out.loss) if len(row.input_ids) > 2 else 0.0
        loss = model(**batch, num_items_in_batch=learned, use_cache=False).loss
    assert float(loss) == pytest.approx(total, rel=1e-5)


def _rows_of(batch: dict[str, Any], model: Any) -> list[tuple[list[int], Any]]:
    import torch

    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits = model(**inputs, use_cache=False).logits
    found = []
    for ids, positions, scores in zip(batch["input_ids"], batch["position_ids"], logits, strict=True):
        starts = [i for i, p in enumerate(positions.tolist()) if p == 0] + [len(positions)]
        found += [(ids[a:b].tolist(), scores[a:b]) for a, b in pairwise(starts)]
    return found


def test_flat_packing_joins_sequences_without_padding() -> None:
    rows, batch = packed_batch(flat=True)
    tokens = sum(len(row.input_ids) for row in rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, tokens)
    assert int((batch["position_ids"] == 0).sum()) == len(rows) and int(count_tokens(batch)) == tokens


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "falcon_h1", "mamba", "opt"])
def test_packing_is_refused_for_models_that_mix_rows(kind: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=80, pad_token_id=0, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_state=8, head_dim=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if kind in ("falcon_h1", "mamba", "opt"):
        with pytest.raises(CannotHonour, match="--packing"):
            refuse_mixing(model, Collator(0, 8, 64))
    else:
        refuse_mixing(model, Collator(0, 8, 64))


def test_split_is_seeded_and_complete() -> None:
    examples = [Example([i], [i]) for i in range(10)]
    train, held = split(examples, 0.3, seed=1)
    assert len(held) == 3 and sorted(e.input_ids[0] for e in train + held) == list(range(10))
    assert split(examples, 0.3, seed=1) == (train, held) != split(examples, 0.3, seed=2)
    assert split(examples[:1], 0.5, 0) == (examples[:1], [])


def test_random_tokens_are_seeded() -> None:
    a, b = RandomTokens(2, 16, 320, seed=1), RandomTokens(2, 16, 320, seed=1)
    assert a[0] == b[0] != a[1] and len(a[0]["input_ids"]) == 16
