"""What picks the best of n, by the names on the command line.

K members, M samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from klippo.errors import ConfigError
from klippo.evaluation.history import Floats
from klippo.lab import fingerprints
from klippo.lab.reward_names import reward_label, reward_named, rewards_in
from klippo.rewards import stored
from klippo.rewards.settings import EnsembleSettings, RewardSettings
from klippo.tensors.ensembles import Objective, combine

Standardize = Literal["start", "stored", "none"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
WEIGHTS = {"UWO": "uwo_weight", "mean_minus_sd": "sd_weight", "soft_min": "temperature"}
Moments = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of every member."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One score, or an objective over several."""

    name: str
    members: Sequence[tuple[str, RewardSettings]]
    """Keys of the scores, and what gives them."""
    objective: Objective = "mean"
    weights: Mapping[str, Any] = field(default_factory=dict)
    """uwo_weight, sd_weight, temperature or ddof, as `combine` takes them."""
    standardize: Standardize | Moments = "none"
    """How members get one scale: measured on these samples, stored with the models, or given."""

    def score(self, scores: Mapping[str, Floats]) -> Floats:
        """(M,), NaN wherever a member is NaN. Raises ConfigError for members without a scale."""
        members = np.stack([scores[key] for key, _ in self.members])  # (K, M)
        if self.standardize != "none":
            mean, sd = (np.array(values)[:, None] for values in self._moments(members))
            members = (members - mean) / sd
        if len(members) == 1 and self.objective == "mean":
            alone: Floats = members[0]
            return alone
        combined: Floats = combine(
            torch.from_numpy(members), self.objective, **self.weights
        ).numpy()
        return combined

    def _moments(self, members: Floats) -> Moments:
        if not isinstance(self.standardize, str):
            return self.standardize
        if self.standardize == "start":
            return _measured(members, [reward_label(settings) for _, settings in self.members])
        moments = []
        for _, one in self.members:
            known = stored.read(one.model, one.revision) if one.kind == "classifier" else None
            if known is None or known.mean is None or known.sd is None:
                raise ConfigError(
                    f"ensemble member {reward_label(one)} has no stored mean and standard "
                    "deviation; use --standardize start to measure them on these samples, or none"
                )
            moments.append((known.mean, known.sd))
        mean, sd = zip(*moments, strict=True)
        return mean, sd


def _measured(members: Floats, labels: Sequence[str]) -> Moments:
    """Moments over the samples that all members scored."""
    known = members[:, ~np.isnan(members).any(0)]
    if known.shape[1] < 2:
        raise ConfigError("fewer than 2 samples were scored by every member; check the scores")
    mean, sd = known.mean(1), known.std(1, ddof=1)
    for label, spread in zip(labels, sd.tolist(), strict=True):
        if not spread > 0:
            raise ConfigError(
                f"ensemble member {label} gives all {known.shape[1]} samples the same score, so it "
                "has no scale; leave it out, or use --standardize none"
            )
    return mean.tolist(), sd.tolist()


def arms_named(
    proxies: Sequence[str], ensembles: Sequence[str], standardize: Standardize
) -> list[Arm]:
    """The arms of `--proxy` and `--ensemble`.

    Raises ConfigError for unknown names, for names given twice, and for those that do not fit
    together.
    """
    if not proxies:
        raise ConfigError("nothing picks the best sample; give --proxy NAME, as in demo:proxy")
    rewards: list[tuple[str, RewardSettings]] = []
    for name in proxies:
        path = Path(name)
        is_file = path.suffix in (".yaml", ".yml") and path.is_file()
        rewards += rewards_in(path).items() if is_file else [(name, reward_named(name))]
    short = [Path(name).name for name, _ in rewards]  # used if it tells a proxy from the others
    arms: list[Arm] = []
    singles: list[tuple[str, RewardSettings]] = []
    for (name, settings), last in zip(rewards, short, strict=True):
        arms.append(_proxy_arm(last if short.count(last) == 1 else name, settings))
        if not isinstance(settings, EnsembleSettings):
            singles += arms[-1].members
    if ensembles and len(singles) < 2:
        raise ConfigError(
            f"--ensemble {ensembles[0]} combines the single proxies, and there are "
            f"{len(singles)}; give at least two with --proxy"
        )
    arms += [_ensemble_arm(text, singles, standardize) for text in ensembles]
    names = [arm.name for arm in arms]
    for i, name in enumerate(names):
        if name in names[:i]:
            option = "--proxy" if i < len(arms) - len(ensembles) else "--ensemble"
            raise ConfigError(f"{option} {name} is there twice; remove one")
    return arms


def _proxy_arm(name: str, settings: RewardSettings) -> Arm:
    """A single score; or an ensemble of a YAML file, whose members are scored once."""
    if not isinstance(settings, EnsembleSettings):
        return Arm(name=name, members=[(reward_key(settings), settings)])
    moments = settings.moments
    return Arm(
        name=name,
        members=[(reward_key(one), one) for one in settings.classifiers()],
        objective=settings.objective,
        weights=settings.weights,
        standardize=settings.standardize if moments is None else (moments.mean, moments.sd),
    )


def _ensemble_arm(
    text: str, members: Sequence[tuple[str, RewardSettings]], standardize: Standardize
) -> Arm:
    """`WCO`, `UWO:0.5`, `mean_minus_sd:1` or `soft_min:0.2` over the members."""
    word, _, weight = text.partition(":")
    if word not in OBJECTIVES:
        raise ConfigError(f"ensemble={text}: the objective must be one of {', '.join(OBJECTIVES)}")
    weights: dict[str, float] = {}
    if word in WEIGHTS:
        if not weight and word != "soft_min":
            raise ConfigError(f"ensemble={text}: {word} needs a weight, as in {word}:0.5")
        try:
            number = float(weight or 1)
        except ValueError:
            number = -1.0
        if not 0 <= number < math.inf or (word == "soft_min" and number == 0):
            raise ConfigError(f"ensemble={text}: {weight!r} is no weight; write {word}:0.5")
        weights = {WEIGHTS[word]: number}
    elif weight:
        raise ConfigError(f"ensemble={text}: {word} takes no weight; write {word}")
    return Arm(name=text, members=members, objective=word, weights=weights, standardize=standardize)


def reward_key(settings: RewardSettings) -> str:
    """Names a reward's scores on disk; other weights or settings have another."""
    word = re.sub(r"[^\w.-]+", "-", reward_label(settings)).strip("-.")[-60:]
    return f"{word}-{fingerprints.of_reward(settings)}"
