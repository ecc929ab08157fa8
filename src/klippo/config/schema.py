"""The config of a run: every room's settings, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from klippo.data.settings import DataSettings, OfflineSettings
from klippo.evaluation.settings import MIN_PROMPTS, EarlyStopSettings, EvaluationSettings
from klippo.policy.settings import CriticSettings, PolicySettings, Sharding
from klippo.ppo.settings import (
    HealthSettings,
    KLSettings,
    OptimizerSettings,
    PPOSettings,
    ScoreSettings,
)
from klippo.rewards.settings import ColumnSettings, RewardSettings, ensembles
from klippo.rollouts.settings import RolloutSettings
from klippo.settings import Settings


class WholeConfig(Settings):
    """What the config of every stage has: a base for one class per stage."""

    recipe_folder: ClassVar[str]
    """Where the stage's packaged recipes are, inside `klippo/recipes`."""
    rm_seed_sections: ClassVar[tuple[str, ...]] = ()
    """Sections in which `{seed}` is the reward model's seed, not the run's."""

    seed: NonNegativeInt = 0
    """Seed of everything random."""
    output_dir: str = "runs/{name}"
    """Run folder; `{name}` is the config's name, `{seed}` the seed, and with an `rm_seed`,
    `{rm_seed}` is that; without the placeholder the folder gets a `seed{rm_seed}` inside."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes the GPU if there is one."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads; default: PyTorch's choice."""


class CheckpointSettings(Settings):
    """When a run saves all that it needs to resume exactly."""

    every: PositiveInt | None = None
    """PPO steps from one checkpoint to the next; null leaves it to `every_minutes`."""
    every_minutes: PositiveFloat | None = 10.0
    """Minutes from one checkpoint to the next, at the next step's beginning; null is off."""
    keep: PositiveInt = 2
    """How many are kept; older ones go when a newer one is complete."""
    keep_when_done: bool = False
    """Write one at the end too, and keep it: a run with more `ppo.num_steps` can resume from it."""

    @property
    def is_on(self) -> bool:
        """Whether checkpoints are written during the run."""
        return self.every is not None or self.every_minutes is not None


class RunConfig(WholeConfig):
    """One PPO run."""

    recipe_folder: ClassVar[str] = "."
    rm_seed_sections: ClassVar[tuple[str, ...]] = ("reward", "gold", "critic")

    rm_seed: int | None = None
    """Seed of the reward model: fills `{seed}` in the names of `reward`, `gold` and `critic`."""
    sharding: Sharding | Literal["auto"] = "auto"
    """With several processes: `none` gives each a full model; `fsdp` shards weights, gradients and
    optimizer states (FSDP2); `shard_grad_op` does too, but keeps gathered weights until the
    backward pass; `auto` does what accelerate's config file says, or else none."""
    peer_timeout_s: float = Field(default=600.0, gt=0, le=1e7)
    """Longest that a process of a running run waits for another, in seconds."""
    max_memory_gib: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """What the run may need of the device's memory before it is refused; default: what the GPU has,
    or what is free on the CPU."""
    policy: PolicySettings
    """The model that learns."""
    critic: CriticSettings = CriticSettings()
    """The value function."""
    data: DataSettings
    """The prompts."""
    offline: OfflineSettings | None = None
    """Learn from the responses in `data` instead of sampling."""
    rollout: RolloutSettings = RolloutSettings()
    """Sampling."""
    reward: RewardSettings
    """What scores a response."""
    gold: RewardSettings | None = None
    """A second opinion that never trains; it scores the evaluation samples after training."""
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
    early_stop: EarlyStopSettings = EarlyStopSettings()
    """Ends the run while the policy is still good."""
    health: HealthSettings = HealthSettings()
    """What happens when the numbers say that training went wrong."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """What an interrupted run resumes from."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if conflicts := [*self._truncations(), *self._conflicts()]:
            raise ValueError("\n".join(conflicts))
        return self

    def _truncations(self) -> Iterator[str]:
        for name, off in {"top_k": 0, "top_p": 1, "min_response_length": 0}.items():
            remedy = "; for longer responses add a `length` reward with min_tokens"
            if (value := getattr(self.rollout, name)) != off:
                yield (
                    f"rollout.{name}={value}: training needs {off}, because log-probs are those "
                    "of the untruncated policy, and a policy sampled otherwise is paid for "
                    f"negative KL{remedy if name == 'min_response_length' else ''}"
                )

    def _early_stop_conflicts(self) -> Iterator[str]:
        early_stop, evaluation = self.early_stop, self.evaluation
        if not early_stop.is_on:
            return
        if evaluation.every is None or evaluation.num_prompts == 0:
            yield "early_stop needs evaluations on the way; set evaluation.every and num_prompts"
        if early_stop.gold_prompts > 0 and self.gold is None:
            yield f"early_stop.gold_prompts={early_stop.gold_prompts} needs a gold reward; add gold"
        if 0 < early_stop.gold_prompts < MIN_PROMPTS:
            yield (
                f"early_stop.gold_prompts={early_stop.gold_prompts}: fewer than {MIN_PROMPTS} "
                "prompts say nothing; use more, or 0"
            )

    def _offline_conflicts(self) -> Iterator[str]:
        has_column = isinstance(self.reward, ColumnSettings)
        if isinstance(self.gold, ColumnSettings):
            yield "gold.kind=column: the data holds no scores of new responses; use another gold"
        if self.offline is None:
            if has_column:
                yield (
                    "reward.kind=column is the reward of responses that exist already, and this "
                    "run samples new ones; add an offline section, or use another reward"
                )
            return
        if not has_column:
            yield (
                f"reward.kind={self.reward.kind}: an offline run reads its rewards from the data; "
                "use kind: column (klippo judge score and klippo gold-eval write such columns)"
            )
        if self.kl.coef > 0 and self.kl.placement != "exact":
            yield (
                f"kl.placement={self.kl.placement}: estimates from sampled tokens are wrong for "
                "responses that the policy did not sample; use placement: exact, or coef: 0"
            )
        for name in ("gold", "early_stop"):
            if getattr(self, name) != type(self).model_fields[name].get_default():
                yield (
                    f"{name} needs fresh responses, and an offline run samples none; remove it, "
                    "and use klippo compare after the run"
                )
        if self.rollout.record_logprobs:
            yield "rollout.record_logprobs=true: an offline run samples nothing; remove it"
        if self.rollout.engine != "hf":
            yield f"rollout.engine={self.rollout.engine}: an offline run samples nothing; remove it"

    def _conflicts(self) -> Iterator[str]:
        policy, critic = self.policy, self.critic
        yield from self._offline_conflicts()
        if policy.tuning != "lora":
            needs_lora = f"needs policy.tuning=lora, not {policy.tuning}"
            if policy.quantize_4bit:
                yield f"policy.quantize_4bit {needs_lora}: 4-bit weights cannot be trained"
            if policy.adapter is not None:
                yield f"policy.adapter {needs_lora}"
            if critic.kind == "lora":
                yield f"critic.kind=lora {needs_lora}: both adapters share one frozen base"
        if critic.model is not None and critic.kind != "separate":
            yield f"critic.model needs critic.kind=separate, not {critic.kind}"
        if critic.kind == "separate" and critic.model is None and policy.quantize_4bit:
            yield (
                "critic.kind=separate would train a copy of the policy's 4-bit weights, and these "
                "cannot be trained; name a critic.model, or use critic.kind=lora"
            )
        yield from self._early_stop_conflicts()
        for ensemble in ensembles(self.gold):
            if ensemble.standardize == "start" and ensemble.moments is None:
                yield (
                    "gold.standardize=start: only the training reward is measured when a run "
                    "begins; use stored, or none"
                )
        if self.rollout.engine == "vllm" and policy.quantize_4bit:
            yield (
                "rollout.engine=vllm needs full weights, and policy.quantize_4bit has none; "
                "use rollout.engine=hf"
            )
        if self.sharding in ("fsdp", "shard_grad_op") and policy.quantize_4bit:
            yield (
                f"sharding={self.sharding} cannot shard 4-bit weights; set "
                "policy.quantize_4bit=false, or sharding=none"
            )
        if not self.rollout.keeps_logprobs:
            for name in ("importance_cap", "max_logprob_mismatch"):
                if (value := getattr(self.ppo, name)) is not None:
                    yield (
                        f"ppo.{name}={value} compares with the sampler's own log-probs, which are "
                        "not kept; set rollout.record_logprobs=true"
                    )
