"""How gold moves with the distance from the start: the two laws of over-optimisation.

d = sqrt(KL), KL in nats per response. S evaluated steps, P prompts, B bootstrap draws.
Gao et al. 2023, arXiv 2210.10760: R_bon(d) = d (alpha - beta d), R_RL(d) = d (alpha - beta log d).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from klippo.evaluation.history import Floats

Law = Literal["bon", "rl"]
SMALLEST_D = 0.1
"""Points nearer to the start are left out: there gold's gain is noise, and log d runs away."""
NUM_DRAWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One run's gold gain and distance, prompt by prompt; the first step is the start."""

    gold: Floats  # (S, P)
    kl: Floats  # (S, P)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A number and the 95% bootstrap interval around it; an end can be infinite."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A law fitted by least squares, with bootstrap intervals over prompts and seeds."""

    law: Law
    alpha: Interval
    beta: Interval
    peak: Interval  # distance d* of the highest gold; infinite if it does not turn (beta <= 0)
    draws: Floats  # (B, 2) alpha and beta of every draw, for bands
    num_points: int

    def __call__(self, d: Floats) -> Floats:
        """The fitted gain at distances d."""
        return predict(self.law, self.alpha.value, self.beta.value, d)

    def band(self, d: Floats) -> tuple[Floats, Floats]:
        """The pointwise 95% band at distances d."""
        curves = np.stack([predict(self.law, a, b, d) for a, b in self.draws])
        low, high = np.nanpercentile(curves, [2.5, 97.5], axis=0)
        return low, high


def predict(law: Law, alpha: float, beta: float, d: Floats) -> Floats:
    """R(d) for distances d >= 0; R(0) = 0."""
    return np.asarray(d) * (alpha - beta * _turn(law, np.asarray(d, dtype=np.float64)))


def _turn(law: Law, d: Floats) -> Floats:
    """What beta multiplies: d for best-of-n, log d for RL."""
    safe = np.maximum(d, 1e-12)
    turn: Floats = safe if law == "bon" else np.log(safe)
    return turn


def peak_of(law: Law, alpha: float, beta: float) -> float:
    """d* = alpha / (2 beta) for best-of-n, exp(alpha / beta - 1) for RL; infinite for beta <= 0."""
    if not beta > 0:
        return math.inf
    if law == "bon":
        return max(alpha / (2 * beta), 0.0)
    return math.exp(min(alpha / beta - 1, 700.0))


def fit(
    law: Law, curves: Sequence[Curve], *, seed: int = 0, num_draws: int = NUM_DRAWS
) -> Fit | None:
    """Fit one law to the runs of one kind (its seeds), prompts shared between them.

    Each draw picks seeds and prompts with replacement and starts from their rows again. None if
    fewer than three points lie beyond SMALLEST_D.
    """
    rng = np.random.default_rng(seed)
    num_prompts, num_seeds = curves[0].gold.shape[1], len(curves)
    d, gain, _ = _points(curves, np.ones((1, num_prompts)) / num_prompts)
    far = (d > SMALLEST_D).astype(np.float64)
    if far.sum() < 3:
        return None
    alpha, beta = (float(value[0]) for value in _least_squares(law, d, gain, far))
    weights = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), num_draws)
    d, gain, seed_of = _points(curves, weights / num_prompts)
    picked = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_draws)
    counts = picked[:, seed_of].astype(np.float64) * (d > SMALLEST_D)
    draws = np.stack(_least_squares(law, d, gain, counts), axis=1)
    return Fit(
        law=law,
        alpha=_interval(alpha, draws[:, 0]),
        beta=_interval(beta, draws[:, 1]),
        peak=_interval(peak_of(law, alpha, beta), np.array([peak_of(law, *ab) for ab in draws])),
        draws=draws,
        num_points=int(far.sum()),
    )


def _points(curves: Sequence[Curve], weights: Floats) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Distances (B, M) and gains (B, M) of all M = seeds * steps points, and each point's seed."""
    d = [np.sqrt(np.maximum(weights @ curve.kl.T, 0.0)) for curve in curves]
    gain = [weights @ (curve.gold - curve.gold[:1]).T for curve in curves]
    seed_of = np.concatenate([np.full(len(c.gold), i) for i, c in enumerate(curves)])
    return np.concatenate(d, 1), np.concatenate(gain, 1), seed_of


def _least_squares(law: Law, d: Floats, gain: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """alpha, beta (B,) that minimise sum weight * (gain - R(d))^2; NaN where undetermined."""
    first, second = np.maximum(d, 1e-12), -np.maximum(d, 1e-12) * _turn(law, d)
    products = ((first, first), (first, second), (second, second), (first, gain), (second, gain))
    s11, s12, s22, y1, y2 = ((weight * a * b).sum(1) for a, b in products)
    determinant = s11 * s22 - s12**2
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha = (s22 * y1 - s12 * y2) / determinant
        beta = (s11 * y2 - s12 * y1) / determinant
    bad = ~(determinant > 1e-12 * np.maximum(s11 * s22, 1e-300))
    return np.where(bad, np.nan, alpha), np.where(bad, np.nan, beta)


def _interval(value: float, draws: Floats) -> Interval:
    known = draws[~np.isnan(draws)]
    if len(known) == 0:
        return Interval(value=value, low=-math.inf, high=math.inf)
    low, high = np.percentile(known, [2.5, 97.5], method="nearest")
    return Interval(value=value, low=float(low), high=float(high))
