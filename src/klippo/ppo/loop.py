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

    def at_step(self, step: int) -> None:
        """Nothing of this step is done yet: the place for a checkpoint, and for ending early."""

    def whole(self) -> AbstractContextManager[None]:
        """Weights and metrics change inside, and belong together."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times a part of the step."""

    def is_eval_step(self, step: int) -> bool: ...

    def evaluate(self, step: int) -> bool:
        """Sample the fixed evaluation prompts with the policy as it is now; True ends the run."""

    def look(self, step: int, metrics: Metrics) -> None:
        """What was sampled and scored is about to be learnt from: the place for ending instead."""

    def log(self, step: int, rollout: Rollout, metrics: Metrics) -> None: ...


def train(
    learner: Learner,
    source: RolloutSource,
    score: Callable[[Rollout], Scores],
    recorder: Recorder,
) -> None:
    """Run PPO until `ppo.num_steps`, or until an evaluation says that it is enough.

    The policy is evaluated before, on the way and after.
    """
    for step in range(learner.num_steps_done, learner.ppo.num_steps):
        recorder.at_step(step)
        if recorder.is_eval_step(step) and recorder.evaluate(step):
            return
        with recorder.phase("generate"):
            rollout = source.next()
        with recorder.phase("forward"):  # a judge's answers come in meanwhile
            forward = learner.forward(rollout)
        with recorder.phase("score"):
            experience = learner.experience(rollout, score(rollout), forward)
        recorder.look(step, experience.metrics)
        with recorder.whole():
            with recorder.phase("update"):
                metrics = learner.learn(experience)
            recorder.log(step, rollout, metrics)
    recorder.at_step(learner.num_steps_done)
    recorder.evaluate(learner.num_steps_done)
