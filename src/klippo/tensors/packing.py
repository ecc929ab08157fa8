"""Which rows go through the models together: micro-batches of few rows, or of few tokens.

B sequences in the batch, n rows to share out. A micro-batch is as wide as its longest prompt and
its longest response together; what a row has less than that is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Lengths = tuple[int, int]
"""Tokens of a row's prompt, and of its response."""


def micro_batches(
    rows: Tensor,
    prompt_mask: Tensor,
    response_mask: Tensor,
    *,
    size: int | None = None,
    budget: int | None = None,
) -> list[Tensor]:
    """Row numbers (n,) in groups: every row once, at least one row in each group.

    Masks are (B, P) and (B, T) bool. Groups are of `size` rows in the order given; or, with
    `budget`, of rows of like length whose number times the group's width is at most `budget`
    tokens, a longer row being a group of its own; or, with neither, all rows are one group. The
    number of groups depends on the lengths: processes may have unlike ones.
    """
    if budget is None:
        return [rows] if size is None else list(torch.split(rows, size))
    prompts, responses = prompt_mask[rows].sum(1).tolist(), response_mask[rows].sum(1).tolist()
    lengths = list(zip(prompts, responses, strict=True))
    plans = [_packed(_ordered(lengths, key), lengths, budget) for key in ORDERS]
    best = min(plans, key=lambda plan: padded_tokens(plan, lengths))
    return [rows[torch.tensor(group, device=rows.device)] for group in best]


def split_up(groups: Sequence[Tensor], num: int) -> list[Tensor]:
    """The groups in `num` smaller ones: the largest is halved, again and again.

    They must have at least `num` rows together.
    """
    found = list(groups)
    while len(found) < num:
        place = max(range(len(found)), key=lambda i: len(found[i]))
        found[place : place + 1] = found[place].tensor_split(2)
    return found


def padded_tokens(groups: Sequence[Sequence[int]], lengths: Sequence[Lengths]) -> int:
    """Tokens that go through the models, padding included."""
    return sum(len(group) * _width(lengths[i] for i in group) for group in groups)


ORDERS: tuple[Callable[[Lengths], int] | None, ...] = (sum, max, lambda of: of[1], None)
"""By total length, by the longer of the two, by response; and as given, so that sorting never adds
padding: rows of one length may have prompts and responses of unlike ones."""


def _ordered(lengths: Sequence[Lengths], key: Callable[[Lengths], int] | None) -> list[int]:
    places = list(range(len(lengths)))
    return places if key is None else sorted(places, key=lambda i: -key(lengths[i]))


def _packed(order: Sequence[int], lengths: Sequence[Lengths], budget: int) -> list[list[int]]:
    """Groups of neighbours, each as large as the budget lets it be."""
    groups: list[list[int]] = []
    prompt = response = 0  # the longest of the last group
    for i in order:
        longer = max(prompt, lengths[i][0]), max(response, lengths[i][1])
        if groups and (len(groups[-1]) + 1) * sum(longer) <= budget:
            groups[-1].append(i)
            prompt, response = longer
        else:
            groups.append([i])
            prompt, response = lengths[i]
    return groups


def _width(lengths: Iterable[Lengths]) -> int:
    pairs = list(lengths)
    return max(prompt for prompt, _ in pairs) + max(response for _, response in pairs)
