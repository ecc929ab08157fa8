"""Settings of evaluation while training."""

from pydantic import NonNegativeInt, PositiveInt

from klippo.settings import Settings


class EvaluationSettings(Settings):
    every: PositiveInt | None = None
    """PPO steps between evaluations; the first and the last state are always evaluated."""
    num_prompts: NonNegativeInt = 64
    """Fixed evaluation prompts, from the validation set where there is one; 0 turns it off."""
    num_shown: NonNegativeInt = 10
    """Prompts of the before/after table."""
