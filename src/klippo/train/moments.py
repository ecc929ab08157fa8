"""Before a run begins: put an ensemble's members on one scale, measured on the starting policy."""

from __future__ import annotations

from collections.abc import Callable

from klippo.rewards.combined import SumReward
from klippo.rewards.ensemble import EnsembleReward
from klippo.rewards.settings import EnsembleSettings, RewardSettings, SumSettings
from klippo.types import RewardSource, Rollout

REFERENCE_SEED = 2_000_003
"""Added to the run's seed for the reference responses."""


def measure_members(
    settings: RewardSettings, source: RewardSource, sample: Callable[[int], Rollout]
) -> RewardSettings:
    """Measure every ensemble of `source` that waits for it; the settings then hold the moments.

    `sample(n)` gives n responses of the starting policy. With nothing to measure it is not called.
    """
    if isinstance(source, EnsembleReward) and source.waits_for_moments:
        rollout = sample(source.settings.reference_size)
        moments = source.measure(rollout.prompts, rollout.responses)
        if isinstance(settings, EnsembleSettings):
            return settings.model_copy(update={"moments": moments})
    if isinstance(source, SumReward) and isinstance(settings, SumSettings):
        parts = {
            name: part.model_copy(
                update={"reward": measure_members(part.reward, source.parts[name].source, sample)}
            )
            for name, part in settings.parts.items()
        }
        return settings.model_copy(update={"parts": parts})
    return settings
