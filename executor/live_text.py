"""The answer on the terminal while it is made."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from transformers import TextStreamer


class LiveText(TextStreamer):
    """Writes words to `file` as soon as they are whole; the prompt and special tokens are left out."""

    def __init__(self, tokenizer: Any, file: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._file = file

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """transformers calls this with each piece."""
        self._file.write(text + ("\n" if stream_end else ""))
        self._file.flush()


def live_text(tokenizer: Any, prompts: int, as_json: bool) -> LiveText | None:
    """Where there is one prompt and someone watches: on stdout, or on stderr while stdout carries JSON."""
    file = sys.stderr if as_json else sys.stdout
    return LiveText(tokenizer, file) if prompts == 1 and file.isatty() else None
