"""Best-of-n under several scores: the curves of each, with intervals over prompts.

P prompts, M samples in all, K members, n of the best of n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from klippo.errors import ConfigError
from klippo.evaluation.best_of_n import best_of_n_curve, kl_of_best_of
from klippo.evaluation.history import Floats
from klippo.evaluation.scaling import Curve, Fit, Interval, fit
from klippo.evaluation.statistics import estimate
from klippo.tensors.ensembles import Objective, combine

OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What picks the best of n: one score, or an objective over several."""

    name: str
    members: tuple[str, ...]
    """Keys of the scores; one alone is taken as it is."""
    objective: Objective = "mean"
    weights: dict[str, float] = field(default_factory=dict)
    """uwo_weight, sd_weight, temperature or ddof, as `combine` takes them."""
    moments: tuple[list[float], list[float]] | None = None
    """Mean and standard deviation of every member, where it is standardised."""

    def score(self, scores: Mapping[str, Floats]) -> Floats:
        """(M,): NaN wherever a member is NaN."""
        members = np.stack([scores[key] for key in self.members])  # (K, M)
        if self.moments is not None:
            mean, sd = (np.array(values)[:, None] for values in self.moments)
            members = (members - mean) / sd
        if len(members) == 1 and self.objective == "mean":
            alone: Floats = members[0]
            return alone
        options: dict[str, Any] = dict(self.weights)
        combined: Floats = combine(torch.from_numpy(members), self.objective, **options).numpy()
        return combined


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmCurves:
    """Expected scores of the picked sample for every prompt and n; NaN where too few are scored."""

    proxy: Floats  # (P, len(ns))
    gold: Floats | None  # (P, len(ns))
    num_unscored: int


def objective_named(text: str) -> tuple[Objective, dict[str, float]]:
    """`WCO`, `UWO:0.5`, `mean_minus_sd:1`, `soft_min:0.2` as objective and weight.

    Raises ConfigError for an unknown objective, and for a weight too many or too few.
    """
    word, _, weight = text.partition(":")
    keys = {"UWO": "uwo_weight", "mean_minus_sd": "sd_weight", "soft_min": "temperature"}
    if word not in OBJECTIVES:
        raise ConfigError(f"ensemble={text}: the objective must be one of {', '.join(OBJECTIVES)}")
    name: Objective = word
    if name not in keys:
        if weight:
            raise ConfigError(f"ensemble={text}: {name} takes no weight; write {name}")
        return name, {}
    if not weight and name != "soft_min":
        raise ConfigError(f"ensemble={text}: {name} needs a weight, as in {name}:0.5")
    try:
        number = float(weight or 1)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf or (name == "soft_min" and number == 0):
        raise ConfigError(f"ensemble={text}: {weight!r} is no weight; write {name}:0.5")
    return name, {keys[name]: number}


def moments_of(scores: Sequence[Floats], names: Sequence[str]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of K members, over the samples that all of them scored.

    Raises ConfigError for a member that gives all samples the same score.
    """
    members = np.stack(scores)
    known = members[:, ~np.isnan(members).any(0)]
    if known.shape[1] < 2:
        raise ConfigError("fewer than 2 samples were scored by every member; check the scores")
    mean, sd = known.mean(1), known.std(1, ddof=1)
    for name, spread in zip(names, sd.tolist(), strict=True):
        if not spread > 0:
            raise ConfigError(
                f"ensemble member {name} gives all {known.shape[1]} samples the same score, so it "
                "has no scale; leave it out, or use --standardize none"
            )
    return mean.tolist(), sd.tolist()


def curves(
    proxy: Floats, gold: Floats | None, groups: Sequence[NDArray[np.intp]], ns: Sequence[int]
) -> ArmCurves:
    """Best-of-n for every prompt; `groups` holds the sample numbers of each. proxy, gold (M,)."""
    missing = np.isnan(proxy) if gold is None else np.isnan(proxy) | np.isnan(gold)
    by_proxy = np.full((len(groups), len(ns)), math.nan)
    by_gold = np.full_like(by_proxy, math.nan)
    for p, numbers in enumerate(groups):
        kept = numbers[~missing[numbers]]
        allowed = [i for i, n in enumerate(ns) if n <= len(kept)]
        possible = [ns[i] for i in allowed]
        by_proxy[p, allowed] = best_of_n_curve(proxy[kept], proxy[kept], possible)
        if gold is not None:
            by_gold[p, allowed] = best_of_n_curve(proxy[kept], gold[kept], possible)
    return ArmCurves(
        proxy=by_proxy, gold=None if gold is None else by_gold, num_unscored=int(missing.sum())
    )


def points(by_prompt: Floats) -> list[dict[str, float | None]]:
    """Mean and 95% interval over prompts for every n; null for what is not known."""
    found: list[dict[str, float | None]] = []
    for values in by_prompt.T:
        known = values[~np.isnan(values)]
        if len(known) == 0:
            found.append({"mean": None, "low": None, "high": None})
            continue
        result = estimate(known.tolist())
        found.append({"mean": result.mean, "low": finite(result.low), "high": finite(result.high)})
    return found


def fit_gold(gold: Floats, ns: Sequence[int], seed: int = 0) -> Fit | None:
    """The law of best-of-n fitted to gold (P, len(ns)); ns begin with 1.

    None where too few n or prompts have values.
    """
    assert ns[0] == 1
    known = gold[~np.isnan(gold).any(1)]
    if len(known) < 2:
        return None
    kl = np.repeat([[kl_of_best_of(n)] for n in ns], len(known), axis=1)
    return fit("bon", [Curve(gold=known.T, kl=kl)], seed=seed)


def fit_figures(found: Fit) -> dict[str, Any]:
    """A fit as JSON holds it; an infinite end of an interval is null."""

    def interval(of: Interval) -> dict[str, float | None]:
        return {"value": finite(of.value), "low": finite(of.low), "high": finite(of.high)}

    return {
        "law": "gain = d (alpha - beta d), d = sqrt(KL bound)",
        "alpha": interval(found.alpha),
        "beta": interval(found.beta),
        "peak": interval(found.peak),
        "num_points": found.num_points,
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
