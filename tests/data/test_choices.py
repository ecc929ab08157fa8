"""Best responses and pairs, chosen among logged ones by reward."""

import pytest

from klippo.data.logged import best_responses, pairs_by_reward
from klippo.types import Completion, LoggedResponse, Prompt


def logged(*rows):
    """Responses from (prompt's token, response's token, reward)."""
    return [
        LoggedResponse(
            prompt=Prompt(id=i, text="", token_ids=[prompt]),
            completion=Completion(token_ids=[response, 0], finished=True),
            reward=reward,
        )
        for i, (prompt, response, reward) in enumerate(rows)
    ]


def ids(responses):
    return [one.prompt.id for one in responses]


def pairs(rows, min_margin=0.0, max_per_prompt=9):
    found = pairs_by_reward(logged(*rows), min_margin=min_margin, max_per_prompt=max_per_prompt)
    return [(a.prompt.id, b.prompt.id) for a, b in found.pairs], found.num_ties, found.num_close


def test_the_best_of_each_prompt_and_the_first_of_equals():
    rows = [(7, 1, 0.5), (8, 1, 3.0), (7, 2, 2.0), (7, 3, 2.0), (9, 1, -4.0), (8, 2, 1.0)]
    best, by_prompt = best_responses(logged(*rows), 0.25)
    assert ids(best) == [2, 1, 4]
    assert by_prompt


@pytest.mark.parametrize(
    ("share", "kept"), [(0.4, [1, 3]), (0.41, [0, 1, 3]), (0.01, [3]), (1.0, [0, 1, 2, 3, 4])]
)
def test_where_each_prompt_has_one_response_the_best_share_of_all(share, kept):
    rows = [(1, 5, 0.0), (2, 5, 2.0), (3, 5, -1.0), (4, 5, 9.0), (6, 5, -1.0)]
    best, by_prompt = best_responses(logged(*rows), share)
    assert ids(best) == kept
    assert not by_prompt


def test_pairs_are_better_against_worse_of_one_prompt_widest_first():
    rows = [(7, 1, 1.0), (8, 1, 5.0), (7, 2, 4.0), (7, 3, 2.0), (8, 2, 6.0)]
    assert pairs(rows) == ([(2, 0), (2, 3), (3, 0), (4, 1)], 0, 0)
    assert pairs(rows, max_per_prompt=1) == ([(2, 0), (4, 1)], 0, 0)


def test_ties_and_close_rewards_make_no_pair():
    rows = [(7, 1, 1.0), (7, 2, 1.0), (7, 3, 1.4), (7, 3, 9.0)]
    # 0-1 have equal rewards, 2-3 equal tokens; 0-2 and 1-2 are 0.4 apart.
    assert pairs(rows, min_margin=0.5) == ([(3, 0), (3, 1)], 2, 2)
    assert pairs(rows, min_margin=0.3) == ([(3, 0), (3, 1), (2, 0), (2, 1)], 2, 0)


def test_a_margin_is_exactly_enough():
    assert pairs([(7, 1, 0.0), (7, 2, 0.5)], min_margin=0.5) == ([(1, 0)], 0, 0)
