"""Many samples per prompt and their scores, on disk; samples are drawn here, or in a given file.

P prompts, N samples of each, M in all. Drawn samples are numbered sample by sample: number i is
sample i // P of prompt i % P, so that more samples of every prompt can be added later.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from klippo.errors import ConfigError
from klippo.evaluation.history import Floats
from klippo.evaluation.samples import known, prompt_of, rest_of_prompt, rollout_of
from klippo.lab.reward_names import reward_label
from klippo.rewards.build import build_reward
from klippo.rewards.function import load_function
from klippo.rewards.resolve import resolve_scores
from klippo.rewards.settings import (
    FunctionSettings,
    LengthSettings,
    RepetitionSettings,
    RewardSettings,
    leaves,
)
from klippo.runs.folder import append_lines, complete_lines, numbered_rows, read_rows, write_rows
from klippo.runs.progress import LiveLine, clock
from klippo.types import Prompt

SAMPLES_FILE = "samples.jsonl"
PROMPTS_FILE = "prompts.jsonl"
SCORES_DIR = "scores"
CHUNK = 512
"""Samples between two writes of scores: what a killed command scores again."""
_NO_COLUMNS = {
    "answers", "response", "response_ids", "gold_scores", "gold", "gold_model", "finished",
    "sample", "length", "step", "episodes", "proxy", "members", "parts", "kl_k1_nats",
    "kl_exact_nats", "prompt_id", "prompt_content", "columns",
}  # fmt: skip
"""Keys of a row that say nothing about its prompt, or are not columns of the data."""

Sample = dict[str, Any]
"""prompt (its index among the prompts), response, response_ids, length, finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Samples to score in order; they are read from disk as they are needed."""

    prompts: list[Prompt]
    prompt_of_sample: NDArray[np.intp]
    """(M,) index of each sample's prompt."""
    read: Callable[[int], Iterator[Sample]]
    """The samples from a number on."""
    has_ids: bool = True
    gold: Floats | None = None
    """(M,) gold scores that came with the samples."""


def store_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Prompts of like length become neighbours, so that batches need little padding."""
    rows = [
        {"prompt_id": p.id, "prompt": p.text, "prompt_ids": p.token_ids}
        | rest_of_prompt(p, max_column=None)
        for p in sorted(prompts, key=lambda p: len(p.token_ids))
    ]
    write_rows(folder / PROMPTS_FILE, rows)


def drawn_samples(folder: Path, num_samples: int) -> Samples:
    """`num_samples` of every prompt in the folder."""
    prompts = [
        replace(prompt_of(row), token_ids=row["prompt_ids"])
        for row in read_rows(folder / PROMPTS_FILE)
    ]
    num = num_samples * len(prompts)

    def read(start: int) -> Iterator[Sample]:
        rows = itertools.islice(numbered_rows(folder / SAMPLES_FILE), start, num)
        for i, (_, row) in enumerate(rows, start=start):
            yield row | {"prompt": i % len(prompts), "length": len(row["response_ids"])}

    return Samples(prompts=prompts, prompt_of_sample=np.arange(num) % len(prompts), read=read)


def samples_in(path: Path) -> Samples:
    """Samples that somebody has: JSON lines with a prompt and one `response`, or many `answers`.

    The prompt is the column `prompt`, or `instruction` and `input`. Scores in `gold` or
    `gold_scores` are taken if present. Raises ConfigError for what is wrong, with the line.
    """
    prompts: list[Prompt] = []
    indices: dict[str, int] = {}
    of_sample: list[int] = []
    gold: list[float | None] = []
    has_ids = True
    for line, row in numbered_rows(path):
        columns = {k: v for k, v in row.items() if k not in _NO_COLUMNS}
        try:
            gold += _gold_scores(row)
            text = _prompt_text(columns)
        except ValueError as error:
            raise ConfigError(f"{path}, line {line}: {error}") from None
        key = f"id {row['prompt_id']}" if "prompt_id" in row else f"text {text}"
        index = indices.setdefault(f"line {line}" if "answers" in row else key, len(prompts))
        if index == len(prompts):
            content, meta = row.get("prompt_content"), row.get("columns", columns)
            prompts.append(Prompt(id=index, text=text, token_ids=[], content=content, meta=meta))
        of_sample += [index] * (len(gold) - len(of_sample))
        has_ids = has_ids and "answers" not in row and bool(row.get("response_ids"))
    if not of_sample:
        raise ConfigError(f"{path}: has no samples; a row is a prompt and a response")

    def samples() -> Iterator[Sample]:
        index = iter(of_sample)
        for _, row in numbered_rows(path):
            ids = [0] if "answers" in row else row.get("response_ids") or [0]
            shared = {"response_ids": ids, "length": len(ids)}
            shared["finished"] = bool(row.get("finished", True))
            for response in _responses(row):
                yield {"prompt": next(index), "response": response} | shared

    scores = np.array(gold, dtype=np.float64)  # None becomes NaN
    return Samples(
        prompts=prompts,
        prompt_of_sample=np.array(of_sample, dtype=np.intp),
        read=lambda start: itertools.islice(samples(), start, None),
        has_ids=has_ids,
        gold=None if bool(np.isnan(scores).all()) else scores,
    )


def _responses(row: Sample) -> Any:
    return row["answers"] if "answers" in row else [row.get("response")]


def _gold_scores(row: Sample) -> list[float | None]:
    """One per response, None if unknown. Raises ValueError for a row that does not fit."""
    responses = _responses(row)
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise ValueError(
            f"needs `response` (text) or `answers` (a list of texts); its keys are {', '.join(row)}"
        )
    scores = row.get("gold_scores") if "answers" in row else [row.get("gold")]
    if scores is None:
        return [None] * len(responses)
    is_list = isinstance(scores, list) and len(scores) == len(responses)
    if not is_list or not all(isinstance(score, int | float | None) for score in scores):
        raise ValueError(
            f"{len(responses)} answers need as many gold scores, numbers or null; fix the row"
        )
    return list(scores)


def _prompt_text(columns: Mapping[str, Any]) -> str:
    if isinstance(columns.get("prompt"), str):
        return str(columns["prompt"])
    if isinstance(columns.get("instruction"), str):
        parts = (columns["instruction"], columns.get("input"))
        return "\n".join(str(part) for part in parts if part)
    raise ValueError(
        f"needs `prompt`, or `instruction` (and `input`); its columns are {', '.join(columns)}"
    )


def score_samples(
    samples: Samples,
    rewards: Mapping[str, RewardSettings],
    folder: Path,
    console: Console,
    device: torch.device,
) -> dict[str, Floats]:
    """Scores (M,) by key, NaN for unscored; what `folder` has already is not scored again.

    Every chunk is on disk before the next one starts. Raises ConfigError for a reward that reads
    token ids if the samples have none.
    """
    for settings in rewards.values():
        if not samples.has_ids and any(map(_reads_ids, leaves(settings))):
            raise ConfigError(
                f"{reward_label(settings)} reads token ids, and the samples have none; sample from "
                "a policy, or use a reward that reads text"
            )
    total = len(samples.prompt_of_sample)
    scores = {}
    for key, settings in rewards.items():
        file = folder / f"{key}.jsonl"
        has_scores = complete_lines(file) > 0  # without the line that a kill cut
        values = [v for row in (read_rows(file) if has_scores else []) for v in row["scores"]]
        if len(values) < total:
            source, rows = build_reward(settings, device=device), samples.read(len(values))
            label = f"scored by {reward_label(settings)}:"
            with LiveLine(console, num_lines=10, num_done=len(values)) as line:
                while chunk := list(itertools.islice(rows, CHUNK)):
                    rollout = rollout_of(chunk, [samples.prompts[row["prompt"]] for row in chunk])
                    new = known(resolve_scores(source, rollout).reward)
                    append_lines(file, [{"scores": new}])
                    values += new
                    show_progress(line, label, len(values), total)
        scores[key] = np.array(values[:total], dtype=np.float64)  # None becomes NaN
    return scores


def _reads_ids(settings: RewardSettings) -> bool:
    if isinstance(settings, FunctionSettings):
        return "token_ids" in inspect.signature(load_function(settings.function)).parameters
    return isinstance(settings, LengthSettings | RepetitionSettings)


def show_progress(line: LiveLine, what: str, num_done: int, total: int) -> None:
    """`sampled 1,024 of 12,600  left 1:20`."""
    left = clock(line.seconds_left(num_done, total))
    line.show(f"{what} {num_done:,} of {total:,}  left {left}", num_done, total)
