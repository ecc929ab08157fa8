"""Health checks: what a step's metrics say when training has gone wrong, and what to change.

Metrics are those of all processes, so every process raises the same alarms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from klippo.ppo.settings import HealthSettings, PPOSettings
from klippo.types import Metrics

NUM_START = 3
"""Steps without an alarm whose mean says how a run began."""
NUM_RECENT, MIN_RECENT = 10, 5
"""Values in a mean of the last steps: at most, and at least."""
WORSE_THAN_ZERO = 4.0
"""Mean squared error of the first values over that of 0."""
BROKEN_VARIANCE, POOR_VARIANCE = -1.0, -0.2
"""Explained variance that is a failure in one step, and on average over the last ones."""
LOST_VARIANCE = 0.5
"""Explained variance that a critic had on average and lost in one step."""
MORE_REPEATED = 0.25
"""Share of trigrams by which repetition must have grown since the start."""
KL_PER_TOKEN = "kl per token"
WATCHED = (
    KL_PER_TOKEN,
    "policy/entropy_nats",
    "value/mean_squared_return",
    "value/explained_variance",
    "reward/score_sd",
    "response/length_tokens",
    "response/repeated_share",
)
"""Metrics of a rollout whose past the checks know."""
CAUSES = {
    "reward_not_finite": (
        "the reward divides by zero or overflows on some responses",
        "fix the reward, or let it return None for them",
    ),
    "loss_not_finite": (
        "weights, values or log-probs have overflowed",
        "lower optimizer.learning_rate, or use float32 (policy.dtype)",
    ),
    "gradient_not_finite": (
        "the backward pass overflows",
        "lower optimizer.learning_rate, or use float32 (policy.dtype)",
    ),
    "ratio_explosion": (
        "the policy left the batch that it learns from",
        "lower optimizer.learning_rate or ppo.num_epochs, or set ppo.target_kl (0.02)",
    ),
    "kl_explosion": (
        "the learning rate is too high, or the KL penalty too weak for this reward",
        "lower optimizer.learning_rate, set ppo.target_kl (0.02), or raise kl.coef",
    ),
    "entropy_collapse": (
        "the policy writes nearly the same whatever it draws, and finds nothing new",
        "raise kl.coef or ppo.entropy_coef, or lower optimizer.learning_rate",
    ),
    "value_failure": (
        "the critic is broken or on another scale than the reward, and advantages are noise",
        "lower optimizer.critic_learning_rate, set ppo.num_critic_warmup_steps or score.normalize",
    ),
    "reward_saturation": (
        "the reward no longer tells responses apart, and whitened advantages are noise",
        "stop here, or use a finer reward; check that the reward is not being fooled",
    ),
    "length_drift": (
        "the reward pays for length (or for ending at once)",
        "add a length reward (kind: length), or set score.missing_eos",
    ),
    "repetition": (
        "the policy has found a phrase that the reward likes",
        "add a repetition reward (kind: repetition), or raise kl.coef",
    ),
}
"""The usual cause of each check, and which settings to change; `HealthSettings` has the actions."""


@dataclass(slots=True)
class Track:
    """What is remembered of one metric."""

    start: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    largest: float = 0.0

    def take(self, value: float, *, is_healthy: bool) -> None:
        """The next step's value; one that is not finite leaves no trace."""
        if not math.isfinite(value):
            return
        if is_healthy and len(self.start) < NUM_START:
            self.start.append(value)
        self.recent = [*self.recent, value][-NUM_RECENT:]
        self.largest = max(self.largest, value)


class Sight(NamedTuple):
    """What the checks see: this step's metrics, the tracks of the steps before, the settings."""

    metrics: Metrics
    past: Mapping[str, Track]
    bounds: HealthSettings
    ppo: PPOSettings

    def now(self, key: str) -> float:
        """NaN if the step lacks it: no comparison with it holds."""
        return self.metrics.get(key, math.nan)

    def track(self, key: str) -> Track:
        return self.past.get(key, Track())

    def start(self, key: str, unknown: float = math.nan) -> float:
        begun = self.track(key).start
        return fmean(begun) if begun else unknown


Problems = Iterator[tuple[str, str]]
"""Name of each check that fires, and what is wrong, with the value and the bound that it broke."""


def rollout_problems(see: Sight) -> Problems:
    """Asked before a rollout is learnt from: it shows what earlier updates have done."""
    bounds, now = see.bounds, see.now
    if (num := now("reward/num_not_finite")) > 0:
        problem = f"{num:.0f} rewards of the batch were NaN or infinite and count as unscored"
        yield "reward_not_finite", problem
    recent = see.track(KL_PER_TOKEN).recent
    rise = now(KL_PER_TOKEN) - recent[-1] if recent and KL_PER_TOKEN in see.metrics else 0.0
    if not rise <= bounds.max_kl_jump:  # NaN is an explosion too
        yield (
            "kl_explosion",
            f"the KL to the reference is {now(KL_PER_TOKEN):.3g} nats per token, {rise:.3g} more "
            f"than a step before; max_kl_jump={bounds.max_kl_jump:g}",
        )
    entropy, start = now("policy/entropy_nats"), see.start("policy/entropy_nats")
    if entropy < bounds.min_entropy_share * start:
        yield (
            "entropy_collapse",
            f"entropy is {entropy:.3g} nats per token and was {start:.3g} at the start; "
            f"min_entropy_share={bounds.min_entropy_share:g}",
        )
    if "value/mean_squared_error" in see.metrics and (failure := _value_failure(see)) is not None:
        yield "value_failure", failure
    num, sd = now("reward/scored_share") * see.ppo.batch_size, now("reward/score_sd")
    if num >= 2 and sd == 0:
        problem = f"all {num:.0f} scores of the batch are {now('reward/score_mean'):.4g}"
        yield "reward_saturation", problem
    elif num >= 2 and sd < bounds.min_spread_share * (start := see.start("reward/score_sd")):
        yield (
            "reward_saturation",
            f"the standard deviation of the scores is {sd:.3g} and was {start:.3g} at the start; "
            f"min_spread_share={bounds.min_spread_share:g}",
        )
    length, start = now("response/length_tokens"), see.start("response/length_tokens")
    if length > start * bounds.max_length_factor or length < start / bounds.max_length_factor:
        yield (
            "length_drift",
            f"responses have {length:.1f} tokens and had {start:.1f} at the start; "
            f"max_length_factor={bounds.max_length_factor:g}",
        )
    repeated, start = now("response/repeated_share"), see.start("response/repeated_share", 0.0)
    if repeated > max(bounds.max_repeated_share, start + MORE_REPEATED):
        yield (
            "repetition",
            f"{repeated:.0%} of the trigrams of responses occurred in them before, and {start:.0%} "
            f"at the start; max_repeated_share={bounds.max_repeated_share:g}",
        )


def _value_failure(see: Sight) -> str | None:
    error, explained = see.now("value/mean_squared_error"), see.now("value/explained_variance")
    if not (math.isfinite(error) and math.isfinite(explained)):
        return "the values are NaN or infinite"
    zero = max(see.track("value/mean_squared_return").largest, see.now("value/mean_squared_return"))
    if error > WORSE_THAN_ZERO * zero > 0:
        return (
            f"the mean squared error of the first values is {error:.3g}; that of 0 is {zero:.3g} "
            f"(bound: {WORSE_THAN_ZERO:g} times that)"
        )
    if explained < BROKEN_VARIANCE:
        return f"explained variance is {explained:.2f}, below {BROKEN_VARIANCE:g}"
    recent = see.track("value/explained_variance").recent
    if len(recent) < MIN_RECENT:
        return None
    mean, before = fmean([*recent, explained][-NUM_RECENT:]), fmean(recent)
    if mean < POOR_VARIANCE:
        return f"explained variance is {mean:.2f} on average of late, below {POOR_VARIANCE:g}"
    if explained <= 0 and before - explained > LOST_VARIANCE:
        return f"explained variance is {explained:.2f} and was {before:.2f} of late"
    return None


def update_problems(see: Sight) -> Problems:
    """Asked after an update."""
    now, bounds = see.now, see.bounds
    skipped = "minibatches was NaN or infinite, and they were skipped"
    if (num := now("update/num_losses_not_finite")) > 0:
        yield "loss_not_finite", f"the loss of {num:.0f} {skipped}"
    if (num := now("update/num_gradients_not_finite")) > 0:
        yield "gradient_not_finite", f"a gradient of {num:.0f} {skipped}"
    if (num := now("update/num_ratio_skips")) > 0:
        yield (
            "ratio_explosion",
            f"the mean ratio of {num:.0f} minibatches exceeded ppo.ratio_threshold="
            f"{see.ppo.ratio_threshold:g} (largest {now('policy/largest_ratio_mean'):.3g}), and "
            "they were skipped",
        )
    moved = now("policy/largest_update_kl_nats_per_token")
    # For responses of others that KL is the distance from them, and says nothing.
    if "reward/score_mean" in see.metrics and moved > bounds.max_kl_jump:
        yield (
            "kl_explosion",
            f"within one update the policy moved by {moved:.3g} nats per token, more than "
            f"max_kl_jump={bounds.max_kl_jump:g}",
        )


@dataclass(frozen=True, slots=True)
class Alarm:
    """A check that fired."""

    check: str
    step: int
    action: str
    diagnosis: str
    is_new: bool
    """It was quiet when last asked."""

    @property
    def stops(self) -> bool:
        return self.action == "stop"

    def __str__(self) -> str:
        return f"{self.check} at step {self.step}: {self.diagnosis}"


class HealthMonitor:
    """Checks every step of a run, in order."""

    def __init__(self, settings: HealthSettings, ppo: PPOSettings) -> None:
        self._settings = settings
        self._ppo = ppo
        self._past: dict[str, Track] = {}
        self._firing: set[str] = set()
        self._records: dict[str, dict[str, Any]] = {}

    def check_rollout(self, step: int, metrics: Metrics) -> list[Alarm]:
        """What the metrics of an `Experience` say, before the update."""
        now = dict(metrics)
        if metrics.get("response/length_tokens", 0) > 0 and "kl/sequence_nats" in metrics:
            now[KL_PER_TOKEN] = metrics["kl/sequence_nats"] / metrics["response/length_tokens"]
        alarms = self._alarms(step, rollout_problems(self._sight(now)), "rollout")
        for key in WATCHED:
            if key in now:
                self._past.setdefault(key, Track()).take(now[key], is_healthy=not alarms)
        return alarms

    def check_update(self, step: int, metrics: Metrics) -> list[Alarm]:
        """What the metrics of a whole step say, after the update."""
        return self._alarms(step, update_problems(self._sight(metrics)), "update")

    def record(self, check: str, step: int, action: str, diagnosis: str) -> None:
        """Remember that a check fired, here or elsewhere; the first diagnosis stays."""
        new = {"action": action, "first_step": step, "last_step": step, "num_steps": 1}
        known = self._records.setdefault(check, new | {"diagnosis": diagnosis})
        if known["last_step"] != step:
            known.update(last_step=step, num_steps=known["num_steps"] + 1)

    def fired(self) -> dict[str, dict[str, Any]]:
        """Every check that has fired and how often, as JSON holds it."""
        return {name: dict(record) for name, record in self._records.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as JSON holds it."""
        return {
            "past": {key: asdict(track) for key, track in self._past.items()},
            "firing": sorted(self._firing),
            "fired": self.fired(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` gave."""
        self._past = {key: Track(**track) for key, track in state["past"].items()}
        self._firing = set(state["firing"])
        self._records = {name: dict(record) for name, record in state["fired"].items()}

    def _sight(self, metrics: Metrics) -> Sight:
        return Sight(metrics, self._past, self._settings, self._ppo)

    def _alarms(self, step: int, problems: Problems, when: str) -> list[Alarm]:
        was_firing = self._firing
        self._firing = {key for key in was_firing if not key.endswith(f"({when})")}
        alarms = []
        for check, problem in problems:
            action, key = getattr(self._settings, check), f"{check} ({when})"
            if action == "off":
                continue
            cause, remedy = CAUSES[check]
            diagnosis = f"{problem}. Usually {cause}; {remedy}."
            self._firing.add(key)
            self.record(check, step, action, diagnosis)
            alarms.append(Alarm(check, step, action, diagnosis, key not in was_firing))
        return alarms
