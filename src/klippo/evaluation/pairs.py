"""How well scores tell the better of two responses: accuracy, log loss, calibration.

n held-out pairs, K members. A difference is the chosen response's score minus the rejected one's;
its sigmoid is the probability that the Bradley-Terry model gives to the pair's label. Units name
what pairs share (prompt, or responses).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from klippo.evaluation.history import Floats
from klippo.evaluation.statistics import Estimate, normal_quantile, share
from klippo.tensors.ensembles import combine

NUM_BINS = 10
Units = Sequence[tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityPoint:
    """One bin of pairs with about the same confidence."""

    confidence: float  # mean probability that the model gives to its choice, 0.5 to 1
    accuracy: float  # how often this choice was right
    num: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReport:
    """Figures of one model on held-out pairs."""

    accuracy: Estimate  # share of pairs whose chosen response scores higher; ties count half
    log_loss_nats: float  # mean of -log sigmoid(difference); log 2 = 0.693 is a coin
    calibration_error: float  # ECE: mean |confidence - accuracy| over bins of equal size
    reliability: list[ReliabilityPoint]


def report_pairs(
    differences: Sequence[float], units: Units, num_bins: int = NUM_BINS
) -> PairReport:
    """The figures of n differences."""
    d = np.asarray(differences, dtype=np.float64)
    points = reliability(d, num_bins)
    gaps = [point.num * abs(point.accuracy - point.confidence) for point in points]
    return PairReport(
        accuracy=accuracy(d, units),
        log_loss_nats=float(np.logaddexp(0, -d).mean()),
        calibration_error=sum(gaps) / len(d),
        reliability=points,
    )


def hits(differences: ArrayLike) -> Floats:
    """1 where the chosen response scores higher, 0 where lower, a half where equal."""
    right: Floats = (np.sign(np.asarray(differences, dtype=np.float64)) + 1) / 2
    return right


def accuracy(differences: Floats, units: Units) -> Estimate:
    """Share of right pairs with Wilson's 95% interval.

    Pairs that share a prompt or a response are not independent: n is divided by the design effect
    V_shared / V_independent, with V_shared the sum of e_i e_j over pairs i, j that share a unit
    (Aronow, Samii and Assenova 2015), e = hit - mean; never by less than 1.
    """
    right = hits(differences)
    effect = _design_effect(right - right.mean(), units)
    return share(float(right.sum()), len(right), len(right) / effect)


def _design_effect(errors: Floats, units: Units) -> float:
    independent = float((errors**2).sum())
    if independent == 0:
        return 1.0
    sums: defaultdict[str, float] = defaultdict(float)
    repeated = 0.0
    for error, names in zip(errors.tolist(), units, strict=True):
        for name in names:
            sums[name] += error
        repeated += (len(names) - 1) * error**2
    shared = sum(value**2 for value in sums.values()) - repeated
    return max(shared / independent, 1.0)


def gain(ensemble: Sequence[float], members: Sequence[Sequence[float]], units: Units) -> Estimate:
    """Accuracy of the ensemble minus the members' mean accuracy on the same n pairs.

    The 95% interval is the normal one, with the design effect of `accuracy`.
    """
    values = hits(ensemble) - hits(members).mean(0)  # (n,)
    mean, num = float(values.mean()), len(values)
    error = float(values.std()) / math.sqrt(num / _design_effect(values - mean, units))
    half = normal_quantile() * error
    return Estimate(mean=mean, low=mean - half, high=mean + half, num=num, standard_error=error)


def reliability(differences: Floats, num_bins: int) -> list[ReliabilityPoint]:
    """Bins of equal numbers of pairs, from the least to the most confident."""
    confidence, right = 1 / (1 + np.exp(-np.abs(differences))), hits(differences)
    order = np.argsort(confidence, kind="stable")
    return [
        ReliabilityPoint(
            confidence=float(confidence[rows].mean()),
            accuracy=float(right[rows].mean()),
            num=len(rows),
        )
        for rows in np.array_split(order, min(num_bins, len(order)))
    ]


def ensemble_differences(
    differences: Sequence[Sequence[float]], sds: Sequence[float | None]
) -> list[float]:
    """Differences (n,) of the mean score of K members.

    If every member's sd on the reference responses is known, members are standardised before
    the mean, and the result is put back on the scale of logits by the mean sd:
    mean_k(d_k / sd_k) * mean_k(sd_k). Else it is the plain mean of d_k.
    """
    d = np.asarray(differences, dtype=np.float64)  # (K, n)
    known = np.asarray([sd for sd in sds if sd is not None], dtype=np.float64)
    if len(known) == len(d):
        d = d / known[:, None] * known.mean()
    mean: list[float] = combine(torch.from_numpy(d), "mean").tolist()
    return mean


def error_correlation(differences: Sequence[Sequence[float]]) -> float | None:
    """Mean Pearson correlation, over pairs of members, of being wrong on the same pairs.

    None for one member, and if fewer than two members are sometimes right and sometimes wrong.
    """
    wrong = 1 - hits(differences)  # (K, n)
    varied = wrong[wrong.std(axis=1) > 0]
    if len(varied) < 2:
        return None
    matrix = np.corrcoef(varied)
    return float(matrix[np.triu_indices(len(varied), 1)].mean())
