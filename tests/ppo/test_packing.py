"""Micro-batches by a budget of tokens: every row once, within the budget, little padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klippo.ppo.update import micro_batches, padded_tokens

LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20)), min_size=1, max_size=24)


def plan(lengths, *, rows=None, size=None, budget=None):
    """Groups of row numbers for rows of (prompt, response) lengths."""
    width = max(max(pair) for pair in lengths)
    places = torch.arange(width)
    prompts, responses = torch.tensor(lengths).unbind(1)
    chosen = torch.arange(len(lengths)) if rows is None else torch.tensor(rows)
    found = micro_batches(
        chosen, width - 1 - places < prompts[:, None], places < responses[:, None],
        size=size, budget=budget,
    )  # fmt: skip
    return [group.tolist() for group in found]


def in_the_order_given(lengths, budget):
    """Oracle: rows as they come, a new group where the next row would not fit."""
    groups = [[]]
    for i in range(len(lengths)):
        if groups[-1] and padded_tokens([[*groups[-1], i]], lengths) > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


@given(LENGTHS, st.integers(1, 120))
def test_every_row_is_in_one_group_within_the_budget_with_no_more_padding(lengths, budget):
    groups = plan(lengths, budget=budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or padded_tokens([group], lengths) <= budget for group in groups)
    unsorted = padded_tokens(in_the_order_given(lengths, budget), lengths)
    assert padded_tokens(groups, lengths) <= unsorted


@given(LENGTHS, st.integers(1, 9))
def test_a_size_keeps_the_order_given(lengths, size):
    groups = plan(lengths, size=size)
    assert [i for group in groups for i in group] == list(range(len(lengths)))
    assert all(len(group) == size for group in groups[:-1])
    assert 1 <= len(groups[-1]) <= size


def test_by_hand():
    lengths = [(2, 8), (2, 1), (2, 7), (2, 2), (3, 30)]
    # 33 is more than the budget and alone; 10 and 9 make 20, and so do 4 and 3 with less.
    assert plan(lengths, budget=20) == [[4], [0, 2], [3, 1]]
    # Longest first would put 10 and 4 together, 20 and 3 tokens; as they come they are 8 and 10.
    assert plan(lengths, rows=[3, 1, 0], budget=20) == [[3, 1], [0]]
    assert plan(lengths) == [[0, 1, 2, 3, 4]]
    assert padded_tokens([[4], [0, 2], [3, 1]], lengths) == 33 + 20 + 8


def test_sorting_by_total_length_may_add_padding_and_then_is_not_done():
    # Totals of 11 each: neighbours in that order would be 20 tokens wide.
    lengths = [(10, 1), (10, 1), (1, 10), (1, 10)]
    mixed = [lengths[0], lengths[2], lengths[1], lengths[3]]
    for rows in (lengths, mixed):
        assert padded_tokens(plan(rows, budget=22), rows) == 44


@pytest.mark.parametrize("budget", [1, 30, 10**6])
def test_a_group_is_never_empty(budget):
    assert all(plan([(1, 0)] * 3, budget=budget))
