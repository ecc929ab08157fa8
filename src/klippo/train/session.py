"""Everything that one run needs, put together from its config."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from klippo.config.schema import RunConfig
from klippo.data.files import Row
from klippo.data.prompts import build_prompts
from klippo.data.rows import Data, as_rows, load_rows, train_source, validation_source
from klippo.data.sampler import PromptSampler, pick
from klippo.errors import ConfigError
from klippo.judge.reward import JudgeReward
from klippo.lab.fingerprints import of_prompts, of_weights
from klippo.lab.reward_names import check_reward
from klippo.lengths import room_for_prompts
from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.policy.loading import load_policy
from klippo.policy.sharding import full_weights
from klippo.ppo.learner import Learner, require_equal_shares
from klippo.ranks import Ranks, choose_device
from klippo.rewards.build import build_reward
from klippo.rewards.combined import SumReward, yardstick
from klippo.rewards.function import FunctionReward
from klippo.rewards.judged import judge_metrics, over_processes
from klippo.rewards.resolve import begin_with, close_source, resolve_scores
from klippo.rollouts.collate import stop_token_ids
from klippo.rollouts.sources import OnlineSource
from klippo.train.engines import build_engine, check_engine_settings
from klippo.train.launch import choose_sharding
from klippo.train.moments import REFERENCE_SEED, measure_members
from klippo.train.offline import OfflineData, read_logged
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

EVALUATION_SEED = 1_000_003
"""Added to the run's seed, so that evaluation draws the same random numbers at every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The objects of a run."""

    config: RunConfig
    device: torch.device
    ranks: Ranks
    tokenizer: Tokenizer
    policy: ActorCritic
    reference: Reference
    learner: Learner
    source: RolloutSource
    score: Callable[[Rollout], Scores]
    """The training reward."""
    close_reward: Callable[[], None]
    """Ends what the reward still waits for; after a failure."""
    reward_metrics: Callable[[], Metrics]
    """What the reward says about itself, since the last call."""
    measure: Callable[[Rollout], Scores]
    """The same for evaluation, on a scale that stays."""
    stop_ids: frozenset[int]
    stateful: Mapping[str, Stateful]
    """What beside the learner remembers something from step to step."""
    fingerprints: Mapping[str, str]
    """Of the model and of the data that the run began with."""
    answer_evaluation: Callable[[], Rollout]
    """Answers to this process's share, each with the same random numbers at every step."""
    answer: Callable[[list[Prompt]], Rollout]
    """Responses to prompts, numbered as the run's next."""
    answer_alone: Callable[[list[Prompt], int], Rollout]
    """Responses to prompts under a seed, in this process."""
    prepare: Callable[[Sequence[Any]], list[Prompt]]
    """Raw prompts (text or chat messages) as the policy reads them."""
    evaluation_prompts: list[Prompt] = field(default_factory=list)
    evaluation_share: range = range(0)
    """Which of them this process answers."""
    spare_prompts: list[Prompt] = field(default_factory=list)
    """Where prompts beside the evaluation set come from: held-out ones, else those to train on."""
    offline: OfflineData | None = None
    """Where the run learns from responses that exist already."""


def open_session(
    config: RunConfig,
    *,
    model: Any | None = None,
    tokenizer: Tokenizer | None = None,
    reward: RewardSource | Callable[..., Any] | None = None,
    prompts: Sequence[Any] | None = None,
    data: Data | None = None,
) -> Session:
    """Build a run. Objects given here stand in for what the config names.

    `data` is what `load_rows` gave, where it was called before.

    What is cheap to check comes first: the data before the models.
    """
    device = choose_device(config.device)
    skips_not_finite = config.health.reward_not_finite == "skip"
    ranks = Ranks.from_environment(device, config.peer_timeout_s)
    sharding = choose_sharding(config, ranks)
    require_equal_shares(config.ppo, ranks)
    check_engine_settings(config.rollout, device, ranks)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if prompts is None:
        rows, held_out = data or load_rows(config.data, config.seed)
    else:
        rows, held_out = as_rows(prompts, config.data.prompt_columns), []
    logged = None if config.offline is None else read_logged(config, rows, held_out)
    source = _reward_source(config, reward, device, ranks)
    if isinstance(source, FunctionReward | JudgeReward | SumReward):
        source.check_columns(rows[0].columns)
    if config.gold is not None:
        check_reward(config.gold, rows[0].columns)
    seed_everything(config.seed)
    loaded = load_policy(
        config.policy,
        config.critic,
        device,
        model=model,
        tokenizer=tokenizer,
        sharding=sharding,
        ranks=ranks,
    )
    ranks.meet("models")
    tokenizer, hf_model = loaded.tokenizer, loaded.policy.lm.model
    longest = config.rollout.response_length if config.offline is None else 1
    room = room_for_prompts(hf_model, longest, config.data.max_prompt_tokens)

    def prepare(rows: Sequence[Row], name: str) -> list[Prompt]:
        return build_prompts(
            rows, config.data, tokenizer, max_prompt_tokens=room, seed=config.seed, source=name
        )

    offline = None if logged is None else OfflineData(config, logged, loaded, device)
    if offline is not None:
        config = offline.config
    learner = Learner(
        loaded.policy,
        loaded.reference,
        ppo=config.ppo,
        kl=config.kl,
        score=config.score,
        optimizer=config.optimizer,
        seed=config.seed,
        ranks=ranks,
    )
    common: dict[str, Any] = {
        "device": device,
        "ranks": ranks,
        "tokenizer": tokenizer,
        "policy": loaded.policy,
        "reference": loaded.reference,
        "learner": learner,
        "score": lambda rollout: resolve_scores(source, rollout, skip_not_finite=skips_not_finite),
        "close_reward": lambda: close_source(source),
        "reward_metrics": lambda: over_processes(judge_metrics(source), ranks),
        "prepare": lambda raw: prepare(as_rows(raw, config.data.prompt_columns), "prompts"),
    }
    with full_weights(loaded.reference.lm):
        model_digest = of_weights(loaded.reference.lm.model)
    if offline is not None:
        responses = offline.sampler(ranks)
        return Session(
            config=config,
            source=offline.source(responses.next),
            stateful={"sampler": responses},
            fingerprints={
                "data": of_prompts(p.prompt for p in offline.train),
                "model": model_digest,
            },
            stop_ids=offline.stop_ids,
            offline=offline,
            measure=_samples_nothing,
            answer=_samples_nothing,
            answer_evaluation=_samples_nothing,
            answer_alone=_samples_nothing,
            **common,
        )
    train_prompts = prepare(rows, train_source(config.data))
    held_out_prompts = (
        prepare(held_out, validation_source(config.data)) if held_out else train_prompts
    )
    sampler = PromptSampler(
        train_prompts,
        config.ppo.batch_size,
        config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    stop_ids = stop_token_ids(
        tokenizer,
        getattr(hf_model, "generation_config", None),
        at_eos=config.rollout.stop_at_eos,
        extra=config.rollout.stop_tokens,
    )
    engine = build_engine(config, loaded, stop_ids, [*train_prompts, *held_out_prompts])
    evaluation_prompts = pick(held_out_prompts, config.evaluation.num_prompts, config.seed)
    share, evaluators = _share_evaluation(len(evaluation_prompts), ranks)
    fixed = yardstick(source, evaluators.all_sum_or_fail)

    def source_with(next_prompts: Callable[[], list[Prompt]], seed: int) -> OnlineSource:
        return OnlineSource(
            next_prompts,
            engine,
            tokenizer,
            config.rollout,
            seed=seed,
            device=device,
            ranks=ranks,
            on_response=begin_with(source),
        )

    def reference_responses(number: int) -> Rollout:
        chosen = pick(train_prompts, number, config.seed)
        asked = [chosen[i % len(chosen)] for i in range(number)]
        return source_with(list, config.seed + REFERENCE_SEED).answer_as(asked, range(number))

    measured = measure_members(config.reward, source, reference_responses)
    config = config.model_copy(update={"reward": measured})
    training_source = source_with(sampler.next, config.seed)
    evaluation_source = source_with(list, config.seed + EVALUATION_SEED)
    parts: dict[str, Any] = {
        "sampler": sampler,
        "responses": training_source,
        "reward": source,
        "yardstick": fixed,
    }
    return Session(
        config=config,
        source=training_source,
        stateful={
            name: found for name, part in parts.items() if (found := stateful(part)) is not None
        },
        fingerprints={"data": of_prompts(train_prompts), "model": model_digest},
        answer=training_source.answer,
        measure=lambda rollout: resolve_scores(fixed, rollout, skip_not_finite=skips_not_finite),
        stop_ids=stop_ids,
        evaluation_prompts=evaluation_prompts,
        evaluation_share=share,
        answer_evaluation=lambda: evaluation_source.answer_as(
            evaluation_prompts[share.start : share.stop], share, begin_with(fixed)
        ),
        spare_prompts=held_out_prompts,
        answer_alone=lambda prompts, seed: source_with(list, seed).answer_as(
            prompts, range(len(prompts))
        ),
        **common,
    )


def seed_everything(seed: int) -> None:
    """The generators that rewards and libraries draw from; the run's own have their own seeds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _samples_nothing(*_: Any) -> Any:
    raise ConfigError(
        "an offline run learns from the responses in its data and samples none; use klippo "
        "generate or klippo compare with its folder"
    )


def _share_evaluation(num_prompts: int, ranks: Ranks) -> tuple[range, Ranks]:
    """This process's part of the prompts, and the processes that evaluate.

    The first evaluates alone where some would have no prompt.
    """
    if num_prompts >= ranks.world_size:
        return ranks.share(num_prompts), ranks
    return range(num_prompts if ranks.is_main else 0), Ranks()


def _reward_source(
    config: RunConfig,
    reward: RewardSource | Callable[..., Any] | None,
    device: torch.device,
    ranks: Ranks,
) -> RewardSource:
    if reward is None:
        return build_reward(
            config.reward,
            device=device,
            prompt_column=config.data.prompt_columns[0],
            ranks=ranks,
            account=config.output_dir,
        )
    return reward if hasattr(reward, "score") else FunctionReward(reward)
