"""Best-of-n from N scored samples per prompt, without sampling bias.

P prompts, N samples of each, sorted by proxy where it says so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def kl_of_best_of(n: int) -> float:
    """log n - (n - 1) / n, nats: an upper bound of the KL that picking the best of n costs.

    Equal to it only where no two samples tie (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: Floats, gold: Floats, n: int) -> float:
    """Expected gold score of the sample with the highest proxy score among n of N samples.

    Over all subsets of size n: R_n = sum_{i=n..N} C(i-1, n-1) / C(N, n) * gold_(i), samples sorted
    by proxy ascending (Nakano et al. 2021, arXiv 2112.09332, appendix I). Samples whose proxies tie
    are picked with equal chances, so each has the mean gold score of its tie.

    proxy, gold (N,); 1 <= n <= N.
    """
    order, starts = _sorted_ties(proxy)
    return float(_pick_weights(len(proxy), n) @ _mean_within_ties(gold[order], starts))


def best_of_n_curve(proxy: Floats, gold: Floats, ns: Sequence[int]) -> Floats:
    """`best_of_n` for every n: (len(ns),). The samples are sorted once."""
    order, starts = _sorted_ties(proxy)
    levelled = _mean_within_ties(gold[order], starts)
    return np.array([float(_pick_weights(len(proxy), n) @ levelled) for n in ns])


@functools.lru_cache(maxsize=64)  # the same for every prompt
def _pick_weights(num: int, n: int) -> Floats:
    """Chance that the i-th lowest of `num` samples is the best of n: (num,), sums to 1."""
    from scipy.special import gammaln

    if not 1 <= n <= num:
        raise ValueError(f"n={n}: best of n needs 1 <= n <= {num}, the number of samples")
    rank = np.arange(n, num + 1, dtype=np.float64)  # from 1, ascending

    def log_choose(top: Floats, bottom: float) -> Floats:
        chosen: Floats = gammaln(top + 1) - gammaln(bottom + 1) - gammaln(top - bottom + 1)
        return chosen

    weights = np.zeros(num)
    whole = log_choose(np.array([float(num)]), n)
    weights[n - 1 :] = np.exp(log_choose(rank - 1, n - 1) - whole)
    chances: Floats = weights / weights.sum()
    return chances


def _sorted_ties(proxy: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The order that sorts, and where each run of equal values starts in it."""
    order = np.argsort(proxy, kind="stable")
    values = proxy[order]
    new = np.concatenate([[True], values[1:] != values[:-1]])
    return order, np.flatnonzero(new)


def _mean_within_ties(values: Floats, starts: NDArray[np.intp]) -> Floats:
    lengths = np.diff(np.append(starts, len(values)))
    means = np.add.reduceat(values, starts) / lengths
    levelled: Floats = np.repeat(means, lengths)
    return levelled


def default_ns(num: int) -> list[int]:
    """1, 2, 4, … and the largest n that `num` samples allow."""
    powers = [2**k for k in range(num.bit_length()) if 2**k <= num]
    return powers if powers[-1] == num else [*powers, num]
