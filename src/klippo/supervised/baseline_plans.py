"""What each baseline learns from, how, and what held-out responses say about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Protocol

from klippo.data.choices import RewardPairs, best_responses, pairs_by_reward
from klippo.errors import ConfigError
from klippo.evaluation.statistics import compare_paired
from klippo.policy.loading import LoadedPolicy
from klippo.supervised.dpo import Pair, log_ratios, optimize_preferences
from klippo.supervised.sft import Example, fine_tune, learn_response, nats_per_token
from klippo.supervised.training import Report, Training
from klippo.types import LoggedResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the baselines need beyond the run's config."""

    best_share: float = 0.25
    """`sft-best`, where each prompt has one response: the share of all that is learnt."""
    beta: float = 0.1
    """`dpo`: the weight of log-ratios, reward per nat."""
    pairs_per_prompt: int = 4
    """`dpo`: most pairs of one prompt, the widest apart in reward."""
    min_margin: float = 0.0
    """`dpo`: least difference of rewards in a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """The data of a run, as the policy reads it."""

    train: Sequence[LoggedResponse]
    held_out: Sequence[LoggedResponse]
    source: str
    """Its name, for messages."""


class Plan(Protocol):
    """One baseline, with its examples chosen."""

    about: str
    """What it learns from, in words."""
    num_examples: int
    sequences_per_example: int

    def train(self, start: LoadedPolicy, training: Training, report: Report) -> None:
        """Train the start's policy in place."""

    def measure(self, model: Any, batch_size: int) -> list[float]:
        """A number per held-out example, before and after."""

    def figures(self, before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
        """What these say, to be kept."""

    def sentence(self, before: Sequence[float], after: Sequence[float]) -> str:
        """The same in words."""


class BestResponses:
    """Supervised fine-tuning on the best responses."""

    sequences_per_example = 1

    def __init__(self, data: Responses, options: PlanOptions) -> None:
        best = best_responses(data.train, options.best_share)
        self._examples = [_example(one) for one in best.chosen]
        other = best_responses(data.held_out, options.best_share).chosen if data.held_out else []
        self._held_out = [_example(one) for one in other]
        self.num_examples = len(self._examples)
        which = "of each prompt" if best.by_prompt else f"{options.best_share:.0%}"
        mean, of_all = (fmean(one.reward for one in some) for some in (best.chosen, data.train))
        self.about = (
            f"{len(best.chosen)} of {len(data.train)} responses, the best {which} "
            f"(mean reward {mean:.3g}, of all {of_all:.3g})"
        )

    def train(self, start: LoadedPolicy, training: Training, report: Report) -> None:
        fine_tune(learner(start), start.tokenizer, self._examples, training, report)

    def measure(self, model: Any, batch_size: int) -> list[float]:
        """-log p per learnt token, nats."""
        return nats_per_token(model, self._held_out, batch_size)

    def figures(self, before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
        compared = compare_paired(before, after)
        if compared is None:
            return {}
        sides = {side: asdict(getattr(compared, side)) for side in ("before", "after")}
        return {"held_out_nats_per_token": sides | {"difference": asdict(compared.difference)}}

    def sentence(self, before: Sequence[float], after: Sequence[float]) -> str:
        compared = compare_paired(before, after)
        if compared is None:
            return "nothing was held out"
        return (
            f"held-out loss, {len(after)} best responses: {compared.before.mean:.3f} → "
            f"{compared.after.mean:.3f} nats/token"
        )


class Preferences:
    """DPO on pairs of a better and a worse response to the same prompt."""

    sequences_per_example = 2

    def __init__(self, data: Responses, options: PlanOptions) -> None:
        self._beta = options.beta
        found = _pairs(data.train, options)
        if not found.pairs:
            raise ConfigError(_no_pairs(found, options, data.source))
        self._pairs = _examples(found)
        self._held_out = _examples(_pairs(data.held_out, options))
        self.num_examples = len(self._pairs)
        prompts = {tuple(better.prompt.token_ids) for better, _ in found.pairs}
        gap = fmean(better.reward - worse.reward for better, worse in found.pairs)
        left_out = f"{found.num_ties} ties" + (
            f" and {found.num_close} closer than {options.min_margin:g}" if found.num_close else ""
        )
        self.about = (
            f"{len(found.pairs)} pairs of {len(prompts)} prompts, {gap:.3g} apart in reward on "
            f"average ({left_out} left out)"
        )

    def train(self, start: LoadedPolicy, training: Training, report: Report) -> None:
        frozen = None if start.policy.peft_model is not None else start.reference.lm.model
        optimize_preferences(
            learner(start),
            frozen,
            start.tokenizer,
            self._pairs,
            training,
            report,
            beta=self._beta,
        )

    def measure(self, model: Any, batch_size: int) -> list[float]:
        """log pi(better) - log pi(worse), nats."""
        return log_ratios(model, self._held_out, batch_size)

    def figures(self, before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
        if not after:
            return {}
        margins = [self._beta * (b - a) for a, b in zip(before, after, strict=True)]
        right = sum(margin > 0 for margin in margins)
        return {
            "held_out_pairs": len(margins),
            "held_out_accuracy": right / len(margins),
            "held_out_margin": fmean(margins),
        }

    def sentence(self, before: Sequence[float], after: Sequence[float]) -> str:
        found = self.figures(before, after)
        if not found:
            return "no pair was held out"
        return (
            f"held-out pairs, {found['held_out_pairs']}: the implicit reward is right on "
            f"{found['held_out_accuracy']:.2f} (at the start it knows none), mean margin "
            f"{found['held_out_margin']:+.3f}"
        )


PLANS: dict[str, Callable[[Responses, PlanOptions], Plan]] = {
    "sft-best": BestResponses,
    "dpo": Preferences,
}
"""By name."""


def learner(start: LoadedPolicy) -> Any:
    """What trains: the policy's adapters on their base, or the model itself."""
    return start.policy.peft_model or start.policy.lm.model


def _example(one: LoggedResponse) -> Example:
    return learn_response(one.prompt, one.completion.token_ids)


def _pairs(responses: Sequence[LoggedResponse], options: PlanOptions) -> RewardPairs:
    return pairs_by_reward(
        responses, min_margin=options.min_margin, max_per_prompt=options.pairs_per_prompt
    )


def _examples(found: RewardPairs) -> list[Pair]:
    return [(_example(better), _example(worse)) for better, worse in found.pairs]


def _no_pairs(found: RewardPairs, options: PlanOptions, source: str) -> str:
    if found.num_ties + found.num_close == 0:
        why, remedy = "each prompt has one response", "add responses to the same prompts"
    else:
        why = f"{found.num_ties} tie (equal rewards or equal texts)"
        remedy = "check the rewards"
        if found.num_close:
            why += f", {found.num_close} lie closer than --dpo-min-margin {options.min_margin:g}"
            remedy = "lower --dpo-min-margin"
    return (
        f"{source}: DPO needs pairs, two responses to the same prompt with unlike rewards, and "
        f"there are none: {why}; {remedy}, or train the other baseline alone with --only sft-best"
    )
