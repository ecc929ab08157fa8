"""Means with confidence intervals, and paired comparisons of before and after.

n samples; intervals are two-sided 95% ones from Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean and how well it is known."""

    mean: float
    low: float
    high: float
    num: int
    standard_error: float
    """Of the mean; infinite for one value."""

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """The same prompts before and after."""

    before: Estimate
    after: Estimate
    difference: Estimate
    before_sd: float
    """Standard deviation of single samples before."""

    @property
    def difference_in_sd(self) -> float:
        """The mean difference in units of `before_sd`; 0 where nothing varied."""
        return self.difference.mean / self.before_sd if self.before_sd > 0 else 0.0


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of n values with its interval; the interval is infinite for n = 1.

    Raises ValueError for no values.
    """
    from scipy import stats

    if len(values) == 0:
        raise ValueError("no values to average")
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if len(sample) == 1:
        return Estimate(mean=mean, low=-math.inf, high=math.inf, num=1, standard_error=math.inf)
    error = float(sample.std(ddof=1)) / math.sqrt(len(sample))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(sample) - 1)) * error
    return Estimate(
        mean=mean, low=mean - half, high=mean + half, num=len(sample), standard_error=error
    )


def share(successes: float, num: int) -> Estimate:
    """A share of `num` trials (draws may count as halves) with Wilson's score interval (1927).

    Unlike a mean's interval it has a width also where all trials ended the same way. Raises
    ValueError for no trials.
    """
    from scipy import stats

    if num == 0:
        raise ValueError("no trials to take a share of")
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    mean = successes / num
    error = math.sqrt(mean * (1 - mean) / num)
    middle = (mean + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z * math.sqrt(error**2 + z**2 / (4 * num**2)) / (1 + z**2 / num)
    return Estimate(mean=mean, low=middle - half, high=middle + half, num=num, standard_error=error)


def compare_paired(
    before: Sequence[float | None], after: Sequence[float | None]
) -> PairedComparison | None:
    """Compare values of the same prompts; pairs with a missing value are left out.

    None where no pair is left.
    """
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    if not pairs:
        return None
    first, second = np.asarray(pairs, dtype=np.float64).T
    return PairedComparison(
        before=estimate(first.tolist()),
        after=estimate(second.tolist()),
        difference=estimate((second - first).tolist()),
        before_sd=float(first.std(ddof=1)) if len(first) > 1 else 0.0,
    )
