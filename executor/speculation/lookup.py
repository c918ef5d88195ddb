"""Drafts copied from the text so far: what followed the last time the same few tokens stood at the end.

Costs nothing and guesses well where answers repeat their prompt: summaries, corrections, code.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 3, 2
"""Tokens that must be the same; longer matches are tried first. A match of one token is mostly chance."""


class Lookup:
    """Remembers where every few tokens of one growing text stood last."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._read = 0
        """Tokens whose endings are noted: all but the last, whose own are looked for."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """`most` tokens that may follow `tokens`, which goes on from those of the call before, or none.

        Where what followed reaches the end of the text, the text repeats itself, and is taken to go on so.
        """
        for end in range(self._read + 1, len(tokens)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._ends[tuple(tokens[end - size : end])] = end
        self._read = max(self._read, len(tokens) - 1)
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            end = self._ends.get(tuple(tokens[-size:]))
            if end is not None:
                period = len(tokens) - end
                return [tokens[end + i % period] for i in range(most)]
        return []
