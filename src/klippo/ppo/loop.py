"""The loop: sample, run the models, score, learn.

It receives objects that satisfy small protocols and imports no engine and no reward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from klippo.ppo.learner import Learner
from klippo.types import Metrics, Rollout, RolloutSource, Scores


class Recorder(Protocol):
    """What the loop tells the outside world."""

    def before_step(self, step: int) -> None:
        """Called before each step; may checkpoint, and may raise to stop."""

    def is_eval_step(self, step: int) -> bool: ...

    def evaluate(self, step: int) -> bool:
        """Sample the fixed evaluation prompts with the current policy; True ends the run."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times a phase of the step."""

    def check_rollout(self, step: int, metrics: Metrics) -> None:
        """Called before a scored rollout is learnt from; may raise to stop."""

    def updating(self) -> AbstractContextManager[None]:
        """Weights and metrics change inside and belong together; a stop waits for its end."""

    def log(self, step: int, rollout: Rollout, metrics: Metrics) -> None: ...


def train(
    learner: Learner,
    source: RolloutSource,
    score: Callable[[Rollout], Scores],
    recorder: Recorder,
) -> None:
    """Run PPO until `ppo.num_steps`, or until an evaluation ends the run.

    The policy is evaluated before, during and after training.
    """
    for step in range(learner.num_steps_done, learner.ppo.num_steps):
        recorder.before_step(step)
        if recorder.is_eval_step(step) and recorder.evaluate(step):
            return
        with recorder.phase("generate"):
            rollout = source.next()
        with recorder.phase("forward"):  # a judge answers meanwhile
            forward = learner.forward(rollout)
        with recorder.phase("score"):
            experience = learner.experience(rollout, score(rollout), forward)
        recorder.check_rollout(step, experience.metrics)
        with recorder.updating():
            with recorder.phase("update"):
                metrics = learner.learn(experience)
            recorder.log(step, rollout, metrics)
    recorder.before_step(learner.num_steps_done)
    recorder.evaluate(learner.num_steps_done)
