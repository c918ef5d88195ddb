"""Prompts: from the command line and from a file, as the text that the tokenizer reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from executor.errors import BadOption
from executor.options import RunOptions
from executor.rows import Digest, Message, read_prompts

Prompt = str | tuple[Message, ...]


def prompts_of(options: RunOptions, digest: Digest | None = None) -> list[Prompt]:
    """Prompts from the command line, then from the file, whose bytes `digest` is fed.

    Errors: `BadOption` when there are none, `BadDataset` for a bad row.
    """
    prompts: list[Prompt] = list(options.prompts)
    for number, prompt in enumerate(options.prompts, 1):
        if any("\ud800" <= char <= "\udfff" for char in prompt):  # how Python keeps bytes it cannot decode
            raise BadOption(f"prompt {number} is not UTF-8 text")
    if options.prompts_file is not None:
        prompts += read_prompts(options.prompts_file, digest)
    if not prompts:
        raise BadOption("generation needs a prompt", "give --prompt TEXT or --prompts FILE.jsonl")
    return prompts


def render(prompt: Prompt, tokenizer: Any) -> str:
    """The text of a prompt, in the tokenizer's chat template where it has one.

    Errors: `BadOption` for messages without a template, or which the template refuses.
    """
    if not tokenizer.chat_template:
        if isinstance(prompt, str):
            return prompt
        raise BadOption("the tokenizer has no chat template for messages", 'use {"prompt": ...} rows')
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise BadOption(f"the chat template refuses messages of {roles}: {error}") from None


def encode(texts: Sequence[str], tokenizer: Any) -> Any:
    """Token ids and mask of a batch, each B x T, padded on the left so that all answers begin at T.

    A chat template writes the special tokens itself.
    """
    return tokenizer(
        list(texts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not tokenizer.chat_template,
        return_token_type_ids=False,
    )


def lengths(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Tokens of each text."""
    rows = tokenizer(list(texts), add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return [len(row) for row in rows]


def shown(prompt: Prompt) -> str | list[Message]:
    """The prompt as outputs.jsonl has it: what the user gave."""
    return prompt if isinstance(prompt, str) else list(prompt)
