"""Health checks: what a step's metrics say when training has gone wrong, and what to change.

Metrics in, alarms out. The metrics are those of all processes, so each finds the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

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
    """All that a check sees: this step's metrics, and the tracks of the steps before."""

    now: Metrics
    past: Mapping[str, Track]
    settings: HealthSettings
    ppo: PPOSettings

    def track(self, key: str) -> Track:
        return self.past.get(key, Track())


Find = Callable[[Sight], str | None]
"""What is wrong, with the value and the bound that it broke; None if nothing is."""


class Check(NamedTuple):
    """One health check."""

    name: str
    """The field of `HealthSettings` that has its action."""
    find: Find
    means: str
    """What usually causes it."""
    remedy: str
    """Which settings to change."""


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


def _counted(key: str, text: str) -> Find:
    """Fires when the metric is not 0."""

    def find(see: Sight) -> str | None:
        number = see.now.get(key, 0)
        largest = see.now.get("policy/largest_ratio_mean", 0.0)
        bounds = {"threshold": see.ppo.ratio_threshold, "largest": largest}
        return text.format(number, **bounds) if number != 0 else None

    return find


def _since_start(
    key: str,
    setting: str,
    text: str,
    is_broken: Callable[[float, float, float], bool],
    unknown: float = math.nan,
) -> Find:
    """Compares a metric with a bound and with what it was as the run began, `unknown` before that.

    No number exceeds NaN.
    """

    def find(see: Sight) -> str | None:
        now, begun = see.now.get(key, math.nan), see.track(key).start
        start = statistics.fmean(begun) if begun else unknown
        bound = getattr(see.settings, setting)
        if not is_broken(now, start, bound):
            return None
        return f"{text.format(now=now, start=start)} at the start; {setting}={bound:g}"

    return find


def _kl_of_the_update(see: Sight) -> str | None:
    """For responses of others that KL is the distance from them, and says nothing."""
    moved, bound = (
        see.now.get("policy/largest_update_kl_nats_per_token", 0.0),
        see.settings.max_kl_jump,
    )
    if "reward/score_mean" not in see.now or moved <= bound:
        return None
    return (
        f"within one update the policy moved by {moved:.3g} nats per token, more than "
        f"max_kl_jump={bound:g}"
    )


def _kl_since_the_last_step(see: Sight) -> str | None:
    recent, now = see.track(KL_PER_TOKEN).recent, see.now.get(KL_PER_TOKEN)
    if now is None or not recent or now - recent[-1] <= see.settings.max_kl_jump:
        return None
    return (
        f"the KL to the reference is {now:.3g} nats per token, {now - recent[-1]:.3g} more than a "
        f"step before; max_kl_jump={see.settings.max_kl_jump:g}"
    )


def _value_failure(see: Sight) -> str | None:
    error = see.now.get("value/mean_squared_error")
    if error is None:  # there is no critic
        return None
    explained = see.now["value/explained_variance"]
    if not (math.isfinite(error) and math.isfinite(explained)):
        return "the values are NaN or infinite"
    squares = see.track("value/mean_squared_return").largest
    zero = max(squares, see.now["value/mean_squared_return"])
    if error > WORSE_THAN_NOTHING * zero > 0:
        return (
            f"the mean squared error of the first values is {error:.3g}; that of 0 is {zero:.3g} "
            f"(bound: {WORSE_THAN_NOTHING:g} times that)"
        )
    if explained < BROKEN_VARIANCE:
        return f"explained variance is {explained:.2f}, below {BROKEN_VARIANCE:g}"
    recent = see.track("value/explained_variance").recent
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
    num_scored = see.now.get("reward/scored_share", 0) * see.ppo.batch_size
    if num_scored < 2:
        return None
    if see.now["reward/score_sd"] == 0:
        return f"all {num_scored:.0f} scores of the batch are {see.now['reward/score_mean']:.4g}"
    return _spread_fell(see)


_spread_fell = _since_start(
    "reward/score_sd",
    "min_spread_share",
    "the standard deviation of the scores is {now:.3g} and was {start:.3g}",
    lambda now, start, bound: now < bound * start,
)
KL_EXPLOSION = {
    "name": "kl_explosion",
    "means": "the learning rate is too high, or the KL penalty too weak for this reward",
    "remedy": "lower optimizer.learning_rate, set ppo.target_kl (0.02), or raise kl.coef",
}
OF_ROLLOUT = (
    Check(
        "reward_not_finite",
        _counted(
            "reward/num_not_finite",
            "{:.0f} rewards of the batch were NaN or infinite and count as unscored",
        ),
        "the reward divides by zero or overflows on some responses",
        "fix the reward, or let it return None for them",
    ),
    Check(find=_kl_since_the_last_step, **KL_EXPLOSION),
    Check(
        "entropy_collapse",
        _since_start(
            "policy/entropy_nats",
            "min_entropy_share",
            "entropy is {now:.3g} nats per token and was {start:.3g}",
            lambda now, start, bound: now < bound * start,
        ),
        "the policy writes nearly the same whatever it draws, and finds nothing new",
        "raise kl.coef or ppo.entropy_coef, or lower optimizer.learning_rate",
    ),
    Check(
        "value_failure",
        _value_failure,
        "the critic is broken or on another scale than the reward, and advantages are noise",
        "lower optimizer.critic_learning_rate, set ppo.num_critic_warmup_steps or score.normalize",
    ),
    Check(
        "reward_saturation",
        _reward_saturation,
        "the reward no longer tells responses apart, and whitened advantages are noise",
        "stop here, or use a finer reward; check that the reward is not being fooled",
    ),
    Check(
        "length_drift",
        _since_start(
            "response/length_tokens",
            "max_length_factor",
            "responses have {now:.1f} tokens and had {start:.1f}",
            lambda now, start, bound: now > start * bound or now < start / bound,
        ),
        "the reward pays for length (or for ending at once)",
        "add a length reward (kind: length), or set score.missing_eos",
    ),
    Check(
        "repetition",
        _since_start(
            "response/repeated_share",
            "max_repeated_share",
            "{now:.0%} of the trigrams of responses occurred in them before, and {start:.0%}",
            lambda now, start, bound: now > max(bound, start + MORE_REPEATED),
            unknown=0.0,
        ),
        "the policy has found a phrase that the reward likes",
        "add a repetition reward (kind: repetition), or raise kl.coef",
    ),
)
"""Ask a rollout, before it is learnt from: it shows what earlier updates have done."""
OF_UPDATE = (
    Check(
        "loss_not_finite",
        _counted(
            "update/num_losses_not_finite",
            "the loss of {:.0f} minibatches was NaN or infinite, and they were skipped",
        ),
        "weights, values or log-probs have overflowed",
        "lower optimizer.learning_rate, or use float32 (policy.dtype)",
    ),
    Check(
        "gradient_not_finite",
        _counted(
            "update/num_gradients_not_finite",
            "a gradient of {:.0f} minibatches was NaN or infinite, and they were skipped",
        ),
        "the backward pass overflows",
        "lower optimizer.learning_rate, or use float32 (policy.dtype)",
    ),
    Check(
        "ratio_explosion",
        _counted(
            "update/num_ratio_skips",
            "the mean ratio of {:.0f} minibatches exceeded ppo.ratio_threshold={threshold:g} "
            "(largest {largest:.3g}), and they were skipped",
        ),
        "the policy left the batch that it learns from",
        "lower optimizer.learning_rate or ppo.num_epochs, or set ppo.target_kl (0.02)",
    ),
    Check(find=_kl_of_the_update, **KL_EXPLOSION),
)
"""Ask an update."""
NAMES = tuple(dict.fromkeys(check.name for check in (*OF_ROLLOUT, *OF_UPDATE)))


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
    """Checks every step of a run, in order."""

    def __init__(self, settings: HealthSettings, ppo: PPOSettings) -> None:
        self._settings = settings
        self._ppo = ppo
        self._past: dict[str, Track] = {}
        self._firing: set[str] = set()
        self._records: dict[str, Record] = {}

    def check_rollout(self, step: int, metrics: Metrics) -> list[Alarm]:
        """What the metrics of an `Experience` say, before the update."""
        now = dict(metrics)
        if metrics.get("response/length_tokens", 0) > 0 and "kl/sequence_nats" in metrics:
            now[KL_PER_TOKEN] = metrics["kl/sequence_nats"] / metrics["response/length_tokens"]
        alarms = self._run(step, now, OF_ROLLOUT, "rollout")
        for key in WATCHED:
            if key in now:
                self._past.setdefault(key, Track()).take(now[key], is_healthy=not alarms)
        return alarms

    def check_update(self, step: int, metrics: Metrics) -> list[Alarm]:
        """What the metrics of a whole step say, after the update."""
        return self._run(step, metrics, OF_UPDATE, "update")

    def record(self, check: str, step: int, action: str, diagnosis: str) -> None:
        """Remember that a check fired, here or elsewhere."""
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
        """Resume from what `state_dict` gave."""
        self._past = {key: Track(**track) for key, track in state["past"].items()}
        self._firing = set(state["firing"])
        self._records = {name: Record(**record) for name, record in state["fired"].items()}

    def _run(self, step: int, now: Metrics, checks: Sequence[Check], when: str) -> list[Alarm]:
        sight = Sight(now, self._past, self._settings, self._ppo)
        was_firing = set(self._firing)
        self._firing -= {f"{check.name} ({when})" for check in checks}
        alarms = []
        for check in checks:
            action, key = getattr(self._settings, check.name), f"{check.name} ({when})"
            problem = None if action == "off" else check.find(sight)
            if problem is not None:
                diagnosis = f"{problem}. Usually {check.means}; {check.remedy}."
                is_new = key not in was_firing
                self._firing.add(key)
                self.record(check.name, step, action, diagnosis)
                alarms.append(Alarm(check.name, step, action, diagnosis, is_new))
        return alarms
