"""The reward of this experiment: a plain Python function of the answers' text."""

from __future__ import annotations

import re

LONGEST_SHORT_WORD = 4


def short_words(responses: list[str]) -> list[float]:
    """The share of words with at most four letters; 0 for an answer without words."""
    return [_share(re.findall(r"[A-Za-z]+", response)) for response in responses]


def _share(words: list[str]) -> float:
    return sum(len(word) <= LONGEST_SHORT_WORD for word in words) / max(len(words), 1)
