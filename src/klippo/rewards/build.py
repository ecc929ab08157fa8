"""From settings to objects: the one place that maps a reward's `kind` to its class."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from klippo.judge.client import JudgeClient
from klippo.judge.judging import judge_label
from klippo.judge.reward import JudgeReward
from klippo.judge.settings import JudgeSettings
from klippo.ranks import Ranks, warn
from klippo.rewards import settings as kinds
from klippo.rewards.classifier import ClassifierReward
from klippo.rewards.combined import Part, SumReward
from klippo.rewards.ensemble import EnsembleReward
from klippo.rewards.function import FunctionReward, load_function
from klippo.rewards.judged import Nobody
from klippo.rewards.resolve import wait_for
from klippo.rewards.simple import ColumnReward, LengthPenalty, RepetitionPenalty
from klippo.types import RewardSource


def build_reward(
    settings: kinds.RewardSettings,
    *,
    device: torch.device,
    prompt_column: str = "prompt",
    ranks: Ranks | None = None,
    account: str | None = None,
) -> RewardSource:
    """The reward source that the settings describe; `account` is whose budget its judges have.

    Raises what the sources raise: ConfigError, PreflightError, JudgeError or BudgetError.
    """
    ranks = ranks or Ranks()
    match settings:
        case kinds.ClassifierSettings():
            return ClassifierReward(settings, device=device, prompt_column=prompt_column)
        case kinds.ColumnSettings():
            return ColumnReward(settings.column)
        case kinds.EnsembleSettings():
            return EnsembleReward(settings, device=device, prompt_column=prompt_column)
        case kinds.FunctionSettings():
            return FunctionReward(load_function(settings.function), settings.function)
        case JudgeSettings():
            backend = judge_client(settings, account) if ranks.is_main else Nobody()
            judge = JudgeReward(settings, backend, prompt_column=prompt_column, say=warn)
            if ranks.is_main:
                wait_for(judge.open())  # the first real call and the probes: a wrong key shows here
            return judge
        case kinds.LengthSettings():
            return LengthPenalty(max_tokens=settings.max_tokens, min_tokens=settings.min_tokens)
        case kinds.RepetitionSettings():
            return RepetitionPenalty(ngram=settings.ngram)
        case kinds.SumSettings():
            build = partial(
                build_reward,
                device=device,
                prompt_column=prompt_column,
                ranks=ranks,
                account=account,
            )
            parts = {
                name: Part(source=build(of.reward), weight=of.weight, normalize=of.normalize)
                for name, of in settings.parts.items()
            }
            return SumReward(parts, ranks.all_sum_or_fail)
    raise AssertionError(f"no class for {type(settings).__name__}")


JUDGE_CACHE = Path("runs/judge.sqlite")
"""Where judges keep their answers, from the working directory, unless their settings say."""


def judge_client(settings: JudgeSettings, account: str | None = None) -> JudgeClient:
    """The way to the judge. Without an account, judges of one label share a budget."""
    return JudgeClient(settings.api, cache=JUDGE_CACHE, account=account or judge_label(settings))
