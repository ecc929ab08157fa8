"""Settings of checkpoints."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from klippo.settings import Settings


class CheckpointSettings(Settings):
    """When a run writes down all that it needs to go on exactly."""

    every: PositiveInt | None = None
    """PPO steps from one checkpoint to the next; null leaves it to `every_minutes`."""
    every_minutes: PositiveFloat | None = 10.0
    """Minutes from one checkpoint to the next, at the next step's beginning; null is off."""
    keep: PositiveInt = 2
    """How many stay; older ones go when a newer one is whole."""
    keep_when_done: bool = False
    """Write one at the end too, and keep it: a run with more `ppo.num_steps` can go on from it."""

    @property
    def is_on(self) -> bool:
        """Whether checkpoints are written on the way."""
        return self.every is not None or self.every_minutes is not None
