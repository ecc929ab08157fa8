"""Scores of many samples: every reward once, in chunks on disk.

M samples, K rewards that are scored together.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from klippo.errors import ConfigError
from klippo.evaluation.history import Floats
from klippo.evaluation.samples import known, rollout_of
from klippo.lab.reward_names import functions_in, reward_label
from klippo.lab.sample_files import Samples, show
from klippo.rewards.build import build_reward
from klippo.rewards.loading import load_function
from klippo.rewards.resolve import resolve_scores
from klippo.rewards.settings import (
    ClassifierSettings,
    EnsembleSettings,
    LengthSettings,
    MemberSettings,
    RepetitionSettings,
    RewardSettings,
    SumSettings,
)
from klippo.runs.folder import read_rows, write_rows
from klippo.runs.lines import append_lines, whole_lines
from klippo.runs.progress import LiveLine
from klippo.types import Rollout

SCORES_DIR = "scores"
CHUNK = 512
"""Samples between two writes: what a killed command scores again."""


def score_samples(
    samples: Samples,
    rewards: Mapping[str, RewardSettings],
    folder: Path,
    console: Console,
    *,
    device: torch.device,
) -> dict[str, Floats]:
    """Scores (M,) by key, NaN for unscored; what `folder` has already is not scored again.

    Raises ConfigError for a reward that reads token ids if the samples have none.
    """
    total = len(samples.prompt_of_sample)
    if not samples.has_ids:
        for settings in rewards.values():
            _check_reads_text(settings)
    scores = {key: _read(folder / f"{key}.jsonl") for key in rewards}
    missing = {key: rewards[key] for key, values in scores.items() if len(values) < total}
    for group in _together(missing):
        start = min(len(scores[key]) for key in group)
        for key in group:
            if len(scores[key]) > start:  # a kill came between two members' chunks
                scores[key] = scores[key][:start]
                write_rows(folder / f"{key}.jsonl", [{"scores": scores[key]}])
        labels = [reward_label(settings) for settings in group.values()]
        by = labels[0] if len(group) == 1 else f"{len(group)} models at once"
        score = _scorer(list(group.values()), device)
        rows = samples.read(start)
        with LiveLine(console, num_lines=10, num_done=start) as line:
            while chunk := list(itertools.islice(rows, CHUNK)):
                rollout = rollout_of(chunk, [samples.prompts[row["prompt"]] for row in chunk])
                for key, values in zip(group, score(rollout), strict=True):
                    append_lines(folder / f"{key}.jsonl", [{"scores": known(values)}])
                    scores[key] += known(values)
                start += len(chunk)
                show(line, f"scored by {by}:", start, total)
        del score  # before the next model is loaded
    return {key: np.array(values[:total], dtype=np.float64) for key, values in scores.items()}


def _together(rewards: Mapping[str, RewardSettings]) -> list[dict[str, RewardSettings]]:
    """Rewards as they are scored: classifiers in one pass over the texts, the others in turn."""
    models: set[str] = set()
    family: dict[str, RewardSettings] = {}
    alone: list[dict[str, RewardSettings]] = []
    for key, settings in rewards.items():
        if isinstance(settings, ClassifierSettings) and settings.model not in models:
            models.add(settings.model)
            family[key] = settings
        else:
            alone.append({key: settings})
    return [family, *alone] if family else alone


def _scorer(rewards: list[RewardSettings], device: torch.device) -> Callable[[Rollout], Tensor]:
    """A function from a rollout of B samples to (K, B) scores; several rewards are classifiers."""
    if len(rewards) == 1:
        single = build_reward(rewards[0], device=device)
        return lambda rollout: resolve_scores(single, rollout).reward[None]
    members = [MemberSettings(**one.model_dump(exclude={"kind"})) for one in rewards]
    ensemble = build_reward(
        EnsembleSettings(kind="ensemble", members=[*members], standardize="none"), device=device
    )

    def score(rollout: Rollout) -> Tensor:
        scores = resolve_scores(ensemble, rollout).members
        assert scores is not None
        return scores

    return score


def _check_reads_text(settings: RewardSettings) -> None:
    if isinstance(settings, SumSettings):
        for part in settings.parts.values():
            _check_reads_text(part.reward)
    if isinstance(settings, LengthSettings | RepetitionSettings) or any(
        "token_ids" in inspect.signature(load_function(name)).parameters
        for name in functions_in(settings)
    ):
        raise ConfigError(
            f"{reward_label(settings)} reads token ids, and the samples have none; sample from a "
            "policy, or use a reward that reads text"
        )


def _read(file: Path) -> list[float | None]:
    whole_lines(file)  # without the line that a kill cut
    rows = read_rows(file) if file.is_file() else []
    return [value for row in rows for value in row["scores"]]
