"""The objects of a run, built from what `prepare` checked."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from klippo.config.schema import RunConfig
from klippo.data.files import Row
from klippo.data.prompts import build_prompts
from klippo.data.rows import as_rows
from klippo.data.sampler import PromptSampler, pick
from klippo.errors import ConfigError
from klippo.lab.fingerprints import of_prompts, of_weights
from klippo.lengths import room_for_prompts
from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.policy.loading import LoadedPolicy, load_policy
from klippo.policy.sharding import full_weights
from klippo.ppo.learner import Learner
from klippo.ppo.settings import PPOSettings
from klippo.ranks import Ranks
from klippo.rewards.combined import SumReward
from klippo.rewards.ensemble import EnsembleReward
from klippo.rewards.judged import judge_metrics, shared, yardstick
from klippo.rewards.resolve import begin_with, close_source, resolve_scores
from klippo.rewards.settings import EnsembleSettings, RewardSettings, SumSettings
from klippo.rollouts.collate import stop_token_ids
from klippo.rollouts.sources import OnlineSource, OnResponse, Sampler
from klippo.train.engines import build_engine
from klippo.train.offline import OfflineData
from klippo.train.prepare import Prepared
from klippo.types import (
    Metrics,
    Prompt,
    RewardSource,
    Rollout,
    RolloutSource,
    Scores,
    Stateful,
    Tokenizer,
    stateful,
)


class Stream(IntEnum):
    """Added to the run's seed, so that each use of sampling draws random numbers of its own."""

    TRAINING = 0
    EVALUATION = 1_000_003
    REFERENCE = 2_000_003
    EARLY_STOP = 3_000_017


class RunReward:
    """The training reward of a run, and the same on a fixed scale for its evaluations."""

    def __init__(
        self, source: RewardSource, ranks: Ranks, evaluators: Ranks, *, skips_not_finite: bool
    ) -> None:
        """`evaluators` are the processes that share an evaluation."""
        self.source = shared(source, ranks)
        self.fixed = yardstick(self.source, evaluators)
        self._skips_not_finite = skips_not_finite

    def score(self, rollout: Rollout) -> Scores:
        """The training reward of a rollout."""
        return resolve_scores(self.source, rollout, skip_not_finite=self._skips_not_finite)

    def score_fixed(self, rollout: Rollout) -> Scores:
        """The reward on a scale that does not move while the policy trains."""
        return resolve_scores(self.fixed, rollout, skip_not_finite=self._skips_not_finite)

    def metrics(self) -> Metrics:
        """What judges counted since the last call; the first process knows it."""
        return judge_metrics(self.source)

    def close(self) -> None:
        """Stop waiting for answers, after a failure."""
        close_source(self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Online:
    """The prompts and the sampling of a run that samples."""

    source: OnlineSource
    seed: int
    train_prompts: list[Prompt]
    evaluation_prompts: list[Prompt]
    evaluation_share: range
    """Which evaluation prompts this process answers."""
    spare_prompts: list[Prompt]
    """Prompts beside the evaluation set: held-out ones, else those for training."""
    on_evaluation_response: OnResponse | None

    def evaluation_responses(self) -> Rollout:
        """Responses to this process's share, with the same random numbers at every step."""
        share = self.evaluation_share
        prompts = self.evaluation_prompts[share.start : share.stop]
        return self.source.sampler.sample(
            prompts, self.seed + Stream.EVALUATION, share, self.on_evaluation_response
        )

    def early_stop_responses(self, prompts: Sequence[Prompt]) -> Rollout:
        """Responses of this process alone, with the same random numbers at every step."""
        seed = self.seed + Stream.EARLY_STOP
        return self.source.sampler.sample(prompts, seed, range(len(prompts)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The objects of a run."""

    run: Prepared
    config: RunConfig
    """As it was given; `resolved` has what was measured."""
    device: torch.device
    ranks: Ranks
    tokenizer: Tokenizer
    policy: ActorCritic
    reference: Reference
    learner: Learner
    reward: RunReward
    source: RolloutSource
    online: Online | None
    offline: OfflineData | None
    stop_ids: frozenset[int]
    resolved: RunConfig
    """The config with what the data and the starting policy settled, for config.yaml."""
    fingerprints: Mapping[str, str]
    """Of the model and of the data that the run began with."""
    states: Mapping[str, Stateful]
    """What beside the learner has a state to keep from step to step."""

    def score(self, rollout: Rollout) -> Scores:
        """The training reward; an error in one process is raised in all."""
        return self.ranks.everywhere(lambda: self.reward.score(rollout))

    def prompts(self, raw: Sequence[Any]) -> list[Prompt]:
        """Raw prompts (text, chat messages or mappings of columns) as the policy reads them."""
        rows = as_rows(raw, self.config.data.prompt_columns)
        return _prompts(self.config, rows, self.policy, self.tokenizer)

    def sampling(self) -> Online:
        """The online part. Raises ConfigError for an offline run."""
        if self.online is None:
            raise ConfigError(
                "an offline run learns from the responses in its data and samples none; use klippo "
                "generate or klippo compare with its folder"
            )
        return self.online


def open_session(run: Prepared) -> Session:
    """Load the models and build everything around them. Raises what loading raises."""
    config, ranks = run.config, run.ranks
    seed_everything(config.seed)
    loaded = load_policy(
        config.policy,
        config.critic,
        run.device,
        model=run.given.model,
        tokenizer=run.given.tokenizer,
        sharding=run.sharding,
        ranks=ranks,
    )
    ranks.meet("models")
    with full_weights(loaded.reference.lm):
        model_digest = of_weights(loaded.reference.lm.model)
    if run.logged is None:
        return _open_online(run, loaded, model_digest)
    offline = OfflineData(config, run.logged, loaded, run.device)
    sampler = offline.sampler(ranks)
    return Session(
        run=run,
        config=config,
        device=run.device,
        ranks=ranks,
        tokenizer=loaded.tokenizer,
        policy=loaded.policy,
        reference=loaded.reference,
        learner=_learner(run, loaded, offline.ppo),
        reward=RunReward(run.reward, ranks, ranks, skips_not_finite=_skips_not_finite(config)),
        source=offline.source(sampler.next),
        online=None,
        offline=offline,
        stop_ids=offline.stop_ids,
        resolved=config.model_copy(update={"ppo": offline.ppo}),
        fingerprints={"data": of_prompts(r.prompt for r in offline.train), "model": model_digest},
        states={"sampler": sampler},
    )


def _open_online(run: Prepared, loaded: LoadedPolicy, model_digest: str) -> Session:
    config, ranks, tokenizer = run.config, run.ranks, loaded.tokenizer

    def prompts_of(rows: Sequence[Row]) -> list[Prompt]:
        return _prompts(config, rows, loaded.policy, tokenizer)

    train = prompts_of(run.rows)
    held_out = prompts_of(run.held_out) if run.held_out else train
    stop_ids = stop_token_ids(
        tokenizer,
        getattr(loaded.policy.lm.model, "generation_config", None),
        at_eos=config.rollout.stop_at_eos,
        extra=config.rollout.stop_tokens,
    )
    sampler = Sampler(
        engine=build_engine(config, loaded, stop_ids, [*train, *held_out]),
        tokenizer=tokenizer,
        settings=config.rollout,
        device=run.device,
    )
    measured = _measure_ensembles(config.reward, run.reward, sampler, train, config.seed)
    evaluation = pick(held_out, config.evaluation.num_prompts, config.seed)
    share, evaluators = _share_evaluation(len(evaluation), ranks)
    reward = RunReward(run.reward, ranks, evaluators, skips_not_finite=_skips_not_finite(config))
    batches = PromptSampler(
        train, config.ppo.batch_size, config.seed, rank=ranks.rank, world_size=ranks.world_size
    )
    source = OnlineSource(
        sampler,
        batches.next,
        seed=config.seed + Stream.TRAINING,
        ranks=ranks,
        on_response=begin_with(reward.source),
    )
    states: dict[str, Stateful] = {"sampler": batches, "responses": source}
    for name, part in {"reward": reward.source, "yardstick": reward.fixed}.items():
        if (state := stateful(part)) is not None:
            states[name] = state
    return Session(
        run=run,
        config=config,
        device=run.device,
        ranks=ranks,
        tokenizer=tokenizer,
        policy=loaded.policy,
        reference=loaded.reference,
        learner=_learner(run, loaded, config.ppo),
        reward=reward,
        source=source,
        online=Online(
            source=source,
            seed=config.seed,
            train_prompts=train,
            evaluation_prompts=evaluation,
            evaluation_share=share,
            spare_prompts=held_out,
            on_evaluation_response=begin_with(reward.fixed),
        ),
        offline=None,
        stop_ids=stop_ids,
        resolved=config.model_copy(update={"reward": measured}),
        fingerprints={"data": of_prompts(train), "model": model_digest},
        states=states,
    )


def seed_everything(seed: int) -> None:
    """Seed the generators that rewards and libraries draw from; the run's have their own seeds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _learner(run: Prepared, loaded: LoadedPolicy, ppo: PPOSettings) -> Learner:
    config = run.config
    return Learner(
        loaded.policy,
        loaded.reference,
        ppo=ppo,
        kl=config.kl,
        score=config.score,
        optimizer=config.optimizer,
        seed=config.seed,
        ranks=run.ranks,
    )


def _prompts(
    config: RunConfig, rows: Sequence[Row], policy: ActorCritic, tokenizer: Any
) -> list[Prompt]:
    room = room_for_prompts(
        policy.lm.model,
        config.rollout.response_length if config.offline is None else 1,
        config.data.max_prompt_tokens,
    )
    return build_prompts(rows, config.data, tokenizer, max_prompt_tokens=room, seed=config.seed)


def _skips_not_finite(config: RunConfig) -> bool:
    return config.health.reward_not_finite == "skip"


def _share_evaluation(num_prompts: int, ranks: Ranks) -> tuple[range, Ranks]:
    """This process's share of the prompts, and the processes that evaluate.

    The first process evaluates alone if some would have no prompt.
    """
    if num_prompts >= ranks.world_size:
        return ranks.share(num_prompts), ranks
    return range(num_prompts if ranks.is_main else 0), Ranks()


def _measure_ensembles(
    settings: RewardSettings,
    source: RewardSource,
    sampler: Sampler,
    prompts: list[Prompt],
    seed: int,
) -> RewardSettings:
    """Put the members of every waiting ensemble on one scale, measured on the starting policy.

    Returns the settings with what was measured; without such an ensemble nothing is sampled.
    """
    if isinstance(source, EnsembleReward) and source.waits_for_moments:
        number = source.settings.reference_size
        chosen = pick(prompts, number, seed)
        asked = [chosen[i % len(chosen)] for i in range(number)]
        rollout = sampler.sample(asked, seed + Stream.REFERENCE, range(number))
        moments = source.measure(rollout.prompts, rollout.responses)
        if isinstance(settings, EnsembleSettings):
            return settings.model_copy(update={"moments": moments})
    if isinstance(source, SumReward) and isinstance(settings, SumSettings):
        parts = {
            name: part.model_copy(
                update={
                    "reward": _measure_ensembles(
                        part.reward, source.parts[name].source, sampler, prompts, seed
                    )
                }
            )
            for name, part in settings.parts.items()
        }
        return settings.model_copy(update={"parts": parts})
    return settings
