"""What picks the best of n, by the names on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from klippo.errors import ConfigError
from klippo.evaluation.arms import Arm, moments_of, objective_named
from klippo.evaluation.history import Floats
from klippo.lab import fingerprints
from klippo.lab.reward_names import reward_label, reward_named, rewards_in
from klippo.rewards import stored
from klippo.rewards.settings import ClassifierSettings, EnsembleSettings, RewardSettings

Standardize = Literal["start", "stored", "none"]


@dataclass(slots=True, kw_only=True)
class Plan:
    """The rewards that must score the samples, and what picks by them."""

    rewards: dict[str, RewardSettings] = field(default_factory=dict)
    """Key -> settings; a reward that several arms use is there once."""
    arms: list[Arm] = field(default_factory=list)
    gold: str | None = None
    """Key of the gold reward."""
    standardized: dict[str, tuple[Standardize, list[str]]] = field(default_factory=dict)
    """Arm -> how its members get one scale, and their names."""


def plan_of(
    proxies: Sequence[str], ensembles: Sequence[str], gold: str | None, standardize: Standardize
) -> Plan:
    """Rewards and arms by the names of the command line.

    Raises ConfigError for names that are none, that are there twice, or that do not fit together.
    """
    if not proxies:
        raise ConfigError("nothing picks the best sample; give --proxy NAME, as in demo:proxy")
    plan = Plan()
    singles: dict[str, str] = {}
    for name, settings in _proxies(proxies):
        if name in {arm.name for arm in plan.arms}:
            raise ConfigError(f"--proxy {name} is there twice; remove one")
        if isinstance(settings, EnsembleSettings):
            _add_ensemble(plan, name, settings)
        else:
            key = _key(settings)
            plan.rewards[key] = settings
            singles[name] = key
            plan.arms.append(Arm(name=name, members=(key,)))
    if ensembles and len(singles) < 2:
        raise ConfigError(
            f"--ensemble {ensembles[0]} combines the single proxies, and there are "
            f"{len(singles)}; give at least two with --proxy"
        )
    for text in ensembles:
        objective, weights = objective_named(text)
        if text in {arm.name for arm in plan.arms}:
            raise ConfigError(f"--ensemble {text} is there twice; remove one")
        plan.arms.append(
            Arm(name=text, members=tuple(singles.values()), objective=objective, weights=weights)
        )
        plan.standardized[text] = (standardize, list(singles))
    if gold is not None:
        settings = reward_named(gold)
        plan.gold = _key(settings)
        plan.rewards[plan.gold] = settings
    return plan


def _proxies(names: Sequence[str]) -> Iterator[tuple[str, RewardSettings]]:
    """Each proxy under the shortest name that tells it from the others."""
    found: list[tuple[str, RewardSettings]] = []
    for name in names:
        path = Path(name)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            found += rewards_in(path).items()
        else:
            found.append((name, reward_named(name)))
    short = [Path(name).name for name, _ in found]
    for (name, settings), last in zip(found, short, strict=True):
        yield (last if short.count(last) == 1 else name), settings


def _add_ensemble(plan: Plan, name: str, settings: EnsembleSettings) -> None:
    """An ensemble of a YAML file: its members are scored once, also where others share them."""
    members = settings.classifiers()
    keys = [_key(one) for one in members]
    plan.rewards |= dict(zip(keys, members, strict=True))
    weights: dict[str, Any] = {
        "uwo_weight": settings.uwo_weight or 0.0,
        "sd_weight": settings.sd_weight or 0.0,
        "ddof": settings.ddof,
        "temperature": settings.temperature,
    }
    moments = settings.moments
    plan.arms.append(
        Arm(
            name=name,
            members=tuple(keys),
            objective=settings.objective,
            weights=weights,
            moments=None if moments is None else (moments.mean, moments.sd),
        )
    )
    if moments is None:
        plan.standardized[name] = (settings.standardize, [one.model for one in members])


def _key(settings: RewardSettings) -> str:
    """Names a reward's scores on disk; other weights or settings have another."""
    word = re.sub(r"[^\w.-]+", "-", reward_label(settings)).strip("-.")[-60:]
    return f"{word}-{fingerprints.of_reward(settings)}"


def with_scale(arm: Arm, plan: Plan, scores: Mapping[str, Floats]) -> Arm:
    """The arm with the moments that its members are standardised by."""
    if arm.name not in plan.standardized:
        return arm
    how, names = plan.standardized[arm.name]
    if how == "none":
        return arm
    if how == "start":
        moments = moments_of([scores[key] for key in arm.members], names)
    else:
        moments = _stored_moments([plan.rewards[key] for key in arm.members])
    return replace(arm, moments=moments)


def _stored_moments(members: Sequence[RewardSettings]) -> tuple[list[float], list[float]]:
    means, sds = [], []
    for member in members:
        known = None
        if isinstance(member, ClassifierSettings):
            known = stored.read(member.model, member.revision)
        if known is None or known.mean is None or known.sd is None:
            raise ConfigError(
                f"ensemble member {reward_label(member)} has no stored mean and standard "
                "deviation; use --standardize start to measure them on these samples, or none"
            )
        means.append(known.mean)
        sds.append(known.sd)
    return means, sds
