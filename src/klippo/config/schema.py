"""The whole config: the rooms' settings under one roof."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from klippo.data.settings import DataSettings
from klippo.evaluation.settings import EvaluationSettings
from klippo.policy.settings import CriticSettings, PolicySettings
from klippo.ppo.settings import KLSettings, OptimizerSettings, PPOSettings, ScoreSettings
from klippo.rewards.settings import RewardSettings
from klippo.rollouts.settings import RolloutSettings
from klippo.settings import Settings


class RunConfig(Settings):
    """One PPO run."""

    seed: NonNegativeInt = 0
    """Seed of everything random."""
    output_dir: str = "runs/{name}"
    """Run folder; `{name}` is the config's name, `{seed}` the seed."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; `auto` takes the GPU where there is one."""
    num_threads: PositiveInt | None = None
    """CPU threads; default: PyTorch's choice."""
    policy: PolicySettings
    """The model that learns."""
    critic: CriticSettings = CriticSettings()
    """The value function."""
    data: DataSettings
    """The prompts."""
    rollout: RolloutSettings = RolloutSettings()
    """Sampling."""
    reward: RewardSettings
    """What scores a response."""
    gold: RewardSettings | None = None
    """A second opinion that never trains: loaded after training, it scores the evaluation samples."""
    score: ScoreSettings = ScoreSettings()
    """Score shaping, off by default."""
    kl: KLSettings = KLSettings()
    """The leash to the reference."""
    ppo: PPOSettings = PPOSettings()
    """The algorithm."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """AdamW and its schedule."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Samples of a fixed prompt set, before, during and after."""

    @model_validator(mode="after")
    def _sampled_is_scored(self) -> Self:
        rollout = self.rollout
        if rollout.top_k != 0 or rollout.top_p != 1 or rollout.min_response_length != 0:
            raise ValueError(
                f"rollout.top_k={rollout.top_k}, top_p={rollout.top_p}, "
                f"min_response_length={rollout.min_response_length}: training needs 0, 1 and 0, "
                "because log-probs are those of the untruncated policy, and a policy sampled "
                "otherwise is paid for negative KL; remove them (for longer responses add a "
                "`length` reward with min_tokens)"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.policy.quantize_4bit and self.policy.tuning != "lora":
            raise ValueError(
                f"policy.quantize_4bit needs policy.tuning=lora, not {self.policy.tuning}: "
                "4-bit weights cannot be trained"
            )
        if self.policy.adapter is not None and self.policy.tuning != "lora":
            raise ValueError(
                f"policy.adapter needs policy.tuning=lora, not {self.policy.tuning}"
            )
        if self.critic.kind == "lora" and self.policy.tuning != "lora":
            raise ValueError(
                f"critic.kind=lora needs policy.tuning=lora, not {self.policy.tuning}: "
                "both adapters share one frozen base"
            )
        if self.critic.model is not None and self.critic.kind != "separate":
            raise ValueError(
                f"critic.model needs critic.kind=separate, not {self.critic.kind}"
            )
        return self
