"""What scores are worth beside people's ratings: correlations and pairs, bootstrapped over texts.

n texts, each with a score and a mean human rating; intervals are 95% percentile bootstrap ones
over texts (Efron 1979), so that pairs which share a text are not taken for independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from klippo.evaluation.statistics import wilson
from klippo.judge.parsing import LABELS

NUM_RESAMPLES = 2000
MIN_GAP = 1.0  # of mean ratings, -4 to 4: pairs on which people clearly differ
Values = NDArray[np.float64]


def worth(scores: Sequence[float | None], ratings: Sequence[float]) -> dict[str, Any]:
    """Rank and linear correlation, and the share of pairs ordered as people order them.

    Texts without a score are left out; equal scores count half. None where it is undefined, as a
    correlation is for a constant.
    """
    kept = [(s, r) for s, r in zip(scores, ratings, strict=True) if s is not None]
    if len(kept) < 3:
        return {"num": len(kept), "spearman": None, "pearson": None, "pairs": None}
    x, y = np.asarray(kept, dtype=np.float64).T
    rng = np.random.default_rng(0)
    resamples = rng.integers(0, len(x), (NUM_RESAMPLES, len(x)))
    return {
        "num": len(kept),
        "spearman": interval(spearman, x, y, resamples),
        "pearson": interval(pearson, x, y, resamples),
        "pairs": interval(pair_accuracy, x, y, resamples),
    }


def interval(
    figure: Callable[[Values, Values], float | None],
    x: Values,
    y: Values,
    resamples: NDArray[np.int64],
) -> dict[str, float] | None:
    """The figure of n texts, and the 2.5th and 97.5th percentile of it over resamples."""
    value = figure(x, y)
    drawn = [found for rows in resamples if (found := figure(x[rows], y[rows])) is not None]
    if value is None or not drawn:
        return None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def pearson(x: Values, y: Values) -> float | None:
    """Linear correlation; None where one side is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Values, y: Values) -> float | None:
    """Pearson's correlation of the ranks, ties at their mean rank."""
    return pearson(stats.rankdata(x), stats.rankdata(y))


def pair_accuracy(x: Values, y: Values) -> float | None:
    """Share of pairs whose ratings differ by MIN_GAP or more that the scores order alike."""
    gaps = y[:, None] - y[None, :]
    counted = gaps >= MIN_GAP
    if not counted.any():
        return None
    hits = (np.sign(x[:, None] - x[None, :]) + 1) / 2
    return float(hits[counted].mean())


def difference(
    first: Sequence[float], second: Sequence[float], ratings: Sequence[float]
) -> dict[str, float] | None:
    """Spearman of the first scores minus that of the second, on the same resampled texts."""
    both = np.asarray([first, second], dtype=np.float64).T  # (n, 2)
    y = np.asarray(ratings, dtype=np.float64)
    resamples = np.random.default_rng(0).integers(0, len(y), (NUM_RESAMPLES, len(y)))

    def gain(x: Values, rated: Values) -> float | None:
        a, b = spearman(x[:, 0], rated), spearman(x[:, 1], rated)
        return None if a is None or b is None else a - b

    return interval(gain, both, y, resamples)


def agreement(means: Sequence[float], sds: Sequence[float], votes: int) -> dict[str, Any]:
    """How well single votes on the same text agree: ICC(1,1) of Shrout and Fleiss (1979).

    `means` and `sds` (population) are those of the votes on each text; 1 is perfect agreement, 0
    none beyond chance.
    """
    within = float(np.mean(np.square(sds))) * votes / (votes - 1)
    between = votes * float(np.var(means, ddof=1))
    total = between + (votes - 1) * within
    return {
        "num": len(means),
        "votes": votes,
        "icc": (between - within) / total if total > 0 else None,
        "mean_sd": float(np.mean(sds)),
        "all_equal": float(np.mean(np.asarray(sds) == 0)),
    }


def share(count: int, num: int) -> dict[str, float]:
    """A share with Wilson's interval."""
    low, high = wilson(count / num, num)
    return {"value": count / num, "low": low, "high": high, "num": num}


def label_probabilities(logprobs: Mapping[str, float]) -> list[float]:
    """Probability of each label A to K, a space around it not counted; (11,)."""
    found = dict.fromkeys(LABELS, 0.0)
    for token, logprob in logprobs.items():
        if (label := token.strip()) in found:
            found[label] += math.exp(logprob)
    return list(found.values())


def most_likely(probabilities: Sequence[float]) -> float:
    """The score of the likeliest label."""
    return float(np.argmax(probabilities))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and range."""
    x = np.asarray(values, dtype=np.float64)
    return {"mean": float(x.mean()), "sd": float(x.std()), "low": float(x.min()),
            "high": float(x.max())}  # fmt: skip
