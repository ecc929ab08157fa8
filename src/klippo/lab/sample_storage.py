"""Many samples per prompt and their scores, on disk; samples are drawn here, or in a given file.

P prompts, N samples of each, M in all. Drawn samples are numbered sample by sample: number i is
sample i // P of prompt i % P, so that more samples of every prompt can be added later.
"""

from __future__ import annotations

import inspect
import itertools
import json
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
from klippo.lab.reward_names import functions_in, reward_label
from klippo.rewards.build import build_reward
from klippo.rewards.function import load_function
from klippo.rewards.resolve import resolve_scores
from klippo.rewards.settings import LengthSettings, RepetitionSettings, RewardSettings, SumSettings
from klippo.rollouts.collate import collate
from klippo.rollouts.sampling import Sampling, response_seeds
from klippo.runs.folder import BrokenLineError, append_lines, complete_lines, read_rows, write_rows
from klippo.runs.models import OpenModel
from klippo.runs.progress import LiveLine, clock
from klippo.types import Prompt

SAMPLES_FILE = "samples.jsonl"
PROMPTS_FILE = "prompts.jsonl"
SCORES_DIR = "scores"
CHUNK = 512
"""Samples between two writes of scores: what a killed command scores again."""
NUMBERS_PER_PROMPT = 2**32
"""Response number of sample s of prompt p: p * 2**32 + s, where p is the prompt's row."""

Sample = dict[str, Any]
"""prompt (its index among the prompts), response, response_ids, length, finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Scored in order, and read from any number on."""

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
    num, path = num_samples * len(prompts), folder / SAMPLES_FILE

    def read(start: int) -> Iterator[Sample]:
        with path.open(encoding="utf-8", newline="\n") as file:
            for i, line in enumerate(itertools.islice(file, start, num), start=start):
                row = _object(path, i + 1, line)
                yield row | {"prompt": i % len(prompts), "length": len(row["response_ids"])}

    return Samples(prompts=prompts, prompt_of_sample=np.arange(num) % len(prompts), read=read)


def draw_missing(
    samples: Samples,
    folder: Path,
    open_policy: Callable[[], OpenModel],
    *,
    response_length: int | None,
    temperature: float,
    seed: int,
    batch_size: int,
    console: Console,
) -> None:
    """Sample what is missing; every batch is on disk before the next one starts."""
    file, prompts, total = folder / SAMPLES_FILE, samples.prompts, len(samples.prompt_of_sample)
    num_done = complete_lines(file)
    if num_done >= total:
        console.print("Every sample is there already.")
        return
    opened = open_policy()
    engine = opened.engine(Sampling(temperature=temperature))
    length = response_length or opened.max_tokens
    with LiveLine(console, num_lines=10, num_done=num_done) as line:
        for start in range(num_done, total, batch_size):
            numbers = range(start, min(start + batch_size, total))
            asked = [prompts[i % len(prompts)] for i in numbers]
            ranks = [i // len(prompts) for i in numbers]
            seeds = response_seeds(
                seed, (p.id * NUMBERS_PER_PROMPT + s for p, s in zip(asked, ranks, strict=True))
            )
            completions = engine.generate(asked, [length] * len(asked), seeds)
            rollout = collate(
                asked,
                completions,
                opened.tokenizer,
                temperature=temperature,
                device=opened.device,
            )
            rows = [
                {
                    "prompt_id": prompt.id,
                    "sample": rank,
                    "prompt": prompt.text,
                    "response": response,
                    "response_ids": completion.token_ids,
                    "finished": completion.finished,
                }
                for prompt, rank, response, completion in zip(
                    asked, ranks, rollout.responses, completions, strict=True
                )
            ]
            append_lines(file, rows)
            _show(line, "sampled", numbers.stop, total)


def samples_in(path: Path) -> Samples:
    """Samples that somebody has: JSON lines with a prompt and one `response`, or many `answers`.

    The prompt is the column `prompt`, or `instruction` and `input`. Scores in `gold` or
    `gold_scores` are taken if present. Raises ConfigError for what is wrong, with the line.
    """
    prompts: list[Prompt] = []
    has_ids = True
    indices: dict[str, int] = {}
    of_sample: list[int] = []
    gold: list[float | None] = []
    for line, row in _rows(path):
        responses, ids, own_gold = _content(path, line, row)
        columns = {k: v for k, v in row.items() if k not in _NO_COLUMNS}
        text = _prompt_text(path, line, columns)
        key = f"id {row['prompt_id']}" if "prompt_id" in row else f"text {text}"
        key = f"line {line}" if "answers" in row else key
        index = indices.setdefault(key, len(prompts))
        if index == len(prompts):
            content, meta = row.get("prompt_content"), row.get("columns", columns)
            prompts.append(Prompt(id=index, text=text, token_ids=[], content=content, meta=meta))
        of_sample += [index] * len(responses)
        gold += own_gold
        has_ids = has_ids and ids is not None
    if not of_sample:
        raise ConfigError(f"{path}: has no samples; a row is a prompt and a response")

    def samples() -> Iterator[Sample]:
        index = iter(of_sample)
        for line, row in _rows(path):
            responses, ids, _ = _content(path, line, row)
            ids = [0] if ids is None else ids
            for response in responses:
                yield {
                    "prompt": next(index),
                    "response": response,
                    "response_ids": ids,
                    "length": len(ids),
                    "finished": bool(row.get("finished", True)),
                }

    scores = np.array(gold, dtype=np.float64)  # None becomes NaN
    return Samples(
        prompts=prompts,
        prompt_of_sample=np.array(of_sample, dtype=np.intp),
        read=lambda start: itertools.islice(samples(), start, None),
        has_ids=has_ids,
        gold=None if bool(np.isnan(scores).all()) else scores,
    )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows; empty lines are left out."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _content(
    path: Path, line: int, row: dict[str, Any]
) -> tuple[list[str], list[int] | None, list[float | None]]:
    """Responses of a row, token ids if a single one has them, and gold scores."""
    several = "answers" in row
    responses = row["answers"] if several else [row.get("response")]
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise ConfigError(
            f"{path}, line {line}: needs `response` (text) or `answers` (a list of texts); its "
            f"keys are {', '.join(row)}"
        )
    given = row.get("gold_scores") if several else [row.get("gold")]
    scores = [None] * len(responses) if given is None else given
    if (
        not isinstance(scores, list)
        or len(scores) != len(responses)
        or not all(isinstance(s, int | float | None) for s in scores)
    ):
        raise ConfigError(
            f"{path}, line {line}: {len(responses)} answers need as many gold scores, numbers or "
            "null; fix the row"
        )
    return responses, None if several else row.get("response_ids") or None, scores


def _prompt_text(path: Path, line: int, columns: dict[str, Any]) -> str:
    if isinstance(columns.get("prompt"), str):
        return str(columns["prompt"])
    if isinstance(columns.get("instruction"), str):
        parts = (columns["instruction"], columns.get("input"))
        return "\n".join(str(part) for part in parts if part)
    raise ConfigError(
        f"{path}, line {line}: needs `prompt`, or `instruction` (and `input`); its columns are "
        f"{', '.join(columns)}"
    )


_NO_COLUMNS = {
    "answers", "response", "response_ids", "gold_scores", "gold", "gold_model", "finished",
    "sample", "length", "step", "episodes", "proxy", "members", "parts", "kl_k1_nats",
    "kl_exact_nats", "prompt_id", "prompt_content", "columns",
}  # fmt: skip
"""Keys of a row that say nothing about its prompt, or are not columns of the data."""


def _object(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError:
        raise BrokenLineError(path, line, "broken JSON", is_last=False) from None
    if not isinstance(row, dict):
        raise BrokenLineError(path, line, "no JSON object", is_last=False)
    return row


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
    if not samples.has_ids:
        for settings in rewards.values():
            _check_reads_text(settings)
    total = len(samples.prompt_of_sample)
    scores = {}
    for key, settings in rewards.items():
        file = folder / f"{key}.jsonl"
        complete_lines(file)  # without the line that a kill cut
        rows = read_rows(file) if file.is_file() else []
        values = [value for row in rows for value in row["scores"]]
        if len(values) < total:
            values += _score_rest(samples, settings, len(values), file, console, device)
        scores[key] = np.array(values[:total], dtype=np.float64)  # None becomes NaN
    return scores


def _score_rest(
    samples: Samples,
    settings: RewardSettings,
    num_done: int,
    file: Path,
    console: Console,
    device: torch.device,
) -> list[float | None]:
    """The scores of samples that have none; every chunk is on disk before the next one starts."""
    source = build_reward(settings, device=device)
    rows, values, total = samples.read(num_done), [], len(samples.prompt_of_sample)
    with LiveLine(console, num_lines=10, num_done=num_done) as line:
        while chunk := list(itertools.islice(rows, CHUNK)):
            rollout = rollout_of(chunk, [samples.prompts[row["prompt"]] for row in chunk])
            values += known(resolve_scores(source, rollout).reward)
            append_lines(file, [{"scores": values[-len(chunk) :]}])
            what = f"scored by {reward_label(settings)}:"
            _show(line, what, num_done + len(values), total)
    return values


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


def _show(line: LiveLine, what: str, num_done: int, total: int) -> None:
    """`sampled 1,024 of 12,600  left 1:20`."""
    left = clock(line.seconds_left(num_done, total))
    line.show(f"{what} {num_done:,} of {total:,}  left {left}", num_done, total)
