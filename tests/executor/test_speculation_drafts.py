"""How many tokens are drafted, and drafts copied from the text: no torch needed."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from executor.speculation.length import MOST_TOKENS, PASS_GROWTH, DraftLength
from executor.speculation.lookup import Lookup


def simulate(chance: float, cost: float = 0.0, passes: int = 400) -> tuple[float, DraftLength]:
    """(Tokens for the cost of a pass over one token, the choice at the end), drafts being right so often."""
    draw, length = random.Random(1), DraftLength(cost)
    tokens, spent = 0, 0.0
    for _ in range(passes):
        most = length.next()
        right = next((i for i in range(most) if draw.random() >= chance), most)
        length.learn(most, right)
        tokens, spent = tokens + right + 1, spent + 1 + most * (PASS_GROWTH + cost)
    return tokens / spent, length


@pytest.mark.parametrize(("chance", "least"), [(0.0, 0.98), (0.5, 1.85), (0.8, 4.3), (1.0, 50.0)])
def test_free_drafts_pay_as_far_as_they_are_right(chance: float, least: float) -> None:
    rate, length = simulate(chance)
    assert rate >= least
    assert abs(length.chance - chance) < 0.25


def test_dear_drafts_are_left_where_they_are_wrong() -> None:
    """Drafting costs a fifth of a pass each: never pays at 0, which costs little to find out."""
    rate, length = simulate(0.0, cost=0.2)
    assert rate > 0.96 and {length.next() for _ in range(8)} == {0, 1}
    rate, length = simulate(0.8, cost=0.2)
    assert rate > 1.6 and 1 <= length.next() <= 8


def test_length_is_the_best_of_all() -> None:
    for right, wrong in ((1, 3), (3, 1), (9, 1), (99, 1)):
        length = DraftLength(0.01)
        length._right, length._wrong = right, wrong
        rates = []
        for most in range(MOST_TOKENS + 1):
            expected = sum(length.chance**i for i in range(most + 1))
            rates.append(expected / (1 + most * (PASS_GROWTH + 0.01)))
        assert length.next() == rates.index(max(rates))


def test_same_drafts_in_every_run() -> None:
    assert [simulate(0.5)[1].chance for _ in range(2)] == [simulate(0.5)[1].chance] * 2


def test_lookup_goes_on_as_the_text_did_last_time() -> None:
    text = [1, 2, 3, 4, 9, 2, 3, 5, 6, 7, 2, 3]
    assert Lookup().propose(text, 3) == [5, 6, 7], "the latest place of two tokens"
    assert Lookup().propose([1, 2, 3, 4, 5, 2, 3, 6, 1, 2, 3], 2) == [4, 5], "three tokens before two"
    assert Lookup().propose([1, 2, 3], 4) == [] == Lookup().propose([1, 1], 4)
    assert Lookup().propose([1, 8, 9, 8, 9], 5) == [8, 9, 8, 9, 8], "a text that repeats itself goes on so"


def test_lookup_of_a_growing_text_is_that_of_the_whole() -> None:
    draw = random.Random(3)
    text = [draw.randrange(4) for _ in range(200)]
    growing = Lookup()
    cuts = sorted(draw.sample(range(2, 200), 40))
    for _, cut in pairwise([0, *cuts]):
        assert growing.propose(text[:cut], 8) == Lookup().propose(text[:cut], 8)
