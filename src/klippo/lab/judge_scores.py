"""The stages behind `klippo judge test` and `klippo judge score`."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from klippo.config.load import load_config, recipe_names
from klippo.data.files import Row, read_file
from klippo.errors import ConfigError
from klippo.evaluation.statistics import estimate
from klippo.hub import resolve
from klippo.judge.client import JudgeClient
from klippo.judge.judging import CAN_RETRY, Judgement, Tally, judge_label
from klippo.judge.messages import JudgeBackend
from klippo.judge.parsing import SOURCES, Source
from klippo.judge.reward import JudgeReward
from klippo.judge.rubric import Material
from klippo.judge.settings import JudgeSettings
from klippo.judge.watch import liked_probes
from klippo.lab.reward_names import judges_in, reward_named
from klippo.rewards.build import judge_client
from klippo.runs.folder import read_rows, write_rows, write_text

CHUNK = 256
"""Rows between two writes of the output: what a killed command looks up again."""
MIN_ESTIMATED = 8
"""Scores that a mean with its interval is told of."""
PER = 1000
"""Samples that a price is told for."""


def find_judge(name: str, overrides: Sequence[str] = ()) -> JudgeSettings:
    """The judge of a recipe, of a run's config, or of a YAML file with a reward section.

    Of a sum it is the judge among the parts. Raises ConfigError where there is none, or several.
    """
    if name in recipe_names():
        config = load_config(name, overrides).config
        rewards = [config.reward, *([] if config.gold is None else [config.gold])]
    elif overrides:
        rewards = [load_config(name, overrides).config.reward]
    else:
        rewards = [reward_named(name)]
    found = [judge for reward in rewards for judge in judges_in(reward)]
    if len(found) != 1:
        raise ConfigError(
            f"{name}: has {len(found)} judges, and one is needed; name a YAML file with a reward "
            "section (kind: judge), FILE.yaml:SECTION, or a recipe"
        )
    return found[0]


def judge_of(values: Mapping[str, Any]) -> JudgeSettings:
    """A judge from the command line's options. Raises ConfigError with every problem."""
    try:
        return JudgeSettings.model_validate({"kind": "judge"} | dict(values))
    except ValidationError as error:
        lines = []
        for one in error.errors(include_url=False, include_input=False):
            key = ".".join(str(step) for step in one["loc"])
            said = one["msg"].removeprefix("Value error, ")
            lines.append(f"judge: {key}: {said}" if key else f"judge: {said}")
        raise ConfigError("\n".join(lines)) from None


def judge_test(settings: JudgeSettings, *, backend: JudgeBackend | None = None) -> int:
    """Real calls, without the cache: what the judge can do, what it falls for, what it costs."""
    return asyncio.run(_test(settings, backend))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """What one call in one form gave."""

    source: Source
    outcome: str
    seconds: float
    spent: Tally


async def _test(settings: JudgeSettings, backend: JudgeBackend | None) -> int:
    console = Console()
    client = None
    if backend is None:
        uncached = settings.api.model_copy(update={"cache": None})
        backend = client = JudgeClient(uncached, account="test")
    try:
        reward = JudgeReward(settings, backend, say=lambda _: None)
        console.print(Text(f"{judge_label(settings)} at {settings.api.url}"), soft_wrap=True)
        trials = [await _try(reward, source) for source in _sources(settings)]
        _tell_trials(trials, console)
        await reward.judge.choose_source()
        console.print(f"Scores are read from: {reward.judge.source}")
        await reward.run_probes()
    finally:
        if client is not None:
            await client.close()
    _tell_probes(reward.probe_rewards, console)
    used = next(trial for trial in trials if trial.source == reward.judge.source)
    _tell_price(settings, reward, used, console)
    return 0


def _sources(settings: JudgeSettings) -> list[Source]:
    return [one for one in SOURCES if not (settings.rationale and one == "logprobs")]


async def _try(reward: JudgeReward, source: Source) -> _Trial:
    before, start = reward.judge.tally, time.perf_counter()
    reward.judge.tally = spent = Tally()
    try:
        reading = await reward.judge.try_source(source)
    finally:
        reward.judge.tally = before
    score = reading.score
    outcome = f"no: {reading.cause}" if score is None else f"yes: the sample gets {score:.2f} of 10"
    seconds = time.perf_counter() - start
    return _Trial(source=source, outcome=outcome, seconds=seconds, spent=spent)


def _tell_trials(trials: Sequence[_Trial], console: Console) -> None:
    names = {"logprobs": "log-probs of labels", "json": "JSON by a schema", "line": "a last line"}
    table = Table(title="What the judge can do", title_justify="left")
    for name in ("score from", "works", "seconds", "calls", "tokens read", "written"):
        table.add_column(name, justify="left" if name in ("score from", "works") else "right")
    for trial in trials:
        spent = trial.spent
        numbers = (spent.num_calls, spent.prompt_tokens, spent.completion_tokens)
        cells = [names[trial.source], trial.outcome, f"{trial.seconds:.2f}", *map(str, numbers)]
        table.add_row(*map(Text, cells))
    console.print(table)


def _tell_probes(rewards: Mapping[str, float | None], console: Console) -> None:
    liked = liked_probes(rewards)
    table = Table(title="Worthless answers (-1 is the lowest reward)", title_justify="left")
    table.add_column("answer")
    table.add_column("reward", justify="right")
    table.add_column("")
    for name, reward in rewards.items():
        shown = "unscored" if reward is None else f"{reward:+.2f}"
        table.add_row(name, shown, "too high" if name in liked else "")
    console.print(table)
    if liked:
        console.print(
            "A policy may learn to write what is marked: sharpen the rubric, take a better judge, "
            "or add a second reward in a sum.",
            soft_wrap=True,
        )


def _tell_price(
    settings: JudgeSettings, reward: JudgeReward, used: _Trial, console: Console
) -> None:
    """Tokens and USD of 1,000 samples like the plain one: real ones are longer."""
    num = PER * reward.judge.questions_per_response
    read, written = num * used.spent.prompt_tokens, num * used.spent.completion_tokens
    told = (
        f"{PER:,} samples take {num:,} calls: about {read:,} tokens read and {written:,} written"
        " (for short prompts and responses; longer ones take more)"
    )
    prices = settings.api.prices
    if prices is None:
        told += "; with usd_per_million_prompt_tokens and usd_per_million_completion_tokens set, "
        told += "the price stands here"
    else:
        usd = (read * prices[0] + written * prices[1]) / 1e6
        told += f", {usd:.2f} USD per {PER:,} samples"
    if settings.mode == "difference":
        told += f"; and {PER * len(reward.judge.criteria):,} calls at most for the references, once"
    console.print(Text(told + "."), soft_wrap=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFile:
    """What `klippo judge score` was asked for."""

    file: str
    settings: JudgeSettings
    output: Path
    prompt_column: str = "prompt"
    response_column: str = "response"
    score_column: str = "reward"
    overwrite: bool = False


def judge_score(asked: ScoreFile, *, backend: JudgeBackend | None = None) -> int:
    """Score a file's rows into another file; goes on where an earlier command ended."""
    console = Console()
    if asked.output.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"output={asked.output}: must end in .jsonl or .json")
    rows = read_file(resolve(asked.file), asked.file)
    materials = [_material(row, asked) for row in rows]
    label = judge_label(asked.settings)
    done = _resume(asked, rows, label)
    pending = [i for i, row in enumerate(done) if row is None or row["judge_cause"] in CAN_RETRY]
    if not pending:
        console.print(Text(f"{asked.output}: every row is judged already by {label}."))
        return 0
    asyncio.run(_score(asked, rows, materials, done, pending, backend, console))
    _tell_scores(asked, [row for row in done if row is not None], console)
    return 0


def _material(row: Row, asked: ScoreFile) -> Material:
    columns = {"prompt": asked.prompt_column, "response": asked.response_column}
    if asked.settings.reference_column is not None:
        columns["reference"] = asked.settings.reference_column
    texts: dict[str, str | None] = {}
    for name, column in columns.items():
        if column not in row.columns:
            raise ConfigError(
                f"{asked.file}: there is no column {column!r} for the {name}; there are "
                f"{', '.join(row.columns)}: name it with --{name}-column"
            )
        value = row.columns[column]
        if not isinstance(value, str | None):
            raise ConfigError(
                f"{row}: column {column!r} holds {type(value).__name__} where text is needed"
            )
        texts[name] = value
    return Material(
        prompt=texts["prompt"] or "",
        response=texts["response"] or "",
        reference=texts.get("reference"),
    )


def _resume(asked: ScoreFile, rows: Sequence[Row], label: str) -> list[dict[str, Any] | None]:
    """What the output has already, row by row."""
    done: list[dict[str, Any] | None] = [None] * len(rows)
    if asked.overwrite or not asked.output.exists():
        return done
    for i, old in enumerate(_read_output(asked.output)):
        by = old.get("judge")
        if by != label:
            raise ConfigError(
                f"{asked.output}: exists and was judged by {by}, and this is {label}; choose "
                "another --output, or pass --overwrite"
            )
        same = i < len(rows) and all(
            old.get(name) == value for name, value in _kept(rows[i], asked).items()
        )
        if not same:
            raise ConfigError(
                f"{asked.output}: row {i} is not that of {asked.file}; choose another --output, "
                "or pass --overwrite"
            )
        done[i] = old
    return done


def _read_output(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return read_rows(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ConfigError(f"{path}: exists and holds no list of rows; choose another --output")
    return found


async def _score(
    asked: ScoreFile,
    rows: Sequence[Row],
    materials: Sequence[Material],
    done: list[dict[str, Any] | None],
    pending: Sequence[int],
    backend: JudgeBackend | None,
    console: Console,
) -> None:
    client = None
    if backend is None:
        backend = client = judge_client(asked.settings)
    reward = JudgeReward(asked.settings, backend, say=lambda text: _warn(text, console))
    try:
        await reward.open()
        for start in range(0, len(pending), CHUNK):
            chunk = pending[start : start + CHUNK]
            judgements = await reward.judge_unwatched([materials[i] for i in chunk])
            for i, judgement in zip(chunk, judgements, strict=True):
                done[i] = _row(rows[i], asked, judgement, reward)
            _write(asked.output, done)
            _tell_progress(min(start + CHUNK, len(pending)), len(pending), reward, console)
            reward.note(judgements)
    finally:
        if client is not None:
            await client.close()


def _kept(row: Row, asked: ScoreFile) -> dict[str, Any]:
    """The row's own columns, without what the judge writes."""
    own = ("judge", "judge_cause", "judge_scores", "judge_parts", "judge_rationales")
    return {k: v for k, v in row.columns.items() if k not in (*own, asked.score_column)}


def _row(row: Row, asked: ScoreFile, judgement: Judgement, reward: JudgeReward) -> dict[str, Any]:
    found: dict[str, Any] = {
        asked.score_column: reward.stand_in(judgement),
        "judge_scores": dict(judgement.scores),
        "judge_cause": judgement.cause,
        "judge": judge_label(asked.settings),
    }
    if len(reward.judge.criteria) > 1:
        found["judge_parts"] = dict(judgement.parts)
    if asked.settings.rationale:
        found["judge_rationales"] = dict(judgement.rationales)
    return _kept(row, asked) | found


def _write(path: Path, done: Sequence[dict[str, Any] | None]) -> None:
    """The rows up to the first that is missing, whole."""
    number = next((i for i, row in enumerate(done) if row is None), len(done))
    rows = [row for row in done[:number] if row is not None]
    if path.suffix == ".jsonl":
        write_rows(path, rows)
    else:
        write_text(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


def _tell_progress(number: int, total: int, reward: JudgeReward, console: Console) -> None:
    tally = reward.judge.tally
    told = f"judged {number:,} of {total:,}: {tally.num_calls:,} calls, {tally.num_cached:,} cached"
    if tally.cost_is_known:
        told += f", {tally.cost_usd:.4f} USD"
    console.print(told, soft_wrap=True)


def _tell_scores(asked: ScoreFile, rows: Sequence[dict[str, Any]], console: Console) -> None:
    causes = Counter(row["judge_cause"] for row in rows if row["judge_cause"] is not None)
    scored = [row[asked.score_column] for row in rows if row[asked.score_column] is not None]
    told = f"{asked.output}: {len(scored):,} of {len(rows):,} rows have a score"
    if len(scored) >= MIN_ESTIMATED:
        mean = estimate(scored)
        told += f", mean {mean.mean:+.3f} (95% interval {mean.low:+.3f} to {mean.high:+.3f})"
    if causes:
        told += "; " + ", ".join(f"{cause}: {num}" for cause, num in causes.most_common())
    console.print(Text(told), soft_wrap=True)


def _warn(text: str, console: Console) -> None:
    console.print(Text(f"Warning: {text}"), soft_wrap=True)
