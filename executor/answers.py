"""Where the assistant's answers are in the text that a chat template makes of a conversation.

Three ways, the first that works: the template marks them itself (`{% generation %}`); what a message adds to
the text of the messages before it is its part; or the message is replaced by a mark and the mark looked for.
The last holds for templates that render earlier turns otherwise once later ones follow (thinking taken out,
turns counted), that strip what they are given, or that refuse to render a part of a conversation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from executor.rows import Message

Span = tuple[int, int]
_MARK = "\u241f7f3a91\u241f"
"""No template or dataset contains it, and none strips it."""


def answer_spans(messages: Sequence[Message], first: int, tokenizer: Any) -> tuple[str, list[Span]]:
    """The rendered conversation, and the character ranges of what the assistant says from message `first` on.

    A range begins where generation would begin and ends with the end-of-turn token: what a template puts
    after that is never generated. No ranges: an answer could not be found.

    Errors: whatever the template raises on what it refuses.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    text, marked = _render_with_marks(messages, tokenizer)
    if len(marked) == len(turns):
        return text, [span for i, span in zip(turns, marked, strict=True) if i >= first]
    if marked and first == 0:
        return text, marked
    spans = [_Turn(messages, i, text, tokenizer).span() for i in turns if i >= first]
    return text, [span for span in spans if span is not None] if None not in spans else []


def _render_with_marks(messages: Sequence[Message], tokenizer: Any) -> tuple[str, list[Span]]:
    """The text, and the ranges that the template itself marks as generated."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template()
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False)), []
    texts, spans = render_jinja_template(
        conversations=[list(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return str(texts[0]), [(start, end) for start, end in spans[0]]


class _Turn:
    """One answer of a rendered conversation."""

    def __init__(self, messages: Sequence[Message], index: int, text: str, tokenizer: Any) -> None:
        self._messages, self._index, self._text, self._tokenizer = messages, index, text, tokenizer

    def span(self) -> Span | None:
        """Its range, None where it cannot be found."""
        before = self._render(self._messages[: self._index], prompt=True)
        through = self._render(self._messages[: self._index + 1])
        start = len(before) if before is not None and self._text.startswith(before) else None
        if start is not None and through is not None and self._text.startswith(through):
            end = len(through)
        else:
            found = self._marked_span()
            if found is None:
                return None
            # what is generated may begin before the content: an empty thinking block, a space
            start, end = (found[0] if start is None or start > found[0] else start), found[1]
        end = self._end_of_turn(start, end)
        return (start, end) if start < end else None

    def _marked_span(self) -> Span | None:
        """From the beginning of the content to the end of the turn, by rendering a mark in its place."""
        i = self._index
        mark = {**self._messages[i], "content": _MARK}
        whole = self._render([*self._messages[:i], mark, *self._messages[i + 1 :]])
        alone = self._render([*self._messages[:i], mark])
        if whole is None or whole.count(_MARK) != 1:
            return None
        head, tail = whole.split(_MARK)
        if not self._text.endswith(tail):
            return None
        # a template may treat the content by what is in it: then its part begins where the texts part
        start = _shared(head, self._text)
        own = alone.split(_MARK)[-1] if alone is not None else ""
        return start, len(self._text) - len(tail) + _shared(own, tail)

    def _end_of_turn(self, start: int, end: int) -> int:
        """Cut what follows the token that ends the turn."""
        answer, eos = self._text[start:end], self._tokenizer.eos_token
        if eos and eos in answer:
            return start + answer.rfind(eos) + len(eos)
        stripped = answer.rstrip()
        added = (str(token) for token in self._tokenizer.added_tokens_decoder.values())
        return start + len(stripped) if stripped.endswith(tuple(added)) else end

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> str | None:
        """A part of the conversation as text, None where the template refuses it."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception:  # templates raise errors of their own (jinja2's, and what their code runs into)
            return None


def _shared(a: str, b: str) -> int:
    """Number of characters that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tokenize(text: str, spans: Sequence[Span], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a rendered text, and which of them hold a character of `spans`."""
    if not tokenizer.is_fast:
        return _tokenize_in_pieces(text, spans, tokenizer)
    done = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learned = []
    behind = 0
    for start, end in done["offset_mapping"]:
        # tokenizers leave the space before a word out of its offsets, and give the bytes of one character
        # the same: a token reaches from the end of the one before, or from where it says, if that is earlier
        begin = min(start, behind)
        behind = max(behind, end)
        learned.append(any(begin < b and a < end for a, b in spans))
    return list(done["input_ids"]), learned


def _tokenize_in_pieces(text: str, spans: Sequence[Span], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Without offsets: each part by itself."""
    ids: list[int] = []
    learned: list[bool] = []
    cursor = 0
    for start, end in [*spans, (len(text), len(text))]:
        for piece, learn in ((text[cursor:start], False), (text[start:end], True)):
            tokens = list(tokenizer(piece, add_special_tokens=False)["input_ids"]) if piece else []
            ids += tokens
            learned += [learn] * len(tokens)
        cursor = end
    return ids, learned
