"""Penalties count tokens of the response, padding never."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from klippo.rewards.settings import LengthSettings
from klippo.rewards.simple import LengthPenalty, RepetitionPenalty
from tests.tolerance import float32_approx

from .conftest import make_rollout


def score(penalty, token_ids):
    return penalty.score(make_rollout([""] * len(token_ids), token_ids=token_ids)).reward.tolist()


def test_each_token_above_or_below_costs_one():
    ids = [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1] * 6]
    assert score(LengthPenalty(max_tokens=3), ids) == [0, 0, 0, -1, -3]
    assert score(LengthPenalty(min_tokens=3), ids) == [-2, -1, 0, 0, 0]
    assert score(LengthPenalty(min_tokens=2, max_tokens=4), ids) == [-1, 0, 0, 0, -2]


@pytest.mark.parametrize(
    ("ids", "ngram", "expected"),
    [
        ([1, 2, 3, 4], 2, 0),
        ([1, 1, 1, 1], 1, -0.75),
        ([1, 2, 1, 2, 1], 2, -0.5),
        ([7, 7, 7, 7, 7], 3, -2 / 3),
        ([1, 2], 3, 0),
    ],
)
def test_the_share_of_repeated_ngrams_is_the_penalty(ids, ngram, expected):
    assert score(RepetitionPenalty(ngram=ngram), [ids, [0] * 9])[0] == pytest.approx(
        expected, **float32_approx(2)
    )


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_repetition_lies_between_minus_one_and_zero_and_ignores_names(ids, ngram):
    (penalty,) = score(RepetitionPenalty(ngram=ngram), [ids])
    assert -1 < penalty <= 0
    assert [penalty] == score(RepetitionPenalty(ngram=ngram), [[i + 10 for i in ids]])


def test_a_length_reward_needs_a_range_that_is_one():
    with pytest.raises(ValidationError, match="needs max_tokens, min_tokens or both"):
        LengthSettings(kind="length")
    with pytest.raises(ValidationError, match="min_tokens=4 is above max_tokens=3"):
        LengthSettings(kind="length", min_tokens=4, max_tokens=3)
