"""Rows of a JSONL file of examples or prompts, each checked, each error named by file and line.

Three forms of example, one per line: {"messages": [...]}, {"prompt": ..., "completion": ...}, {"text": ...}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from executor.errors import BadDataset

Message = dict[str, Any]
LONGEST_ROW_BYTES = 2**28
"""A line beyond this is no row: a device without end, or another kind of file."""


class Digest(Protocol):
    """One of hashlib's."""

    def update(self, data: bytes, /) -> None:
        """Take these bytes in too."""


@dataclass(frozen=True)
class Row:
    """One example. Exactly one of `messages`, `prompt` with `completion`, and `text` is set.

    In `messages`, what the assistant says from index `answer_from` on is learned."""

    line: int
    messages: tuple[Message, ...] | None = None
    answer_from: int = 0
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


def read_examples(path: Path, digest: Digest | None = None) -> list[Row]:
    """All examples of a training file. `digest` is fed its bytes on the way: a pipe can be read once.

    Errors: `BadDataset` naming the line of the first bad row, or that the file is missing or empty.
    """
    rows = [_example(path, line, record) for line, record in _records(path, digest)]
    if not rows:
        raise BadDataset(f"{path} has no rows")
    return rows


def read_prompts(path: Path, digest: Digest | None = None) -> list[str | tuple[Message, ...]]:
    """All prompts of a file of {"prompt": text} or {"messages": [...]} rows.

    `digest` and errors: as for `read_examples`.
    """
    prompts: list[str | tuple[Message, ...]] = []
    for line, record in _records(path, digest):
        if isinstance(record.get("prompt"), str):
            prompts.append(record["prompt"])
        elif "messages" in record:
            prompts.append(_messages(path, line, record["messages"], "messages"))
        else:
            raise _bad(path, line, 'a prompt row needs "prompt" (text) or "messages"')
    if not prompts:
        raise BadDataset(f"{path} has no rows")
    return prompts


def _records(path: Path, digest: Digest | None) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(path, "rb") as f:
            lines = iter(lambda: f.readline(LONGEST_ROW_BYTES + 1), b"")
            for number, raw in enumerate(lines, 1):
                if len(raw) > LONGEST_ROW_BYTES:
                    raise _bad(path, number, f"is longer than {LONGEST_ROW_BYTES >> 20} MiB")
                if digest is not None:
                    digest.update(raw)
                if raw.strip():
                    yield number, _record(path, number, raw)
    except OSError as error:
        raise BadDataset(f"cannot read {path}: {error.strerror}") from None


def _record(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        if b"\\u" in raw:  # \ud83d without its other half is JSON, but no character
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _bad(path, number, "has half of a surrogate pair, which is no text") from None
    except UnicodeDecodeError:
        raise _bad(path, number, "is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = error.msg  # the position would count from the line's beginning
        raise _bad(path, number, f"is not JSON: {reason}") from None
    if not isinstance(record, dict):
        raise _bad(path, number, "is not a JSON object")
    return record


def _example(path: Path, line: int, record: dict[str, Any]) -> Row:
    if "messages" in record:
        return _conversation(path, line, _messages(path, line, record["messages"], "messages"), 0)
    if "prompt" in record and "completion" in record:
        return _completion(path, line, record["prompt"], record["completion"])
    if "text" in record:
        return Row(line, text=_text(path, line, record["text"], "text"))
    raise _bad(path, line, 'needs "messages", "prompt" with "completion", or "text"')


def _completion(path: Path, line: int, prompt: Any, completion: Any) -> Row:
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(path, line, prompt, "prompt")
        return _conversation(
            path, line, before + _messages(path, line, completion, "completion"), len(before)
        )
    return Row(
        line,
        prompt=_text(path, line, prompt, "prompt"),
        completion=_text(path, line, completion, "completion"),
    )


def _conversation(path: Path, line: int, messages: tuple[Message, ...], answer_from: int) -> Row:
    if not any(m["role"] == "assistant" for m in messages[answer_from:]):
        raise _bad(path, line, "has no assistant message to learn from")
    return Row(line, messages=messages, answer_from=answer_from)


def _messages(path: Path, line: int, value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _bad(path, line, f'"{name}" must be a list of messages')
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _bad(path, line, f'every message of "{name}" needs a "role"')
        if not isinstance(message.get("content"), str):
            raise _bad(path, line, f'every message of "{name}" needs a "content" that is text')
    return tuple(value)


def _text(path: Path, line: int, value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise _bad(path, line, f'"{name}" must be text that is not empty')
    return value


def _bad(path: Path, line: int, what: str) -> BadDataset:
    return BadDataset(f"{path}, line {line}: {what}", "mend the row or take it out")
