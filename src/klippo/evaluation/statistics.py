"""Means and shares with 95% confidence intervals, and paired comparisons of before and after."""

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
    standard_error: float  # of the mean; infinite for one value

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """The same prompts before and after."""

    before: Estimate
    after: Estimate
    difference: Estimate
    before_sd: float  # standard deviation of single samples before

    @property
    def difference_in_sd(self) -> float:
        """The mean difference in units of `before_sd`; 0 if nothing varied."""
        return self.difference.mean / self.before_sd if self.before_sd > 0 else 0.0


def estimate(values: Sequence[float]) -> Estimate:
    """Mean with Student's t interval, which is infinite for one value; ValueError for none."""
    from scipy import stats

    if len(values) == 0:
        raise ValueError("no values to average")
    sample = np.asarray(values, dtype=np.float64)
    num, mean, error, half = len(sample), float(sample.mean()), math.inf, math.inf
    if num > 1:
        error = float(sample.std(ddof=1)) / math.sqrt(num)
        half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, num - 1)) * error
    return Estimate(mean=mean, low=mean - half, high=mean + half, num=num, standard_error=error)


def normal_quantile() -> float:
    """z of the two-sided interval, 1.96."""
    from scipy import stats

    return float(stats.norm.ppf(0.5 + CONFIDENCE / 2))


def wilson(share: float, num: float) -> tuple[float, float]:
    """Wilson's interval (1927) of a share among `num` independent cases.

    Unlike a mean's interval it has a width even if all cases ended the same way.
    """
    z = normal_quantile()
    scale = 1 + z * z / num
    middle = (share + z * z / (2 * num)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return middle - half, middle + half


def share(successes: float, num: int, num_independent: float | None = None) -> Estimate:
    """A share of `num` trials (draws may count as halves) with Wilson's interval.

    `num_independent` is the number that counts for the interval, if trials depend on each other.
    Raises ValueError for no trials.
    """
    if num == 0:
        raise ValueError("no trials to take a share of")
    mean, cases = successes / num, num if num_independent is None else num_independent
    low, high = wilson(mean, cases)
    error = math.sqrt(mean * (1 - mean) / cases)
    return Estimate(mean=mean, low=low, high=high, num=num, standard_error=error)


def compare_paired(
    before: Sequence[float | None], after: Sequence[float | None]
) -> PairedComparison | None:
    """Compare values of the same prompts; pairs with a missing value are left out.

    None if no pair is left.
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
