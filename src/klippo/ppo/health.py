"""health checks: what a step's metrics say when training has gone wrong, and what to change.

Metrics in, alarms out. The metrics are those of all processes, so each finds the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from klippo.ppo.settings import HealthSettings, PPOSettings
from klippo.types import Metrics

NUM_START = 3
"""Steps without an alarm whose mean says how a run began."""
NUM_RECENT = 10
MIN_RECENT = 5
"""Values that a mean of the last ones needs."""
WORSE_THAN_NOTHING = 4.0
"""Mean squared error of the first values over that of 0: twice as far off."""
BROKEN_VARIANCE, POOR_VARIANCE = -1.0, -0.2
"""Explained variance that is a failure in one step, and on average over the last ones."""
LOST_VARIANCE = 0.5
"""Explained variance that a critic had on average and lost in one step."""
MORE_REPEATED = 0.25
"""Share of trigrams by which repetition must have grown since the start."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """All that a rule sees."""

    now: Metrics
    past: Mapping[str, Track]
    """Of the steps before."""
    settings: HealthSettings
    ppo: PPOSettings

    def start(self, key: str) -> float | None:
        """How the metric began; None at the first step."""
        track = self.past.get(key)
        return statistics.fmean(track.start) if track is not None and track.start else None


Rule = Callable[[Sight], str | None]
"""What is wrong, with the value and the bound that it broke; None where nothing is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One health check."""

    name: str
    """The field of `HealthSettings` that has its action."""
    rule: Rule
    means: str
    """What usually stands behind it."""
    remedy: str
    """Which settings to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A check that fired."""

    check: str
    step: int
    action: str
    diagnosis: str
    is_new: bool
    """It was quiet when it was last asked."""

    @property
    def stops(self) -> bool:
        return self.action == "stop"

    def __str__(self) -> str:
        return f"{self.check} at step {self.step}: {self.diagnosis}"


def _reward_not_finite(see: Sight) -> str | None:
    number = see.now.get("reward/num_not_finite", 0)
    if number == 0:
        return None
    return f"{number:.0f} rewards of the batch were NaN or infinite and count as unscored"


def _minibatches(key: str, what: str) -> Rule:
    def rule(see: Sight) -> str | None:
        number = see.now.get(key, 0)
        if number == 0:
            return None
        return f"{what} of {number:.0f} minibatches was NaN or infinite, and they were skipped"

    return rule


def _ratio_explosion(see: Sight) -> str | None:
    number = see.now.get("update/num_ratio_skips", 0)
    if number == 0:
        return None
    return (
        f"the mean ratio of {number:.0f} minibatches exceeded ppo.ratio_threshold="
        f"{see.ppo.ratio_threshold:g} (largest {see.now['policy/largest_ratio_mean']:.3g}), and "
        "they were skipped"
    )


def _kl_of_the_update(see: Sight) -> str | None:
    """Where others wrote the responses, that KL is the distance from them, and says nothing."""
    moved = see.now.get("policy/largest_update_kl_nats_per_token", 0.0)
    if "reward/score_mean" not in see.now or moved <= see.settings.max_kl_jump:
        return None
    return (
        f"within one update the policy moved by {moved:.3g} nats per token, more than "
        f"max_kl_jump={see.settings.max_kl_jump:g}"
    )


def _kl_since_the_last_step(see: Sight) -> str | None:
    before, now = see.past.get("kl per token"), see.now.get("kl per token")
    if before is None or now is None or not before.recent:
        return None
    jump = now - before.recent[-1]
    if not (jump > see.settings.max_kl_jump or math.isnan(jump)):
        return None
    return (
        f"the KL to the reference is {now:.3g} nats per token, {jump:.3g} more than a step before; "
        f"max_kl_jump={see.settings.max_kl_jump:g}"
    )


def _entropy_collapse(see: Sight) -> str | None:
    now, start = see.now.get("policy/entropy_nats"), see.start("policy/entropy_nats")
    if now is None or start is None or not now < see.settings.min_entropy_share * start:
        return None
    return (
        f"entropy is {now:.3g} nats per token and was {start:.3g} at the start; "
        f"min_entropy_share={see.settings.min_entropy_share:g}"
    )


def _value_failure(see: Sight) -> str | None:
    error = see.now.get("value/mean_squared_error")
    if error is None:  # there is no critic
        return None
    explained = see.now["value/explained_variance"]
    if not (math.isfinite(error) and math.isfinite(explained)):
        return "the values are NaN or infinite"
    squares = see.past.get("value/mean_squared_return", Track()).largest
    zero = max(squares, see.now["value/mean_squared_return"])
    if error > WORSE_THAN_NOTHING * zero > 0:
        return (
            f"the mean squared error of the first values is {error:.3g}; that of 0 is {zero:.3g} "
            f"(bound: {WORSE_THAN_NOTHING:g} times that)"
        )
    if explained < BROKEN_VARIANCE:
        return f"explained variance is {explained:.2f}, below {BROKEN_VARIANCE:g}"
    recent = see.past.get("value/explained_variance", Track()).recent
    if len(recent) < MIN_RECENT:
        return None
    mean = statistics.fmean([*recent, explained][-NUM_RECENT:])
    if mean < POOR_VARIANCE:
        return f"explained variance is {mean:.2f} on average of late, below {POOR_VARIANCE:g}"
    lost = statistics.fmean(recent) - explained
    if explained <= 0 and lost > LOST_VARIANCE:
        return f"explained variance is {explained:.2f} and was {explained + lost:.2f} of late"
    return None


def _reward_saturation(see: Sight) -> str | None:
    now, start = see.now.get("reward/score_sd"), see.start("reward/score_sd")
    num_scored = see.now.get("reward/scored_share", 0) * see.ppo.batch_size
    if now is None or num_scored < 2:
        return None
    if now == 0:
        return f"all {num_scored:.0f} scores of the batch are {see.now['reward/score_mean']:.4g}"
    if start is None or not now < see.settings.min_spread_share * start:
        return None
    return (
        f"the standard deviation of the scores is {now:.3g} and was {start:.3g} at the start; "
        f"min_spread_share={see.settings.min_spread_share:g}"
    )


def _length_drift(see: Sight) -> str | None:
    now, start = see.now.get("response/length_tokens"), see.start("response/length_tokens")
    bound = see.settings.max_length_factor
    if now is None or start is None or start / bound <= now <= start * bound:
        return None
    return (
        f"responses have {now:.1f} tokens and had {start:.1f} at the start; "
        f"max_length_factor={bound:g}"
    )


def _repetition(see: Sight) -> str | None:
    now = see.now.get("response/repeated_share")
    start = see.start("response/repeated_share") or 0.0
    bound = see.settings.max_repeated_share
    if now is None or not (now > bound and now > start + MORE_REPEATED):
        return None
    return (
        f"{now:.0%} of the trigrams of responses occurred in them before, and {start:.0%} at the "
        f"start; max_repeated_share={bound:g}"
    )


_KL = {
    "name": "kl_explosion",
    "means": "the learning rate is too high, or the KL penalty too weak for this reward",
    "remedy": "lower optimizer.learning_rate, set ppo.target_kl (0.02), or raise kl.coef",
}

OF_ROLLOUT = (
    Check(
        name="reward_not_finite",
        rule=_reward_not_finite,
        means="the reward divides by zero or overflows on some responses",
        remedy="mend the reward, or let it return None for them",
    ),
    Check(rule=_kl_since_the_last_step, **_KL),
    Check(
        name="entropy_collapse",
        rule=_entropy_collapse,
        means="the policy writes nearly the same whatever it draws, and finds nothing new",
        remedy="raise kl.coef or ppo.entropy_coef, or lower optimizer.learning_rate",
    ),
    Check(
        name="value_failure",
        rule=_value_failure,
        means="the critic is broken or on another scale than the reward, and advantages are noise",
        remedy="lower optimizer.critic_learning_rate, set ppo.num_critic_warmup_steps or "
        "score.normalize",
    ),
    Check(
        name="reward_saturation",
        rule=_reward_saturation,
        means="the reward no longer tells responses apart, and whitened advantages are noise",
        remedy="stop here, or use a finer reward; check that the reward is not being fooled",
    ),
    Check(
        name="length_drift",
        rule=_length_drift,
        means="the reward pays for length (or for ending at once)",
        remedy="add a length reward (kind: length), or set score.missing_eos",
    ),
    Check(
        name="repetition",
        rule=_repetition,
        means="the policy has found a phrase that the reward likes",
        remedy="add a repetition reward (kind: repetition), or raise kl.coef",
    ),
)
"""What a rollout shows, before anything is learnt from it: what the updates before have done."""
OF_UPDATE = (
    Check(
        name="loss_not_finite",
        rule=_minibatches("update/num_losses_not_finite", "the loss"),
        means="weights, values or log-probs have overflowed",
        remedy="lower optimizer.learning_rate, or use float32 (policy.dtype)",
    ),
    Check(
        name="gradient_not_finite",
        rule=_minibatches("update/num_gradients_not_finite", "a gradient"),
        means="the backward pass overflows",
        remedy="lower optimizer.learning_rate, or use float32 (policy.dtype)",
    ),
    Check(
        name="ratio_explosion",
        rule=_ratio_explosion,
        means="the policy left the batch that it learns from",
        remedy="lower optimizer.learning_rate or ppo.num_epochs, or set ppo.target_kl (0.02)",
    ),
    Check(rule=_kl_of_the_update, **_KL),
)
"""What an update says of itself."""
NAMES = tuple(dict.fromkeys(check.name for check in (*OF_ROLLOUT, *OF_UPDATE)))
WATCHED = (
    "kl per token",
    "policy/entropy_nats",
    "value/mean_squared_return",
    "value/explained_variance",
    "reward/score_sd",
    "response/length_tokens",
    "response/repeated_share",
)


@dataclass(slots=True)
class Record:
    """How often a check has fired in a run."""

    action: str
    first_step: int
    last_step: int
    num_steps: int
    diagnosis: str
    """Of the first time."""


class HealthMonitor:
    """Looks at every step of a run, in order."""

    def __init__(self, settings: HealthSettings, ppo: PPOSettings) -> None:
        self._settings = settings
        self._ppo = ppo
        self._past: dict[str, Track] = {}
        self._firing: set[str] = set()
        self._records: dict[str, Record] = {}

    def look_at_rollout(self, step: int, metrics: Metrics) -> list[Alarm]:
        """What the metrics of an `Experience` say, before the update."""
        now = dict(metrics)
        if metrics.get("response/length_tokens", 0) > 0 and "kl/sequence_nats" in metrics:
            now["kl per token"] = metrics["kl/sequence_nats"] / metrics["response/length_tokens"]
        alarms = self._look(step, now, OF_ROLLOUT, "rollout")
        for key in WATCHED:
            if key in now:
                self._past.setdefault(key, Track()).take(now[key], is_healthy=not alarms)
        return alarms

    def look_at_update(self, step: int, metrics: Metrics) -> list[Alarm]:
        """What the metrics of a whole step say, after the update."""
        return self._look(step, metrics, OF_UPDATE, "update")

    def record(self, check: str, step: int, action: str, diagnosis: str) -> None:
        """Remember that a check fired; also one that spoke up elsewhere."""
        known = self._records.get(check)
        if known is None:
            self._records[check] = Record(action, step, step, 1, diagnosis)
        elif known.last_step != step:
            known.last_step, known.num_steps = step, known.num_steps + 1

    def fired(self) -> dict[str, dict[str, Any]]:
        """Every check that has fired, as JSON holds it."""
        return {name: asdict(record) for name, record in self._records.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as JSON holds it."""
        return {
            "past": {key: asdict(track) for key, track in self._past.items()},
            "firing": sorted(self._firing),
            "fired": self.fired(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._past = {key: Track(**track) for key, track in state["past"].items()}
        self._firing = set(state["firing"])
        self._records = {name: Record(**record) for name, record in state["fired"].items()}

    def _look(self, step: int, now: Metrics, checks: Sequence[Check], when: str) -> list[Alarm]:
        sight = Sight(now=now, past=self._past, settings=self._settings, ppo=self._ppo)
        alarms = []
        for check in checks:
            action = getattr(self._settings, check.name)
            found = None if action == "off" else check.rule(sight)
            key = f"{check.name} ({when})"
            if found is None:
                self._firing.discard(key)
                continue
            diagnosis = f"{found}. Usually {check.means}; {check.remedy}."
            self.record(check.name, step, action, diagnosis)
            is_new = key not in self._firing
            self._firing.add(key)
            alarms.append(
                Alarm(
                    check=check.name, step=step, action=action, diagnosis=diagnosis, is_new=is_new
                )
            )
        return alarms
