"""Rows into token ids and labels: loss on the answer only, cut at the sequence length.

A label is the token itself where it is learned and -100 elsewhere (transformers' cross-entropy ignores -100).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor.answers import answer_spans, tokenize
from executor.errors import BadDataset
from executor.rows import Message, Row

IGNORED = -100


@dataclass
class Example:
    """Token ids (S), labels (S), and position ids (S) where several rows share the sequence."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int] = field(default_factory=list)


@dataclass
class Prepared:
    """Examples of a file, and what was cut or left out on the way."""

    examples: list[Example]
    truncated: int = 0
    empty: int = 0
    """Rows left out because no answer token fits into the sequence length."""
    endless: int = 0
    """Rows whose last answer ends without a token that ends a turn."""


def prepare(path: Path, rows: Sequence[Row], tokenizer: Any, seq_len: int) -> Prepared:
    """Tokenize all rows.

    Errors: `BadDataset` for messages without a chat template, or when no row has an answer within `seq_len`.
    """
    prepared = Prepared([])
    enders = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    for row in rows:
        ids, learned = _tokenize(path, row, tokenizer)
        answer = [token for token, learn in zip(ids, learned, strict=True) if learn]
        prepared.endless += bool(answer) and answer[-1] not in enders
        prepared.truncated += len(ids) > seq_len
        ids, learned = ids[:seq_len], learned[:seq_len]
        labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
        if any(label != IGNORED for label in labels[1:]):
            prepared.examples.append(Example(ids, labels))
        else:
            prepared.empty += 1
    if not prepared.examples:
        raise BadDataset(
            f"{path}: no row has an answer within {seq_len} tokens",
            "plan with a larger --seq-len, or shorten the rows",
        )
    return prepared


def _tokenize(path: Path, row: Row, tokenizer: Any) -> tuple[list[int], list[bool]]:
    if row.messages is not None:
        return _tokenize_conversation(path, row, row.messages, tokenizer)
    if row.text is not None:
        ids = _ended(tokenizer(row.text)["input_ids"], tokenizer)
        return ids, [True] * len(ids)
    assert row.prompt is not None and row.completion is not None
    return _tokenize_completion(row.prompt, row.completion, tokenizer)


def _tokenize_completion(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    before = list(tokenizer(prompt)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is not None and before[-1:] == [eos] and not prompt.endswith(tokenizer.eos_token):
        before.pop()  # some tokenizers end every text; the answer is still to come
    both = list(tokenizer(prompt + completion)["input_ids"])
    if both[: len(before)] == before:
        answer = both[len(before) :]
    else:  # a token would reach across; generation starts from the prompt's own tokens
        answer = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    answer = _ended(answer, tokenizer)
    return before + answer, [False] * len(before) + [True] * len(answer)


def _ended(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """With the end token, once."""
    end = tokenizer.eos_token_id
    return list(ids) if end is None or (ids and ids[-1] == end) else [*ids, end]


def _tokenize_conversation(
    path: Path, row: Row, messages: Sequence[Message], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    where = f"{path}, line {row.line}"
    if not tokenizer.chat_template:
        raise BadDataset(
            f"{where}: the tokenizer has no chat template for messages",
            'use {"prompt": ..., "completion": ...} rows, or an instruct model',
        )
    try:
        text, spans = answer_spans(messages, row.answer_from, tokenizer)
    except Exception as error:  # templates raise errors of their own (jinja2's TemplateError)
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise BadDataset(f"{where}: the chat template refuses the messages: {reason}") from None
    if not spans:
        raise BadDataset(f"{where}: cannot find the answer in the text the chat template makes")
    return tokenize(text, spans, tokenizer)
