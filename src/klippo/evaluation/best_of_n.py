"""Best-of-n from N scored samples per prompt, over all subsets of n, with intervals over prompts.

P prompts, N samples of each, M samples in all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from klippo.evaluation.history import Floats
from klippo.evaluation.scaling import Curve, Fit, fit
from klippo.evaluation.statistics import estimate


def kl_of_best_of(n: int) -> float:
    """log n - (n - 1) / n, nats: an upper bound of the KL that picking the best of n costs.

    Equal to it only if no two samples tie (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def default_ns(num: int) -> list[int]:
    """1, 2, 4, … and the largest n that `num` samples allow."""
    powers = [2**k for k in range(num.bit_length())]
    return powers if powers[-1] == num else [*powers, num]


def best_of_n(proxy: Floats, gold: Floats, n: int) -> float:
    """Expected gold score of the sample with the highest proxy score among n of N samples.

    Over all subsets of size n: R_n = sum_{i=n..N} C(i-1, n-1) / C(N, n) * gold_(i), samples sorted
    by proxy ascending (Nakano et al. 2021, arXiv 2112.09332, appendix I). Samples whose proxies tie
    are picked with equal chances, so each has the mean gold score of its tie.

    proxy, gold (N,); 1 <= n <= N.
    """
    return float(best_of_n_curve(proxy, gold, [n])[0])


def best_of_n_curve(proxy: Floats, gold: Floats, ns: Sequence[int]) -> Floats:
    """`best_of_n` for every n: (len(ns),). The samples are sorted once."""
    _, tie, sizes = np.unique(proxy, return_inverse=True, return_counts=True)
    means = np.bincount(tie, weights=gold) / sizes
    by_rank = np.repeat(means, sizes)  # (N,) gold of the samples by proxy, ties at their mean
    return np.array([float(_pick_chances(len(proxy), n) @ by_rank) for n in ns])


@functools.lru_cache(maxsize=64)  # the same for every prompt
def _pick_chances(num: int, n: int) -> Floats:
    """Chance that the i-th lowest of `num` samples is the best of n: (num,), sums to 1."""
    from scipy.special import gammaln

    if not 1 <= n <= num:
        raise ValueError(f"n={n}: best of n needs 1 <= n <= {num}, the number of samples")
    rank = np.arange(n, num + 1, dtype=np.float64)  # from 1, ascending
    # log C(rank - 1, n - 1), but for what all ranks share
    log_chances = gammaln(rank) - gammaln(rank - n + 1)
    chances = np.zeros(num)
    chances[n - 1 :] = np.exp(log_chances - log_chances[-1])
    normalized: Floats = chances / chances.sum()
    return normalized


class Curves(NamedTuple):
    """Expected scores of the picked sample for every prompt and n; NaN if too few are scored."""

    proxy: Floats  # (P, len(ns))
    gold: Floats | None  # (P, len(ns))
    num_unscored: int


def curves(
    proxy: Floats, gold: Floats | None, groups: Sequence[NDArray[np.intp]], ns: Sequence[int]
) -> Curves:
    """Best-of-n for every prompt; `groups` holds the sample numbers of each. proxy, gold (M,)."""
    missing = np.isnan(proxy) if gold is None else np.isnan(proxy) | np.isnan(gold)

    def picked(scores: Floats) -> Floats:
        result = np.full((len(groups), len(ns)), math.nan)
        for p, numbers in enumerate(groups):
            kept = numbers[~missing[numbers]]
            allowed = [i for i, n in enumerate(ns) if n <= len(kept)]
            result[p, allowed] = best_of_n_curve(
                proxy[kept], scores[kept], [ns[i] for i in allowed]
            )
        return result

    by_gold = None if gold is None else picked(gold)
    return Curves(picked(proxy), by_gold, int(missing.sum()))


def points(by_prompt: Floats) -> list[dict[str, float | None]]:
    """Mean and 95% interval over prompts for every n; null for what is not known."""
    known = [values[~np.isnan(values)].tolist() for values in by_prompt.T]
    means = [estimate(values) if values else None for values in known]
    ends = ("mean", "low", "high")
    return [{end: None if m is None else finite(getattr(m, end)) for end in ends} for m in means]


def fit_gold(gold: Floats, ns: Sequence[int], seed: int = 0) -> Fit | None:
    """The law of best-of-n fitted to gold (P, len(ns)); ns begin with 1.

    None if too few n or prompts have values.
    """
    assert ns[0] == 1
    known = gold[~np.isnan(gold).any(1)]
    if len(known) < 2:
        return None
    kl = np.repeat([[kl_of_best_of(n)] for n in ns], len(known), axis=1)
    return fit("bon", [Curve(gold=known.T, kl=kl)], seed=seed)


def fit_figures(law: Fit) -> dict[str, Any]:
    """A fit as JSON holds it; an infinite end of an interval is null."""
    intervals = {"alpha": law.alpha, "beta": law.beta, "peak": law.peak}
    return {
        "law": "gain = d (alpha - beta d), d = sqrt(KL bound)",
        **{name: {k: finite(v) for k, v in asdict(of).items()} for name, of in intervals.items()},
        "num_points": law.num_points,
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
