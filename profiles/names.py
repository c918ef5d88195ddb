"""Names of models: ids, and the spellings that mean the same model.

An id is the repository's name in lower case without its organisation: `Qwen/Qwen2.5-7B` is `qwen2.5-7b`.
Chat and base models of one name have the same tensors, so a name that no file carries is looked for again
without `-instruct`, `-chat`, `-it`, `-base`, `-pt`, `-hf`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_VARIANTS = frozenset({"instruct", "chat", "it", "base", "pt", "hf", "pretrain"})
_DECIMAL = re.compile(r"(?<=\d)_(?=\d)")
LONGEST_NAME = 120


def model_id(repo_id: str) -> str:
    """The catalogue id of a repository name.

    >>> model_id("meta-llama/Meta-Llama-3-8B"), model_id("internlm/internlm2_5-1_8b-chat")
    ('llama-3-8b', 'internlm2.5-1.8b-chat')
    """
    name = _DECIMAL.sub(".", repo_id.rsplit("/", 1)[-1].lower())
    return name.removeprefix("meta-").removesuffix("-hf")


def stem(name: str) -> str:
    """An id without the words that tell chat models from base models.

    >>> stem("mistral-7b-instruct-v0.3"), stem("qwen2.5-7b-instruct")
    ('mistral-7b-v0.3', 'qwen2.5-7b')
    """
    words = name.split("-")
    return "-".join([words[0], *[word for word in words[1:] if word not in _VARIANTS]])


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` known names that look like `name`, best first; fast for a name of any length."""
    wanted = model_id(name[-LONGEST_NAME:])
    names = list(known)
    starting = [other for other in names if len(wanted) > 2 and other.startswith(wanted)]
    close = difflib.get_close_matches(wanted, names, n=count, cutoff=0.5)
    return list(dict.fromkeys([*sorted(starting, key=len), *close]))[:count]
