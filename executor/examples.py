"""Rows into token ids and labels: loss on the answer only, cut at the sequence length.

A label is the token itself where it is learned and -100 elsewhere (transformers' cross-entropy ignores -100).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def prepare(path: Path, rows: Sequence[Row], tokenizer: Any, seq_len: int) -> Prepared:
    """Tokenize all rows.

    Errors: `BadDataset` for messages without a chat template, or when no row has an answer within `seq_len`.
    """
    prepared = Prepared([])
    for row in rows:
        ids, learned = _tokenize(path, row, tokenizer)
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
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if row.text is not None:
        ids = list(tokenizer(row.text)["input_ids"]) + end
        return ids, [True] * len(ids)
    if row.prompt is not None and row.completion is not None:
        before = list(tokenizer(row.prompt)["input_ids"])
        answer = list(tokenizer(row.completion, add_special_tokens=False)["input_ids"]) + end
        return before + answer, [False] * len(before) + [True] * len(answer)
    assert row.messages is not None
    return _tokenize_conversation(path, row, row.messages, tokenizer)


def _tokenize_conversation(
    path: Path, row: Row, messages: Sequence[Message], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    template = tokenizer.chat_template
    if not template:
        raise BadDataset(
            f"{path}, line {row.line}: the tokenizer has no chat template for messages",
            'use {"prompt": ..., "completion": ...} rows, or an instruct model',
        )
    try:
        if isinstance(template, str) and "{% generation" in template and row.answer_from == 0:
            done = tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(done["input_ids"]), [bool(m) for m in done["assistant_masks"]]
        text = tokenizer.apply_chat_template(list(messages), tokenize=False)
        spans = _answer_spans(messages, row.answer_from, text, tokenizer)
    except (
        Exception
    ) as error:  # templates raise their own errors (jinja2's TemplateError) on what they refuse
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise BadDataset(
            f"{path}, line {row.line}: the chat template refuses the messages: {reason}"
        ) from None
    if not spans:
        raise BadDataset(
            f"{path}, line {row.line}: cannot find the answer in the text the chat template makes"
        )
    return _tokenize_spans(text, spans, tokenizer)


def _answer_spans(
    messages: Sequence[Message], first: int, text: str, tokenizer: Any
) -> list[tuple[int, int]]:
    """Character ranges of the assistant's messages in the rendered text.

    What a message adds to the rendered text is its range. Templates that render earlier turns otherwise once
    later ones follow break that; then the content itself is looked for.
    """
    spans = []
    cursor = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < first:
            continue
        before = (
            tokenizer.apply_chat_template(list(messages[:i]), tokenize=False, add_generation_prompt=True)
            if i
            else ""
        )
        through = tokenizer.apply_chat_template(list(messages[: i + 1]), tokenize=False)
        if text.startswith(through) and through.startswith(before):
            start, end = len(before), len(through)
        else:
            start = text.find(message["content"].strip(), cursor)
            end = start + len(message["content"].strip())
            if tokenizer.eos_token and text.startswith(tokenizer.eos_token, end):
                end += len(tokenizer.eos_token)
        if start < 0 or end <= start:
            return []
        spans.append((start, end))
        cursor = end
    return spans


def _tokenize_spans(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    if tokenizer.is_fast:
        done = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = [any(a <= start < b for a, b in spans) for start, _ in done["offset_mapping"]]
        return list(done["input_ids"]), learned
    ids: list[int] = []
    learned = []
    cursor = 0
    for start, end in [*spans, (len(text), len(text))]:
        for piece, learn in ((text[cursor:start], False), (text[start:end], True)):
            tokens = list(tokenizer(piece, add_special_tokens=False)["input_ids"]) if piece else []
            ids += tokens
            learned += [learn] * len(tokens)
        cursor = end
    return ids, learned
