"""How well scores tell the better of two responses: accuracy, log loss, calibration.

n held-out pairs, K members. A difference is the chosen response's score minus the rejected one's;
its sigmoid is the probability that the Bradley-Terry model gives to the pair's label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from klippo.evaluation.statistics import CONFIDENCE, Estimate
from klippo.tensors.ensembles import combine

NUM_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityPoint:
    """One bin of pairs with about the same confidence."""

    confidence: float
    """Mean probability that the model gives to its own choice, 0.5 to 1."""
    accuracy: float
    """How often this choice was right."""
    num: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReport:
    """Figures of one model on held-out pairs."""

    accuracy: Estimate
    """Share of pairs whose chosen response scores higher; equal scores count half."""
    log_loss_nats: float
    """Mean of -log sigmoid(difference); log 2 = 0.693 is a coin."""
    calibration_error: float
    """ECE: mean distance of confidence and accuracy over bins of equal numbers of pairs."""
    reliability: list[ReliabilityPoint]


def report_pairs(
    differences: Sequence[float], units: Sequence[tuple[str, ...]], num_bins: int = NUM_BINS
) -> PairReport:
    """The figures of n differences; `units` names what pairs share (prompt, or responses)."""
    d = np.asarray(differences, dtype=np.float64)
    points = reliability(d, num_bins)
    gaps = [point.num * abs(point.accuracy - point.confidence) for point in points]
    return PairReport(
        accuracy=accuracy(d, units),
        log_loss_nats=float(np.logaddexp(0, -d).mean()),
        calibration_error=sum(gaps) / len(d),
        reliability=points,
    )


def hits(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where the chosen response scores higher, 0 where lower, a half where equal; (n,)."""
    return (np.sign(differences) + 1) / 2


def accuracy(differences: NDArray[np.float64], units: Sequence[tuple[str, ...]]) -> Estimate:
    """Share of right pairs with Wilson's 95% interval (1927).

    Pairs that share a prompt or a response are not independent: n is divided by the design effect
    V_shared / V_independent, with V_shared the sum of e_i e_j over pairs i, j that share a unit
    (Aronow, Samii and Assenova 2015), e = hit - mean; never by less than 1.
    """
    right = hits(differences)
    mean = float(right.mean())
    num = len(right) / _design_effect(right - mean, units)
    low, high = wilson(mean, num)
    error = math.sqrt(mean * (1 - mean) / num)
    return Estimate(mean=mean, low=low, high=high, num=len(right), standard_error=error)


def wilson(share: float, num: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share among `num` independent cases."""
    from scipy import stats

    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return centre - half, centre + half


def _design_effect(errors: NDArray[np.float64], units: Sequence[tuple[str, ...]]) -> float:
    independent = float((errors**2).sum())
    if independent == 0:
        return 1.0
    sums: dict[str, float] = {}
    repeated = 0.0
    for error, names in zip(errors.tolist(), units, strict=True):
        for name in names:
            sums[name] = sums.get(name, 0.0) + error
        repeated += (len(names) - 1) * error**2
    shared = sum(value**2 for value in sums.values()) - repeated
    return max(shared / independent, 1.0)


def gain(
    ensemble: Sequence[float],
    members: Sequence[Sequence[float]],
    units: Sequence[tuple[str, ...]],
) -> Estimate:
    """Accuracy of the ensemble minus the members' mean accuracy on the same n pairs.

    The 95% interval is the normal one, with the design effect of `accuracy`.
    """
    from scipy import stats

    own = hits(np.asarray(ensemble, dtype=np.float64))
    values = own - hits(np.asarray(members, dtype=np.float64)).mean(0)  # (n,)
    mean = float(values.mean())
    num = len(values) / _design_effect(values - mean, units)
    error = float(values.std()) / math.sqrt(num)
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * error
    return Estimate(
        mean=mean, low=mean - half, high=mean + half, num=len(values), standard_error=error
    )


def reliability(differences: NDArray[np.float64], num_bins: int) -> list[ReliabilityPoint]:
    """Bins of equal numbers of pairs, from the least to the most confident."""
    confidence = 1 / (1 + np.exp(-np.abs(differences)))
    right = hits(differences)
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

    Where every member's sd on the reference responses is known, members are standardised before
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

    None for one member, and where members are never (or always) wrong.
    """
    wrong = 1 - hits(np.asarray(differences, dtype=np.float64))  # (K, n)
    varied = wrong[wrong.std(axis=1) > 0]
    if len(varied) < 2:
        return None
    matrix = np.corrcoef(varied)
    return float(matrix[np.triu_indices(len(varied), 1)].mean())
