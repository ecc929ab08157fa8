"""From settings to objects: the one place that maps a reward's `kind` to its class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from klippo.errors import ConfigError, PreflightError
from klippo.ranks import Ranks
from klippo.rewards import settings as kinds
from klippo.rewards.classifier import ClassifierReward
from klippo.rewards.column import ColumnReward
from klippo.rewards.combined import Part, SumReward
from klippo.rewards.ensemble import EnsembleReward
from klippo.rewards.function import FunctionReward
from klippo.rewards.judge.client import JudgeClient
from klippo.rewards.judge.judging import judge_label
from klippo.rewards.judge.reward import JudgeReward, opening_rollout
from klippo.rewards.judge.settings import JudgeSettings
from klippo.rewards.loading import load_function
from klippo.rewards.penalties import LengthPenalty, RepetitionPenalty
from klippo.rewards.resolve import resolve_scores
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
    all_sum = (ranks or Ranks()).all_sum_or_fail
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
            return SumReward(parts, all_sum)
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
    resolve_scores(reward, opening_rollout(settings))
    return reward


def warn(text: str) -> None:
    """A warning on stderr, from the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(Text(f"Warning: {text}", style="yellow"))


def choose_device(name: str) -> torch.device:
    """The device of this process. Raises PreflightError for one that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise PreflightError(
            f"device=cuda: PyTorch {torch.__version__} finds no CUDA GPU here; use device=auto"
        )
    # Where DeepSpeed is installed, other libraries import it, and it warns that it finds no GPU.
    os.environ.setdefault("DS_ACCELERATOR", name)
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)


def longest(response_length: int | list[int]) -> int:
    """The most tokens that a response may have."""
    return response_length if isinstance(response_length, int) else response_length[1]


def context_length(model: Any) -> int | None:
    """The most tokens that the model's positions allow, where its config says so."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


def room_for_prompts(model: Any, response_length: int | list[int], limit: int | None) -> int:
    """The longest prompt, in tokens, that leaves room for the longest response.

    Raises ConfigError where none does.
    """
    context = context_length(model)
    if context is None:
        return limit or 2**31
    room = context - longest(response_length)
    if room < 1:
        raise ConfigError(
            f"rollout.response_length={response_length} leaves no room for a prompt: the model's "
            f"context is {context} tokens; use at most {context - 1}"
        )
    return room if limit is None else min(room, limit)
