"""The evaluations of one run as tables.

S evaluated steps, P prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klippo.evaluation.samples import SampleRow

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The same prompts at every evaluated step; missing scores are NaN."""

    steps: list[int]
    prompt_ids: list[int]
    proxy: Floats  # (S, P)
    kl: Floats  # (S, P) exact, nats per response
    gold: Floats | None = None  # (S, P), None if no step has gold scores

    @property
    def sqrt_kl(self) -> Floats:
        """Distance d = sqrt(mean KL) at each step (S,)."""
        distance: Floats = np.sqrt(np.maximum(self.kl.mean(1), 0.0))
        return distance


def history(evaluations: Mapping[int, Sequence[SampleRow]]) -> History:
    """The prompts that every step evaluated, in order.

    Raises ValueError without evaluations, and without a prompt that all of them share.
    """
    if not evaluations:
        raise ValueError("there are no evaluations")
    steps = sorted(evaluations)
    tables = [{row["prompt_id"]: row for row in evaluations[step]} for step in steps]
    shared = sorted(set(tables[0]).intersection(*tables))
    if not shared:
        raise ValueError("no prompt was evaluated at every step")

    def values(key: str) -> Floats:  # None becomes NaN
        return np.array([[table[id].get(key) for id in shared] for table in tables], np.float64)

    gold = values("gold")
    return History(
        steps=steps,
        prompt_ids=shared,
        proxy=values("proxy"),
        kl=values("kl_exact_nats"),
        gold=None if bool(np.isnan(gold).all()) else gold,
    )
