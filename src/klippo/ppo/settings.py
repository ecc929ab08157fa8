"""Settings of PPO, in the order in which the algorithm uses them."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, Strict, model_validator

from klippo.settings import Count, Settings, near_divisors

UnitInterval = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class KLSettings(Settings):
    coef: float = Field(default=0.05, ge=0)
    """beta, nats to reward units; 0 turns the penalty off."""
    placement: Literal["reward", "loss", "exact"] = "reward"
    """`reward` subtracts beta * k1 from each token's reward; `loss` adds beta * k2 to the loss;
    `exact` adds beta times the KL summed over the vocabulary at every response position."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` moves beta so that the KL per sequence goes to `target` (Ziegler et al. 2019)."""
    target: PositiveFloat = 6.0
    """Nats per sequence."""
    horizon: PositiveFloat = 10_000.0
    """Episodes over which beta may change by the full proportional error."""


class ScoreSettings(Settings):
    """What happens to a score before it lands on the last token, in this order."""

    missing_eos: Literal["keep", "replace", "subtract"] = "keep"
    """For responses that the length limit cut: keep, replace or lower the score."""
    missing_eos_value: float = 1.0
    """Replaces the score, or is subtracted from it; in score units."""
    normalize: bool = False
    """Subtract the running mean and divide by the running standard deviation of all scores."""
    scale: float = 1.0
    """Factor on the score."""
    whiten: bool = False
    """Divide the batch's scores' deviations by their standard deviation; the mean stays."""
    clip: PositiveFloat | None = None
    """Clip to [-clip, clip], last."""


class OptimizerSettings(Settings):
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of the policy (and the critic)."""
    critic_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the critic's own weights; default: `learning_rate`."""
    betas: Annotated[tuple[Momentum, Momentum], Strict(False)] = (0.9, 0.999)
    """AdamW's moments."""
    eps: PositiveFloat = 1e-5
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the global gradient norm; null turns it off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after warm-up."""
    num_warmup_steps: NonNegativeInt = 0
    """PPO steps of linear warm-up."""
    final_fraction: UnitInterval = 0.0
    """Learning rate at the end of the decay, as a share of the peak."""
    num_decay_steps: PositiveInt | None = None
    """PPO step at which the decay ends; default: `ppo.num_steps`."""


class PPOSettings(Settings):
    num_steps: PositiveInt = 100
    """Rollout batches: each is sampled, scored and learnt from once."""
    batch_size: Count = 64
    """Responses per rollout batch, over all processes."""
    num_epochs: Count = 4
    """Passes over each rollout batch."""
    minibatch_size: PositiveInt | None = None
    """At most so many responses per optimizer step: the largest divisor of `batch_size` up to this
    is used; default: the whole batch."""
    micro_batch_size: PositiveInt | None = None
    """At most so many responses per forward and backward pass of one process: changes memory, not
    numbers."""
    micro_batch_tokens: PositiveInt | None = None
    """Instead: at most so many tokens per pass, padding included, with rows of like length
    together; a longer row passes alone. Changes memory and time, not numbers."""
    gamma: UnitInterval = 1.0
    """Discount per token."""
    gae_lambda: UnitInterval = 0.95
    """GAE's lambda."""
    bootstrap_truncated: bool = False
    """Value of the state after a response that the length limit cut: the critic's, instead of 0."""
    whiten_advantages: bool = True
    """Mean 0 and standard deviation 1 over all response tokens of the batch."""
    clip_range: PositiveFloat = 0.2
    """eps of the clipped policy loss."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound -A * ratio at -A * dual_clip for negative advantages (Ye et al. 2020)."""
    value_clip_range: PositiveFloat | None = 0.2
    """Clip of the value around its old value; null turns it off."""
    value_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus, reward units per nat."""
    ratio_threshold: PositiveFloat | None = 10.0
    """Skip a minibatch whose mean ratio exceeds this; null is off. NaN always skips."""
    target_kl: PositiveFloat | None = None
    """End the passes over a batch early once the approximate KL per token exceeds this, nats."""
    num_critic_warmup_steps: NonNegativeInt = 0
    """PPO steps that train the critic alone first; the policy does not move."""
    importance_cap: PositiveFloat | None = None
    """Truncated importance sampling: weight tokens by min(pi_old / pi_engine, cap)."""
    max_logprob_mismatch: PositiveFloat | None = None
    """Stop when |log pi_old - log pi_engine| exceeds this on average, nats per token."""

    @model_validator(mode="after")
    def _one_kind_of_micro_batch(self) -> Self:
        if self.micro_batch_size is not None and self.micro_batch_tokens is not None:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} and "
                f"micro_batch_tokens={self.micro_batch_tokens} cannot both hold; set one to null"
            )
        return self

    @model_validator(mode="after")
    def _minibatch_size_is_near_a_divisor(self) -> Self:
        if self.minibatch_size is not None and 2 * self.minibatch < min(
            self.minibatch_size, self.batch_size
        ):
            near = sorted(near_divisors(self.minibatch_size, self.batch_size)[:2])
            raise ValueError(
                f"minibatch_size={self.minibatch_size} must divide batch_size={self.batch_size}, "
                f"or lie near a divisor; try {' or '.join(map(str, near))}"
            )
        return self

    @property
    def minibatch(self) -> int:
        """Responses per optimizer step, over all processes."""
        most = min(self.minibatch_size or self.batch_size, self.batch_size)
        return next(n for n in range(most, 0, -1) if self.batch_size % n == 0)

    @property
    def micro_batch(self) -> int:
        """Responses per forward and backward pass, unless `micro_batch_tokens` decides."""
        return min(self.micro_batch_size or self.minibatch, self.minibatch)

    def notes(self) -> list[str]:
        """What differs from what was asked for."""
        if self.minibatch_size in (None, self.minibatch):
            return []
        return [
            f"ppo.minibatch_size={self.minibatch_size} does not divide ppo.batch_size="
            f"{self.batch_size}: each optimizer step learns from {self.minibatch} responses"
        ]


BeforeTheStep = Literal["skip", "stop"]
"""What is found before the weights move: the row or minibatch is left out; `stop` ends the run."""
AfterTheStep = Literal["off", "warn", "stop"]
"""What shows when the weights have moved already."""


class HealthSettings(Settings):
    """What a run does when its numbers say that training went wrong (docs/health.md)."""

    reward_not_finite: BeforeTheStep = "stop"
    """A reward is NaN or infinite; `skip` counts the response as unscored."""
    loss_not_finite: BeforeTheStep = "stop"
    """The loss of a minibatch is NaN or infinite."""
    gradient_not_finite: BeforeTheStep = "stop"
    """A gradient of a minibatch is NaN or infinite."""
    ratio_explosion: BeforeTheStep = "skip"
    """The mean ratio of a minibatch exceeds `ppo.ratio_threshold`."""
    kl_explosion: AfterTheStep = "warn"
    """One update moves the policy by more than `max_kl_jump`."""
    entropy_collapse: AfterTheStep = "warn"
    """Entropy falls below `min_entropy_share` of what it was at the start."""
    value_failure: AfterTheStep = "warn"
    """The values explain less of the returns than a constant would, or lose what they explained."""
    reward_saturation: AfterTheStep = "warn"
    """The spread of the scores falls below `min_spread_share` of what it was at the start."""
    length_drift: AfterTheStep = "warn"
    """Responses are `max_length_factor` times longer or shorter than at the start."""
    repetition: AfterTheStep = "warn"
    """More than `max_repeated_share` of the trigrams of responses occurred in them before."""
    max_kl_jump: PositiveFloat = 0.5
    """Nats per token."""
    min_entropy_share: UnitInterval = 0.1
    """Of the mean entropy of the first steps."""
    min_spread_share: UnitInterval = 0.1
    """Of the standard deviation of the scores in the first steps."""
    max_length_factor: float = Field(default=3.0, gt=1)
    """Times the mean length of the first steps, or one part in so many of it."""
    max_repeated_share: UnitInterval = 0.5
    """Of all trigrams of the batch's responses."""

    @model_validator(mode="before")
    @classmethod
    def _actions_are_possible(cls, data: Any) -> Any:
        problems = []
        for name, action in data.items() if isinstance(data, dict) else ():
            known = cls.model_fields.get(name)
            actions = () if known is None else get_args(known.annotation)
            if action == "skip" and "warn" in actions:
                problems.append(
                    f"{name}=skip: this check sees what updates have done, and nothing is left to "
                    "skip; use off, warn or stop"
                )
            if action in ("off", "warn") and "skip" in actions:
                problems.append(
                    f"{name}={action}: what this check finds would spoil the weights and is never "
                    "learnt from; use skip to continue without it, or stop"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return data
