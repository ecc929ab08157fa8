"""Offline PPO: logged responses in place of sampling, and diagnostics in place of evaluations."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from klippo.config.schema import RunConfig
from klippo.data.files import Row
from klippo.data.logged import (
    ScoredResponse,
    log_responses,
    read_responses,
    refuse_equal_rewards,
)
from klippo.data.prompts import build_prompts
from klippo.data.sampler import PromptSampler
from klippo.errors import ConfigError
from klippo.lengths import context_length
from klippo.policy.loading import LoadedPolicy
from klippo.ppo.diagnostics import BehaviorCheck, check_behavior, diagnose
from klippo.ppo.experience import Experience, Forward, build_experience
from klippo.ppo.learner import Learner
from klippo.ranks import Ranks
from klippo.rewards.settings import ColumnSettings
from klippo.rewards.simple import ColumnReward
from klippo.rollouts.collate import stop_token_ids
from klippo.rollouts.sources import LoggedSource
from klippo.tensors.estimators import RunningMoments
from klippo.types import Behavior, LoggedResponse, Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """The responses of the data, read and checked before any model is loaded."""

    train: list[ScoredResponse]
    held_out: list[ScoredResponse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What is known after a pass."""

    metrics: Metrics
    warnings: list[str]
    stop: str | None
    """Why the run should end here."""


def read_logged(config: RunConfig, rows: Sequence[Row], held_out: Sequence[Row]) -> Logged:
    """Read and check the responses. Raises ConfigError."""
    assert config.offline is not None
    assert isinstance(config.reward, ColumnSettings)
    train, other = (
        read_responses(
            some,
            config.offline,
            reward_column=config.reward.column,
            prompt_columns=config.data.prompt_columns,
        )
        for some in (rows, held_out)
    )
    refuse_equal_rewards(train, config.reward.column)
    return Logged(train=train, held_out=other)


class OfflineData:
    """Logged responses as the policy reads them."""

    def __init__(
        self, config: RunConfig, logged: Logged, loaded: LoadedPolicy, device: torch.device
    ) -> None:
        """Tokenize, and settle `ppo`. Raises ConfigError."""
        assert config.offline is not None
        assert isinstance(config.reward, ColumnSettings)
        self.config, self.offline = config, config.offline
        self._loaded, self._device = loaded, device
        self.reward = ColumnReward(config.reward.column)
        self.train = self._log(logged.train)
        self.held_out = self._log(logged.held_out)
        if config.ppo.batch_size > len(self.train):
            raise ConfigError(
                f"ppo.batch_size={config.ppo.batch_size} is more than the {len(self.train)} "
                "responses there are; make it smaller"
            )
        settled: dict[str, float] = {"num_steps": self.num_steps}
        if self.offline.baseline == "leave_one_out":
            settled["value_coef"] = 0.0  # there is no critic to train
        self.ppo = config.ppo.model_copy(update=settled)
        """The run's PPO settings, with what the data settles."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """What ends a response."""
        rollout, model = self.config.rollout, self._loaded.policy.lm.model
        return stop_token_ids(
            self._loaded.tokenizer,
            getattr(model, "generation_config", None),
            at_eos=True,
            extra=rollout.stop_tokens,
        )

    @property
    def num_steps(self) -> int:
        """Batches until every response was learnt from `num_passes` times."""
        return math.ceil(len(self.train) * self.offline.num_passes / self.config.ppo.batch_size)

    @property
    def pass_ends(self) -> frozenset[int]:
        """Steps before which a pass began or ended."""
        per_pass = len(self.train) / self.config.ppo.batch_size
        return frozenset(math.ceil(n * per_pass) for n in range(self.offline.num_passes + 1))

    @property
    def behavior(self) -> Behavior:
        return "recorded" if self.offline.behavior == "recorded" else "start"

    def sampler(self, ranks: Ranks | None = None) -> PromptSampler[LoggedResponse]:
        """All responses, in shuffled passes; of each batch this process's share."""
        ranks = ranks or Ranks()
        return PromptSampler(
            self.train,
            self.config.ppo.batch_size,
            self.config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )

    def look(self, learner: Learner, step: int) -> Diagnosis:
        """What is to be known at the start and after each pass; the same on every process."""
        number, seed = max(self.config.evaluation.num_prompts, 1), self.config.seed
        metrics: Metrics = {}
        warnings: list[str] = []
        for name, responses in {"": self.train, "held_out_": self.held_out}.items():
            if not responses:
                continue
            shown = _some(responses, number, seed)
            forward, experience = self._run(learner, shown)
            found = diagnose(learner.ppo, experience, forward)
            found |= _likelihoods(shown, forward, experience)
            if self.offline.baseline == "value":
                explained = experience.metrics["value/explained_variance"]
                found["offline/explained_variance"] = explained
            metrics |= {key.replace("/", f"/{name}", 1): value for key, value in found.items()}
            if step == 0 and not name:
                check = check_behavior(self.behavior, experience, forward)
                metrics["offline/behavior_check"] = check.mean
                metrics["offline/behavior_check_se"] = check.standard_error
                if check.is_suspicious and self.offline.behavior != "unknown":
                    warnings.append(self._suspicion(check))
        return Diagnosis(metrics=metrics, warnings=warnings, stop=self._stop(metrics))

    def _run(
        self, learner: Learner, responses: Sequence[LoggedResponse]
    ) -> tuple[Forward, Experience]:
        rollout = self.source(list).rollout(responses)
        forward = learner.forward(rollout)
        experience = build_experience(
            learner.ppo,
            learner.kl,
            learner.score,
            rollout,
            forward,
            self.reward.score(rollout),
            kl_coef=learner.kl_controller.coef,
            moments=RunningMoments(),
            ranks=Ranks(),
        )
        return forward, experience

    def _suspicion(self, check: BehaviorCheck) -> str:
        told = f"{check.mean:+.3g} per response, standard error {check.standard_error:.2g}"
        if self.behavior == "recorded":
            return (
                "the recorded log-probs are not those of the policy that wrote these responses "
                f"(the mean of pi/b - 1 should be 0 and is {told}), so ratios start from the wrong "
                "place; check their order, tokens, temperature and the base of the logarithm, or "
                "use behavior: unknown"
            )
        return (
            "these responses were not written by the policy that training starts from (the mean of "
            f"its log-prob plus entropy should be 0 and is {told}), so training is anchored and "
            "off-policy: ratios tell how far the policy moves, not how likely it is to write these "
            "responses; check adapter, template and temperature, or use behavior: unknown"
        )

    def _stop(self, metrics: Metrics) -> str | None:
        ess, kl = metrics["offline/ess_tokens"], metrics["offline/kl_start_nats"]
        if self.offline.min_ess is not None and ess < self.offline.min_ess:
            return f"the effective share of tokens is {ess:.2f}, below {self.offline.min_ess:g}"
        if self.offline.max_kl is not None and kl > self.offline.max_kl:
            return f"the KL from the start is {kl:.2f} nats, above {self.offline.max_kl:g}"
        return None

    def source(self, next_responses: Callable[[], list[LoggedResponse]]) -> LoggedSource:
        """Responses as rollouts."""
        return LoggedSource(
            next_responses=next_responses,
            tokenizer=self._loaded.tokenizer,
            temperature=self.config.rollout.temperature,
            behavior=self.behavior,
            device=self._device,
        )

    def _log(self, responses: Sequence[ScoredResponse]) -> list[LoggedResponse]:
        config, model = self.config, self._loaded.policy.lm.model
        assert isinstance(config.reward, ColumnSettings)
        context = context_length(model)
        rows = list({answer.row.number: answer.row for answer in responses}.values())
        limit = config.data.max_prompt_tokens or (2**31 if context is None else context - 1)
        prompts = build_prompts(
            rows,
            config.data,
            self._loaded.tokenizer,
            max_prompt_tokens=limit,
            seed=config.seed,
        )
        return log_responses(
            responses,
            prompts,
            self._loaded.tokenizer,
            self.offline,
            reward_column=config.reward.column,
            prompt_columns=config.data.prompt_columns,
            stop_ids=self.stop_ids,
            context=context,
        )


def _some(responses: list[LoggedResponse], number: int, seed: int) -> list[LoggedResponse]:
    if len(responses) <= number:
        return responses
    chosen = sorted(random.Random(f"{seed}:diagnosis").sample(range(len(responses)), number))
    return [responses[i] for i in chosen]


def _likelihoods(
    responses: Sequence[LoggedResponse], forward: Forward, experience: Experience
) -> Metrics:
    """Negative log-likelihood of responses with rewards above and below the median."""
    mask = experience.mask
    nll = (-(forward.logprobs * mask).sum(1) / mask.sum(1)).tolist()
    middle = statistics.median(one.reward for one in responses)
    pairs = [(one.reward, value) for one, value in zip(responses, nll, strict=True)]
    sides = {
        "good": [value for reward, value in pairs if reward > middle],
        "bad": [value for reward, value in pairs if reward < middle],
    }
    return {
        f"offline/nll_{side}_nats_per_token": statistics.fmean(values)
        for side, values in sides.items()
        if values
    }
