"""Before a model is loaded: every cheap check of a run, once, with one typed result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from klippo.config.load import LoadedConfig
from klippo.config.schema import RunConfig
from klippo.config.trust import trust_code
from klippo.data.files import Row
from klippo.data.rows import as_rows, load_rows
from klippo.errors import ConfigError
from klippo.judge.reward import JudgeReward
from klippo.lab.reward_names import check_reward
from klippo.policy.settings import Sharding
from klippo.ppo.learner import require_equal_shares
from klippo.ranks import Ranks, choose_device, warn
from klippo.rewards.build import build_reward
from klippo.rewards.combined import SumReward
from klippo.rewards.function import FunctionReward
from klippo.train.dry_run_plan import agree_to_cost
from klippo.train.engines import check_engine_settings
from klippo.train.launch import choose_sharding
from klippo.train.memory import check_weights
from klippo.train.offline import Logged, read_logged
from klippo.types import RewardSource, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Objects from Python that replace what the config names."""

    model: Any | None = None
    tokenizer: Tokenizer | None = None
    reward: RewardSource | Callable[..., Any] | None = None
    prompts: Sequence[Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that passed every cheap check, ready to load its models."""

    config: RunConfig
    name: str = "run"
    origins: dict[str, str] = field(default_factory=dict)
    """Who set each value of the config."""
    device: torch.device
    ranks: Ranks
    sharding: Sharding
    rows: list[Row]
    held_out: list[Row]
    """Rows kept out of training; may be empty."""
    logged: Logged | None
    """The responses of an offline run."""
    reward: RewardSource
    given: Given


def prepare(
    loaded: LoadedConfig,
    given: Given | None = None,
    *,
    trust_remote_code: bool = False,
    confirm_cost: bool = False,
) -> Prepared:
    """Check everything that needs no policy; the cheapest check comes first.

    `confirm_cost` asks on the terminal before a judge that may cost much. Raises ConfigError,
    PreflightError, or what opening a judge raises.
    """
    config, given = loaded.config, given or Given()
    if given.model is not None and given.tokenizer is None:
        raise ConfigError(
            "a policy given as a model needs its tokenizer: PPOTrainer(…, tokenizer=…)"
        )
    trust_code(config, trust_remote_code)
    device = choose_device(config.device)
    ranks = Ranks.from_environment(device, config.peer_timeout_s)
    sharding = choose_sharding(config, ranks)
    require_equal_shares(config.ppo, ranks)
    for note in config.ppo.notes():
        warn(note)
    check_engine_settings(config.rollout, device, ranks)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    rows, held_out = _rows(config, given)
    logged = None if config.offline is None else read_logged(config, rows, held_out)
    if confirm_cost:
        ranks.on_main(lambda: agree_to_cost(config, (rows, held_out)))
    if given.model is None:
        ranks.on_main(lambda: check_weights(config, device))
    reward = _reward(config, given, device, ranks)
    if isinstance(reward, FunctionReward | JudgeReward | SumReward):
        reward.check_columns(rows[0].columns)
    if config.gold is not None:
        check_reward(config.gold, rows[0].columns)
    return Prepared(
        config=config,
        name=loaded.name,
        origins=loaded.origins,
        device=device,
        ranks=ranks,
        sharding=sharding,
        rows=rows,
        held_out=held_out,
        logged=logged,
        reward=reward,
        given=given,
    )


def _rows(config: RunConfig, given: Given) -> tuple[list[Row], list[Row]]:
    if given.prompts is None:
        return load_rows(config.data, config.seed)
    return as_rows(given.prompts, config.data.prompt_columns), []


def _reward(config: RunConfig, given: Given, device: torch.device, ranks: Ranks) -> RewardSource:
    if given.reward is None:
        return build_reward(
            config.reward,
            device=device,
            prompt_column=config.data.prompt_columns[0],
            ranks=ranks,
            account=config.output_dir,
        )
    return given.reward if hasattr(given.reward, "score") else FunctionReward(given.reward)
