"""Settings of evaluation while training, and of early stopping, which may end it."""

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from klippo.settings import Settings

MIN_PROMPTS = 16
"""The fewest prompts from which a verdict is drawn."""


class EvaluationSettings(Settings):
    every: PositiveInt | None = None
    """PPO steps between evaluations; the first and the last state are always evaluated."""
    num_prompts: NonNegativeInt = 64
    """Fixed evaluation prompts, from the validation set if there is one; 0 turns it off."""
    num_shown: NonNegativeInt = 10
    """Prompts of the before/after table; 0 leaves it out."""


class EarlyStopSettings(Settings):
    """Ends a run at an evaluation, and keeps the best policy so far in `best/`."""

    max_kl: PositiveFloat | None = None
    """Stop at the first evaluation whose exact KL exceeds this, nats per response."""
    gold_prompts: NonNegativeInt = 0
    """Prompts outside the evaluation set whose responses gold scores at every evaluation; stop
    when they say over-optimised twice in a row. Gold is then loaded while training. 0 is off."""

    @property
    def is_on(self) -> bool:
        return self.max_kl is not None or self.gold_prompts > 0
