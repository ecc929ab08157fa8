"""What `klippo compare` measures answers by: rewards by name, and judges that compare directly."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from klippo.config.schema import RunConfig
from klippo.data.files import Row
from klippo.errors import ConfigError, nearest
from klippo.evaluation.comparison import Match
from klippo.evaluation.samples import known
from klippo.evaluation.style import STYLE
from klippo.judge.fencing import is_blank
from klippo.judge.reward import JudgeReward
from klippo.judge.rubric import load_rubric
from klippo.judge.settings import JudgeSettings
from klippo.lab.reward_names import check_reward, judges_in, reward_named
from klippo.rewards.build import build_reward
from klippo.rewards.resolve import resolve_scores, wait_for
from klippo.rewards.settings import ColumnSettings, RewardSettings
from klippo.types import Prompt, RewardSource, Rollout

BUILT_IN = ("length", "finished", *STYLE)
MAX_GROUPS = 12
_NAME = re.compile(r"\w[\w .-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A reward under its name."""

    name: str
    settings: RewardSettings
    source: RewardSource
    scores_alone: bool
    """Whether it can score one answer by itself."""

    @property
    def is_pairwise(self) -> bool:
        """Whether it is a judge that compares two answers directly."""
        return _reference(self.settings) is not None

    @property
    def parts(self) -> Iterable[str]:
        """Names of the criteria of a judge, or of the parts of a sum."""
        named = getattr(self.settings, "parts", None) or getattr(self.settings, "criteria", None)
        return named or ()


def _reference(settings: RewardSettings) -> str | None:
    """The column of a pairwise judge's references; None for other rewards."""
    if isinstance(settings, JudgeSettings) and settings.mode == "pairwise":
        return settings.reference_column or ""
    return None


def split_name(text: str) -> tuple[str | None, str]:
    """`helpful=judge.yaml` as (name, rest); (None, text) without a name."""
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists() or not _NAME.fullmatch(name):
        return None, text
    return name, rest


def rewards_by_name(
    given: Sequence[str], runs: Iterable[RunConfig | None]
) -> dict[str, RewardSettings]:
    """The rewards asked for; without any, the gold reward (or else the reward) of the first run.

    The rewards of an offline run are columns of its data, and say nothing of new answers.

    Raises ConfigError for an unknown reward, and for two of one name.
    """
    rewards: dict[str, RewardSettings] = {}
    for text in given:
        name, rest = split_name(text)
        if name is None:  # gold of demo:gold, org/gold, gold.yaml, rewards.yaml:gold
            name = re.sub(r"\.ya?ml$", "", re.split("[/:]", rest.rstrip("/"))[-1])
        if name in rewards or name in BUILT_IN:
            what = "two measures have this name" if name in rewards else "is a measure of its own"
            raise ConfigError(
                f"--reward {text}: {name}: {what}; give another, as in --reward NAME={rest}"
            )
        rewards[name] = reward_named(rest)
    run = next((run for run in runs if run is not None), None)
    if given or run is None or isinstance(run.reward, ColumnSettings):
        return rewards
    return {"reward": run.reward} if run.gold is None else {"gold": run.gold}


def open_measures(
    rewards: Mapping[str, RewardSettings],
    columns: Collection[str],
    *,
    device: torch.device,
    prompt_column: str,
) -> list[Measure]:
    """The rewards, checked and then loaded; `columns` are the data's.

    A pairwise judge scores alone if the data has its references. Raises ConfigError or
    PreflightError.
    """
    for settings in rewards.values():
        reference = _reference(settings)
        check_reward(settings, columns if reference is None else {*columns, reference})
    return [
        Measure(
            name=name,
            settings=settings,
            source=build_reward(settings, device=device, prompt_column=prompt_column),
            scores_alone=_reference(settings) in (None, *columns),
        )
        for name, settings in rewards.items()
    ]


def lower_is_better(rewards: Mapping[str, RewardSettings]) -> list[str]:
    """Names of the rewards with a judge whose rubric has its good end at 0."""
    return [
        name
        for name, settings in rewards.items()
        if any(load_rubric(judge.rubric_name).lower_is_better for judge in judges_in(settings))
    ]


def score_alone(measures: Sequence[Measure], rollout: Rollout) -> dict[str, list[float | None]]:
    """Name -> a score per answer; criteria and parts of a sum as NAME/PART."""
    values: dict[str, list[float | None]] = {}
    for measure in measures:
        if measure.scores_alone:
            scores = resolve_scores(measure.source, rollout)
            values[measure.name] = known(scores.reward)
            for part in measure.parts:
                if part in scores.parts:
                    values[f"{measure.name}/{part}"] = known(scores.parts[part])
    return values


def matches(
    measure: Measure, prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str]
) -> list[Match]:
    """Each answer after against the one before, asked in both orders.

    Equal answers are a draw and an empty one loses, both without a question.
    """
    judge = measure.source
    assert isinstance(judge, JudgeReward)
    result: list[Match | None] = [
        Match(margin=float(is_blank(old)) - float(is_blank(new)))
        if old == new or is_blank(old) or is_blank(new)
        else None
        for old, new in zip(before, after, strict=True)
    ]
    rows = [i for i, match in enumerate(result) if match is None]
    comparing = judge.compare(
        [prompts[i] for i in rows], [after[i] for i in rows], [before[i] for i in rows]
    )
    for i, judgement in zip(rows, wait_for(comparing), strict=True):
        orders = judgement.orders.values()
        result[i] = Match(
            margin=judgement.reward,
            num_questions=len(orders),
            num_turned=sum((first - 5) * (second - 5) < 0 for first, second in orders),
        )
    return [match for match in result if match is not None]


def groups_of(rows: Sequence[Row], column: str | None, source: str) -> dict[int, str]:
    """Row number -> `COLUMN = value`, empty without a column.

    Raises ConfigError for an unknown column, or one with too many values to split the data.
    """
    if column is None:
        return {row.number: "" for row in rows}
    if column not in rows[0].columns:
        near = nearest(column, rows[0].columns)
        raise ConfigError(
            f"--by {column}: {source} has no such column; there are {', '.join(rows[0].columns)}"
            + (f": did you mean {near}?" if near else "")
        )
    shown = {"True": "true", "False": "false", "None": "(none)"}
    values = {}
    for row in rows:
        value = row.columns[column]
        text = str(value)
        values[row.number] = text if isinstance(value, str) else shown.get(text, text)
    if (num := len(set(values.values()))) > MAX_GROUPS:
        raise ConfigError(
            f"--by {column}: has {num} different values, and each becomes a table; name a column "
            f"with at most {MAX_GROUPS}"
        )
    return {number: f"{column} = {value}" for number, value in values.items()}
