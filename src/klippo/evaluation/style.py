"""How answers are written, in numbers that anyone can count again; none says better or worse.

A word is a run of letters and digits, apostrophes inside it included, in lower case. n answers per
model, V different words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_WORD = re.compile(r"\w+(?:'\w+)*")
FIRST_PERSON = frozenset(["i", "me", "my", "mine", "myself", "i'm", "i've", "i'd", "i'll"])
NUM_SHUFFLES = 500


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def distinct_pairs(text: str) -> float | None:
    """Different pairs of neighbouring words / all such pairs (distinct-2, Li et al. 2016)."""
    return _distinct(words(text), 2)


def repetition(text: str) -> float | None:
    """Share of the runs of three words that occurred before in the same text."""
    distinct = _distinct(words(text), 3)
    return None if distinct is None else 1 - distinct


def first_person(text: str) -> float | None:
    """Share of the words that are I, me, my, mine, myself, I'm, I've, I'd or I'll (English)."""
    found = words(text)
    return sum(word in FIRST_PERSON for word in found) / len(found) if found else None


STYLE: Mapping[str, Callable[[str], float | None]] = {
    "distinct_pairs": distinct_pairs,
    "repetition": repetition,
    "first_person": first_person,
}
"""Each is None for a text with too few words."""


def _distinct(tokens: Sequence[str], n: int) -> float | None:
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(runs)) / len(runs) if runs else None


@dataclass(frozen=True, slots=True, kw_only=True)
class WordShift:
    """How far the word frequencies of two models are apart, beside what chance does."""

    distance: float  # total variation: half the sum of |p(word) - q(word)|, 0 to 1
    by_chance: float  # mean distance when the two answers to each prompt swap sides at random
    chance_limit: float  # 95% of those are not above this
    p_value: float  # share of those that are at least `distance`, which counts among them


def word_shift(before: Sequence[str], after: Sequence[str], seed: int = 0) -> WordShift:
    """Compare the words of n answers with those of n others to the same prompts.

    A permutation test: were the models the same, either answer of a prompt could be either's.
    """
    from scipy import sparse

    first, second = ([Counter(words(text)) for text in side] for side in (before, after))
    column = {word: i for i, word in enumerate(sorted(set().union(*first, *second)))}

    def counts(side: Sequence[Counter[str]]) -> Any:  # (n, V), sparse
        entries = [(row, column[w], n) for row, one in enumerate(side) for w, n in one.items()]
        rows, columns, numbers = np.array(entries, dtype=np.intp).reshape(-1, 3).T
        shape = (len(side), max(len(column), 1))
        return sparse.csr_array((numbers.astype(np.float64), (rows, columns)), shape=shape)

    old, new = counts(first), counts(second)
    swapped = np.random.default_rng(seed).integers(0, 2, (NUM_SHUFFLES, len(first)))
    swapped = np.concatenate([np.zeros((1, len(first))), swapped])  # the first is as observed
    moved = swapped @ (new - old)  # (1 + NUM_SHUFFLES, V)
    distances = _total_variation(old.sum(0) + moved, new.sum(0) - moved)
    observed, shuffled = distances[0], distances[1:]
    return WordShift(
        distance=float(observed),
        by_chance=float(shuffled.mean()),
        chance_limit=float(np.quantile(shuffled, 0.95)),
        p_value=float((1 + (shuffled >= observed - 1e-12).sum()) / (1 + NUM_SHUFFLES)),
    )


def _total_variation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(…, V) counts of two sides -> (…); a side without words is at distance 1 of one with."""
    p, q = (side / np.maximum(side.sum(-1, keepdims=True), 1) for side in (first, second))
    distance: np.ndarray = np.maximum(np.abs(p - q).sum(-1) / 2, np.abs(p.sum(-1) - q.sum(-1)))
    return distance
