"""Scores of many samples: every reward once, in chunks on disk.

M samples, K rewards that are scored together.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from klippo.errors import ConfigError
from klippo.evaluation.history import Floats
from klippo.evaluation.samples import rollout_of
from klippo.lab.reward_names import functions_in, reward_label
from klippo.lab.sample_files import Meter, Samples
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
from klippo.types import Rollout

SCORES_DIR = "scores"
CHUNK = 512
"""Samples between two writes: what a killed command scores again."""

Score = Callable[[Rollout], Tensor]
"""A rollout of B samples -> (K, B)."""


def score_samples(
    samples: Samples,
    rewards: Mapping[str, RewardSettings],
    folder: Path,
    console: Console,
    *,
    device: torch.device,
) -> dict[str, Floats]:
    """Scores (M,) by key, NaN for unscored; what `folder` has already is not scored again.

    Raises ConfigError for a reward that reads token ids where the samples have none.
    """
    total = len(samples.prompt_of_sample)
    if not samples.has_ids:
        for settings in rewards.values():
            _check_reads_text(settings)
    known = {key: _read(folder / f"{key}.jsonl") for key in rewards}
    pending = {key: rewards[key] for key, values in known.items() if len(values) < total}
    for keys, score in _together(pending, device):
        start = min(len(known[key]) for key in keys)
        for key in keys:
            if len(known[key]) > start:  # a kill came between two members' chunks
                known[key] = known[key][:start]
                write_rows(folder / f"{key}.jsonl", [{"scores": _json(known[key])}])
        by = reward_label(rewards[keys[0]]) if len(keys) == 1 else f"{len(keys)} models at once"
        meter = Meter(console, f"scored by {by}:", start, total)
        rows = samples.read(start)
        while chunk := list(itertools.islice(rows, CHUNK)):
            rollout = rollout_of(chunk, [samples.prompts[row["prompt"]] for row in chunk])
            for key, values in zip(keys, score(rollout).tolist(), strict=True):
                append_lines(folder / f"{key}.jsonl", [{"scores": _json(values)}])
                known[key] += values
            meter.show(len(known[keys[0]]))
        del score
    return {key: np.array(values[:total], dtype=np.float64) for key, values in known.items()}


def _together(
    rewards: Mapping[str, RewardSettings], device: torch.device
) -> Iterator[tuple[list[str], Score]]:
    """Rewards as they are scored: classifiers in one pass over the texts, the others in turn.

    Each is loaded when its turn comes.
    """
    family: dict[str, tuple[str, ClassifierSettings]] = {}
    alone: dict[str, RewardSettings] = {}
    for key, settings in rewards.items():
        if isinstance(settings, ClassifierSettings) and settings.model not in family:
            family[settings.model] = (key, settings)
        else:
            alone[key] = settings
    if family:
        members = [MemberSettings(**one.model_dump(exclude={"kind"})) for _, one in family.values()]
        ensemble = EnsembleSettings(kind="ensemble", members=list(members), standardize="none")
        yield [key for key, _ in family.values()], _score_members(ensemble, device)
    for key, settings in alone.items():
        yield [key], _score_alone(settings, device)


def _score_members(settings: EnsembleSettings, device: torch.device) -> Score:
    source = build_reward(settings, device=device)

    def score(rollout: Rollout) -> Tensor:
        members = resolve_scores(source, rollout).members
        assert members is not None
        return members

    return score


def _score_alone(settings: RewardSettings, device: torch.device) -> Score:
    source = build_reward(settings, device=device)
    return lambda rollout: resolve_scores(source, rollout).reward[None]


def _check_reads_text(settings: RewardSettings) -> None:
    names_ids = any(
        "token_ids" in inspect.signature(load_function(name)).parameters
        for name in functions_in(settings)
    )
    parts = settings.parts.values() if isinstance(settings, SumSettings) else []
    for part in parts:
        _check_reads_text(part.reward)
    if names_ids or isinstance(settings, LengthSettings | RepetitionSettings):
        raise ConfigError(
            f"{reward_label(settings)} reads token ids, and the samples have none; sample from a "
            "policy, or use a reward that reads text"
        )


def _read(file: Path) -> list[float]:
    whole_lines(file)  # without the line that a kill cut
    rows = read_rows(file) if file.is_file() else []
    values = itertools.chain.from_iterable(row["scores"] for row in rows)
    return [float("nan") if value is None else value for value in values]


def _json(values: list[float]) -> list[float | None]:
    return [None if value != value else value for value in values]  # NaN
