"""Choose among logged responses by reward: the best ones, or pairs of a better and a worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from klippo.types import LoggedResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardPairs:
    """Two responses to the same prompt, the better one first, and what was left out."""

    pairs: list[tuple[LoggedResponse, LoggedResponse]]
    num_ties: int
    """Pairs with equal rewards or equal tokens."""
    num_close: int
    """Other pairs whose rewards differ by less than the least margin."""


def best_responses(
    responses: Sequence[LoggedResponse], share: float
) -> tuple[list[LoggedResponse], bool]:
    """The best response to each prompt, the first of equals, in the prompts' order.

    If each prompt has one response alone, the result is the best `share` of them all, at least one,
    in the data's order, and False.
    """
    groups = _by_prompt(responses)
    if len(groups) < len(responses):
        return [max(group, key=lambda one: one.reward) for group in groups], True
    number = math.ceil(share * len(responses))
    order = sorted(range(len(responses)), key=lambda i: -responses[i].reward)
    return [responses[i] for i in sorted(order[:number])], False


def pairs_by_reward(
    responses: Sequence[LoggedResponse], *, min_margin: float, max_per_prompt: int
) -> RewardPairs:
    """Of each prompt the pairs whose rewards lie farthest apart, at most `max_per_prompt`."""
    chosen: list[tuple[LoggedResponse, LoggedResponse]] = []
    num_ties = num_close = 0
    for group in _by_prompt(responses):
        pairs = []
        for first, second in combinations(group, 2):
            better, worse = (first, second) if first.reward > second.reward else (second, first)
            same_tokens = better.completion.token_ids == worse.completion.token_ids
            if better.reward == worse.reward or same_tokens:
                num_ties += 1
            elif better.reward - worse.reward < min_margin:
                num_close += 1
            else:
                pairs.append((better, worse))
        pairs.sort(key=lambda pair: pair[1].reward - pair[0].reward)
        chosen += pairs[:max_per_prompt]
    return RewardPairs(pairs=chosen, num_ties=num_ties, num_close=num_close)


def _by_prompt(responses: Sequence[LoggedResponse]) -> list[list[LoggedResponse]]:
    """Responses to what is one prompt for the policy, in the data's order."""
    groups: dict[tuple[int, ...], list[LoggedResponse]] = {}
    for one in responses:
        groups.setdefault(tuple(one.prompt.token_ids), []).append(one)
    return list(groups.values())
