"""How many tokens to draft: as many as give the most tokens for the cost, given how often drafts were right.

With a chance `a` that a drafted token is right once all before it were, a pass that checks k tokens yields
(1 - a^(k+1)) / (1 - a) tokens (Leviathan et al., arXiv:2211.17192, equation 1). The chance is measured as the
run goes on. The costs are constants and facts of the models, never clocks: the lengths of the drafts decide
which kernels run, so every engine and every run must pick the same ones to compute the same bits.
"""

from __future__ import annotations

from planner.memory.infer import CHECKED_TOKENS

MOST_TOKENS = CHECKED_TOKENS - 1
"""Longest draft."""
PASS_GROWTH = 0.1 / MOST_TOKENS
"""What each checked token adds to the cost of a pass, in passes over one token: over 64 streamed tokens, one
tenth (benchmarks/streaming)."""
_MEMORY = 0.9
"""How much of what earlier passes told still counts after another one: some twenty passes are remembered."""
_FIRST_GUESS = 0.5
_RETRY_EVERY = 8
"""Where drafting does not pay, one token is drafted every so many passes, to see whether it does by now."""


class DraftLength:
    """The length of each draft of one text.

    `draft_cost`: of one drafted token, in passes of the model over one token.
    """

    def __init__(self, draft_cost: float = 0.0) -> None:
        self._cost = draft_cost
        self._right, self._wrong = _FIRST_GUESS, 1 - _FIRST_GUESS
        self._idle = 0

    @property
    def chance(self) -> float:
        """Measured chance that a drafted token is right once those before it were."""
        return self._right / (self._right + self._wrong)

    def next(self) -> int:
        """Tokens to draft for the next pass; 0 where drafting does not pay."""
        chance = self.chance
        best, best_rate, expected, power = 0, 1.0, 1.0, 1.0
        for length in range(1, MOST_TOKENS + 1):
            power *= chance
            expected += power
            rate = expected / (1 + length * (PASS_GROWTH + self._cost))
            if rate <= best_rate:
                break  # it has one maximum: each token adds less than the one before, and costs the same
            best, best_rate = length, rate
        if best:
            self._idle = 0
            return best
        self._idle += 1
        return 1 if self._idle % _RETRY_EVERY == 0 else 0

    def learn(self, drafted: int, accepted: int) -> None:
        """A pass checked `drafted` tokens, of which the first `accepted` were right."""
        if drafted:
            self._right = self._right * _MEMORY + accepted
            self._wrong = self._wrong * _MEMORY + (accepted < drafted)
