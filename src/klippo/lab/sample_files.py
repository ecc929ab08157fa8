"""Many samples per prompt, on disk: drawn here and kept in a folder, or in somebody's file.

P prompts, N samples of each, M in all. Drawn samples are numbered sample by sample: number i is
sample i // P of prompt i % P, so that more samples of every prompt can be added later.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from klippo.errors import ConfigError
from klippo.evaluation.history import Floats
from klippo.evaluation.samples import prompt_of, rest_of_prompt
from klippo.rollouts.collate import collate
from klippo.rollouts.sampling import response_seeds
from klippo.runs.folder import BrokenLineError, read_rows, write_rows
from klippo.runs.lines import append_lines, whole_lines
from klippo.runs.progress import clock
from klippo.types import Engine, Prompt, Tokenizer

SAMPLES_FILE = "samples.jsonl"
PROMPTS_FILE = "prompts.jsonl"
NUMBERS_PER_PROMPT = 2**32
"""Response number of sample s of prompt p: p * 2**32 + s, where p is the prompt's row."""

Sample = dict[str, Any]
"""prompt (its place among the prompts), response, response_ids, length, finished."""


class Samples(Protocol):
    """Scored in order, and read from any place on."""

    prompts: list[Prompt]
    prompt_of_sample: NDArray[np.intp]
    """(M,) place of each sample's prompt."""
    has_ids: bool
    gold: Floats | None
    """(M,) gold scores that came with the samples."""

    def read(self, start: int) -> Iterator[Sample]:
        """The samples from number `start` on."""


class DrawnSamples:
    """The samples in a folder; `draw` adds those that are missing."""

    def __init__(self, folder: Path, num_samples: int) -> None:
        """`folder` has its prompts already."""
        self.has_ids = True
        self.gold: Floats | None = None
        rows = read_rows(folder / PROMPTS_FILE)
        self.prompts = [prompt_of(row) for row in rows]
        self._token_ids = [row["prompt_ids"] for row in rows]
        self._file = folder / SAMPLES_FILE
        self.num = num_samples * len(rows)
        self.num_there = whole_lines(self._file)
        self.prompt_of_sample = np.arange(self.num) % len(rows)

    @staticmethod
    def store_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
        """Prompts of like length become neighbours, so that batches need little padding."""
        rows = [
            {"prompt_id": p.id, "prompt": p.text, "prompt_ids": p.token_ids}
            | rest_of_prompt(p, max_column=None)
            for p in sorted(prompts, key=lambda p: len(p.token_ids))
        ]
        write_rows(folder / PROMPTS_FILE, rows)

    def draw(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        response_length: int,
        temperature: float,
        seed: int,
        batch_size: int,
        device: Any,
        console: Console,
    ) -> None:
        """Sample what is missing; every batch is on disk before the next one starts."""
        prompts = [
            Prompt(id=p.id, text=p.text, token_ids=ids)
            for p, ids in zip(self.prompts, self._token_ids, strict=True)
        ]
        meter = Meter(console, "sampled", self.num_there, self.num)
        for start in range(self.num_there, self.num, batch_size):
            numbers = range(start, min(start + batch_size, self.num))
            asked = [prompts[i % len(prompts)] for i in numbers]
            samples = [i // len(prompts) for i in numbers]
            seeds = response_seeds(
                seed,
                (p.id * NUMBERS_PER_PROMPT + s for p, s in zip(asked, samples, strict=True)),
            )
            completions = engine.generate(asked, [response_length] * len(asked), seeds)
            rollout = collate(asked, completions, tokenizer, temperature=temperature, device=device)
            rows = [
                {
                    "prompt_id": prompt.id,
                    "sample": sample,
                    "prompt": prompt.text,
                    "response": response,
                    "response_ids": completion.token_ids,
                    "finished": completion.finished,
                }
                for prompt, sample, response, completion in zip(
                    asked, samples, rollout.responses, completions, strict=True
                )
            ]
            append_lines(self._file, rows)
            meter.show(numbers.stop)
        self.num_there = max(self.num_there, self.num)

    def read(self, start: int) -> Iterator[Sample]:
        """The samples from number `start` on."""
        with self._file.open(encoding="utf-8", newline="\n") as file:
            for i, line in enumerate(itertools.islice(file, start, self.num), start=start):
                row = _object(self._file, i + 1, line)
                row["prompt"] = i % len(self.prompts)
                row["length"] = len(row["response_ids"])
                yield row


class FileSamples:
    """Samples that somebody has: JSON lines with a prompt and one `response`, or many `answers`.

    The prompt is the column `prompt`, or `instruction` and `input`. Scores in `gold` or
    `gold_scores` are taken where they stand.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file once. Raises ConfigError for what is wrong with it, with the line."""
        self._path = path
        self.prompts: list[Prompt] = []
        self.has_ids = True
        places: dict[str, int] = {}
        of_sample: list[int] = []
        gold: list[float] = []
        for number, row in self._rows():
            responses, ids, scores = self._content(number, row)
            columns = {k: v for k, v in row.items() if k not in _NO_COLUMNS}
            text = self._prompt(number, columns)
            key = f"id {row['prompt_id']}" if "prompt_id" in row else f"text {text}"
            key = f"line {number}" if "answers" in row else key
            place = places.setdefault(key, len(self.prompts))
            if place == len(self.prompts):
                content = row.get("prompt_content")
                meta = row.get("columns", columns)
                self.prompts.append(
                    Prompt(id=place, text=text, token_ids=[], content=content, meta=meta)
                )
            of_sample += [place] * len(responses)
            gold += [float("nan") if s is None else s for s in scores]
            self.has_ids = self.has_ids and ids is not None
        if not of_sample:
            raise ConfigError(f"{path}: has no samples; a row is a prompt and a response")
        self.prompt_of_sample = np.array(of_sample, dtype=np.intp)
        known = np.array(gold)
        self.gold: Floats | None = None if bool(np.isnan(known).all()) else known

    def read(self, start: int) -> Iterator[Sample]:
        """The samples from number `start` on."""
        number = 0
        for line, row in self._rows():
            responses, ids, _ = self._content(line, row)
            for i, response in enumerate(responses):
                if number >= start:
                    own = [0] if ids is None else ids[i]
                    yield {
                        "prompt": int(self.prompt_of_sample[number]),
                        "response": response,
                        "response_ids": own,
                        "length": len(own),
                        "finished": bool(row.get("finished", True)),
                    }
                number += 1

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with self._path.open(encoding="utf-8", newline="\n") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, _object(self._path, number, line)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._path}: cannot be read as UTF-8 text ({error})") from error

    def _content(
        self, line: int, row: dict[str, Any]
    ) -> tuple[list[str], list[list[int]] | None, list[float | None]]:
        """Responses of a row, their token ids where it has them, and their gold scores."""
        several = "answers" in row
        responses = row["answers"] if several else [row.get("response")]
        if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
            raise ConfigError(
                f"{self._path}, line {line}: needs `response` (text) or `answers` (a list of "
                f"texts); its keys are {', '.join(row)}"
            )
        found = row.get("gold_scores") if several else [row.get("gold")]
        scores = [None] * len(responses) if found is None else found
        numbers = isinstance(scores, list) and all(
            isinstance(s, int | float | None) for s in scores
        )
        if not numbers or len(scores) != len(responses):
            raise ConfigError(
                f"{self._path}, line {line}: {len(responses)} answers need as many gold scores, "
                "numbers or null; mend the row"
            )
        ids = row.get("response_ids")
        return responses, None if several or not ids else [ids], scores

    def _prompt(self, line: int, columns: dict[str, Any]) -> str:
        if isinstance(columns.get("prompt"), str):
            return str(columns["prompt"])
        if isinstance(columns.get("instruction"), str):
            parts = (columns["instruction"], columns.get("input"))
            return "\n".join(str(part) for part in parts if part)
        raise ConfigError(
            f"{self._path}, line {line}: needs `prompt`, or `instruction` (and `input`); its "
            f"columns are {', '.join(columns)}"
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


class Meter:
    """A line about every tenth of the work."""

    def __init__(
        self,
        console: Console,
        what: str,
        done: int,
        total: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._what, self._total, self._now = console, what, total, now
        self._first, self._started, self._shown = done, now(), done * 10 // max(total, 1)

    def show(self, done: int) -> None:
        """`done` of the total are finished."""
        tenth = done * 10 // self._total
        if tenth == self._shown:
            return
        self._shown = tenth
        each = (self._now() - self._started) / (done - self._first)
        left = clock(each * (self._total - done))
        text = f"{self._what} {done:,} of {self._total:,}  left {left}"
        self._console.print(Text(text), soft_wrap=True)
