"""From settings to objects: the one place that maps a reward's `kind` to its class."""

from __future__ import annotations

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
    """The reward source that the settings describe; `account` is whose budget its judges have."""
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
            if not ranks.is_main:
                return JudgeReward(settings, Nobody(), prompt_column=prompt_column)
            return open_judge(settings, prompt_column=prompt_column, account=account)
        case kinds.LengthSettings():
            return LengthPenalty(max_tokens=settings.max_tokens, min_tokens=settings.min_tokens)
        case kinds.RepetitionSettings():
            return RepetitionPenalty(ngram=settings.ngram)
        case kinds.SumSettings():
            parts = {
                name: Part(
                    source=build_reward(
                        part.reward,
                        device=device,
                        prompt_column=prompt_column,
                        ranks=ranks,
                        account=account,
                    ),
                    weight=part.weight,
                    normalize=part.normalize,
                )
                for name, part in settings.parts.items()
            }
            return SumReward(parts, ranks.all_sum_or_fail)
    raise AssertionError(f"no class for {type(settings).__name__}")


JUDGE_CACHE = Path("runs/judge.sqlite")
"""Where judges keep their answers, from the working directory, unless their settings say."""


def judge_client(settings: JudgeSettings, account: str | None = None) -> JudgeClient:
    """The way to the judge. Without an account, judges of one label share a budget."""
    return JudgeClient(settings.api, cache=JUDGE_CACHE, account=account or judge_label(settings))


def open_judge(
    settings: JudgeSettings, *, prompt_column: str = "prompt", account: str | None = None
) -> JudgeReward:
    """The judge, after its first real call and its probes: a wrong key shows here.

    Raises PreflightError, JudgeError or BudgetError.
    """
    client = judge_client(settings, account)
    reward = JudgeReward(settings, client, prompt_column=prompt_column, say=warn)
    wait_for(reward.open())
    return reward
