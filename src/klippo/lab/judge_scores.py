"""`klippo judge test` and `klippo judge score`."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Column, Table
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
from klippo.judge.reward import JudgeReward, liked_probes
from klippo.judge.rubric import Material
from klippo.judge.settings import JudgeSettings
from klippo.lab.reward_names import judges_in, reward_named
from klippo.rewards.build import judge_client
from klippo.runs.folder import read_rows, write_rows, write_text

CHUNK = 256
"""Rows between two writes of the output: what a killed command looks up again."""
MIN_ESTIMATED = 8
"""Fewest scores whose mean is shown with its interval."""
PER = 1000
"""Samples that a price is shown for."""
JUDGE_COLUMNS = ("judge", "judge_cause", "judge_scores", "judge_parts", "judge_rationales")
SOURCE_NAMES: Mapping[Source, str] = {
    "logprobs": "log-probs of labels",
    "json": "JSON by a schema",
    "line": "a last line",
}

OutputRow = dict[str, object]


def find_judge(name: str, overrides: Sequence[str] = ()) -> JudgeSettings:
    """The judge of a recipe, of a run's config, or of a YAML file with a reward section.

    Of a sum it is the judge among the terms. Raises ConfigError unless there is exactly one.
    """
    if name in recipe_names():
        config = load_config(name, overrides).config
        rewards = [config.reward, *([] if config.gold is None else [config.gold])]
    elif overrides:
        rewards = [load_config(name, overrides).config.reward]
    else:
        rewards = [reward_named(name)]
    judges = [judge for reward in rewards for judge in judges_in(reward)]
    if len(judges) != 1:
        raise ConfigError(
            f"{name}: has {len(judges)} judges, and one is needed; name a YAML file with a reward "
            "section (kind: judge), FILE.yaml:SECTION, or a recipe"
        )
    return judges[0]


def judge_of(values: Mapping[str, object]) -> JudgeSettings:
    """A judge from the command line's options. Raises ConfigError with every problem."""
    try:
        return JudgeSettings.model_validate({"kind": "judge"} | dict(values))
    except ValidationError as error:
        lines = []
        for one in error.errors(include_url=False, include_input=False):
            key = "".join(f"{step}." for step in one["loc"]).rstrip(".")
            problem = one["msg"].removeprefix("Value error, ")
            lines.append(f"judge: {key}: {problem}" if key else f"judge: {problem}")
        raise ConfigError("\n".join(lines)) from None


def judge_test(settings: JudgeSettings, *, backend: JudgeBackend | None = None) -> int:
    """Real calls, without the cache: what the judge can do, what it falls for, what it costs."""
    return asyncio.run(_test(settings, backend))


async def _test(settings: JudgeSettings, backend: JudgeBackend | None) -> int:
    console = Console()
    client = None
    if backend is None:
        uncached = settings.api.model_copy(update={"cache": None})
        backend = client = JudgeClient(uncached, account="test")
    try:
        reward = JudgeReward(settings, backend, say=lambda _: None)
        judge = reward.judge
        console.print(Text(f"{judge_label(settings)} at {settings.api.url}"), soft_wrap=True)
        numbers = map(_number_column, ("seconds", "calls", "tokens read", "written"))
        title = "What the judge can do"
        table = Table("score from", "works", *numbers, title=title, title_justify="left")
        spent: dict[Source, Tally] = {}
        for source in SOURCES:
            if settings.rationale and source == "logprobs":
                continue
            judge.tally = tally = spent[source] = Tally()
            start = time.perf_counter()
            reading = await judge.try_source(source)
            seconds = f"{time.perf_counter() - start:.2f}"
            works = f"no: {reading.cause}"
            if reading.score is not None:
                works = f"yes: the sample gets {reading.score:.2f} of 10"
            counts = (tally.num_calls, tally.prompt_tokens, tally.completion_tokens)
            table.add_row(*map(Text, (SOURCE_NAMES[source], works, seconds, *map(str, counts))))
        judge.tally = Tally()
        console.print(table)
        await judge.choose_source()
        assert judge.source is not None
        console.print(f"Scores are read from: {judge.source}")
        await reward.run_probes()
    finally:
        if client is not None:
            await client.close()
    _print_probes(reward.probe_rewards, console)
    console.print(Text(_price(reward, spent[judge.source])), soft_wrap=True)
    return 0


def _print_probes(rewards: Mapping[str, float | None], console: Console) -> None:
    liked = liked_probes(rewards)
    title = "Worthless answers (-1 is the lowest reward)"
    table = Table("answer", _number_column("reward"), "", title=title, title_justify="left")
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


def _number_column(name: str) -> Column:
    return Column(name, justify="right")


def _price(reward: JudgeReward, spent: Tally) -> str:
    """Tokens and USD of 1,000 samples like the plain one: real ones are longer."""
    num = PER * reward.judge.questions_per_response
    read, written = num * spent.prompt_tokens, num * spent.completion_tokens
    text = (
        f"{PER:,} samples take {num:,} calls: about {read:,} tokens read and {written:,} written"
        " (for short prompts and responses; longer ones take more)"
    )
    prices = reward.settings.api.prices
    if prices is None:
        text += "; with usd_per_million_prompt_tokens and usd_per_million_completion_tokens set, "
        text += "the price is shown here"
    else:
        usd = (read * prices[0] + written * prices[1]) / 1e6
        text += f", {usd:.2f} USD per {PER:,} samples"
    if reward.settings.mode == "difference":
        text += f"; and {PER * len(reward.judge.criteria):,} calls at most for the references, once"
    return text + "."


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

    def material(self, row: Row) -> Material:
        """What the judge reads of a row. Raises ConfigError for a missing column or no text."""
        columns = {"prompt": self.prompt_column, "response": self.response_column}
        if self.settings.reference_column is not None:
            columns["reference"] = self.settings.reference_column
        texts: dict[str, str | None] = {"reference": None}
        for name, column in columns.items():
            if column not in row.columns:
                raise ConfigError(
                    f"{self.file}: there is no column {column!r} for the {name}; there are "
                    f"{', '.join(row.columns)}: name it with --{name}-column"
                )
            value = row.columns[column]
            if not isinstance(value, str | None):
                raise ConfigError(
                    f"{row}: column {column!r} holds {type(value).__name__} where text is needed"
                )
            texts[name] = value
        prompt, response = texts["prompt"] or "", texts["response"] or ""
        return Material(prompt=prompt, response=response, reference=texts["reference"])

    def kept(self, row: Row) -> OutputRow:
        """The row's columns, without those that the judge writes."""
        written = (*JUDGE_COLUMNS, self.score_column)
        return {name: value for name, value in row.columns.items() if name not in written}

    def judged(self, judgement: Judgement, reward: JudgeReward) -> OutputRow:
        """The columns that the judge writes."""
        columns: OutputRow = {
            self.score_column: reward.stand_in(judgement),
            "judge_scores": dict(judgement.scores),
            "judge_cause": judgement.cause,
            "judge": judge_label(self.settings),
        }
        if len(reward.judge.criteria) > 1:
            columns["judge_parts"] = dict(judgement.parts)
        if self.settings.rationale:
            columns["judge_rationales"] = dict(judgement.rationales)
        return columns

    def resume(self, rows: Sequence[Row], label: str) -> list[OutputRow | None]:
        """What the output has already, row by row. Raises ConfigError if it is another's."""
        done: list[OutputRow | None] = [None] * len(rows)
        if self.overwrite or not self.output.exists():
            return done
        for i, old in enumerate(self._written()):
            if old.get("judge") != label:
                raise ConfigError(
                    f"{self.output}: exists and was judged by {old.get('judge')}, and this is "
                    f"{label}; choose another --output, or pass --overwrite"
                )
            if i >= len(rows) or not self.kept(rows[i]).items() <= old.items():
                raise ConfigError(
                    f"{self.output}: row {i} is not that of {self.file}; choose another --output, "
                    "or pass --overwrite"
                )
            done[i] = old
        return done

    def _written(self) -> list[OutputRow]:
        if self.output.suffix == ".jsonl":
            return list(read_rows(self.output))
        try:
            rows = json.loads(self.output.read_text(encoding="utf-8"))
        except ValueError:
            rows = None
        if not rows or not isinstance(rows, list) or not isinstance(rows[0], dict):
            raise ConfigError(
                f"{self.output}: exists and holds no list of rows; choose another --output"
            )
        return rows

    def write(self, done: Sequence[OutputRow | None]) -> None:
        """The rows up to the first that is missing."""
        rows = list(itertools.takewhile(lambda row: row is not None, done))
        if self.output.suffix == ".jsonl":
            write_rows(self.output, filter(None, rows))
        else:
            write_text(self.output, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


def judge_score(asked: ScoreFile, *, backend: JudgeBackend | None = None) -> int:
    """Score a file's rows into another file; resumes an earlier command's output."""
    console = Console()
    if asked.output.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"output={asked.output}: must end in .jsonl or .json")
    rows = read_file(resolve(asked.file), asked.file)
    materials = [asked.material(row) for row in rows]
    label = judge_label(asked.settings)
    done = asked.resume(rows, label)
    pending = [i for i, row in enumerate(done) if row is None or row["judge_cause"] in CAN_RETRY]
    if not pending:
        console.print(Text(f"{asked.output}: every row is judged already by {label}."))
        return 0

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    async def score() -> None:
        reward = JudgeReward(
            asked.settings,
            judge_client(asked.settings) if backend is None else backend,
            say=lambda text: say(f"Warning: {text}"),
        )
        try:
            await reward.open()
            for start in range(0, len(pending), CHUNK):
                chunk = pending[start : start + CHUNK]
                judgements = await reward.judge_unwatched([materials[i] for i in chunk])
                for i, judgement in zip(chunk, judgements, strict=True):
                    done[i] = asked.kept(rows[i]) | asked.judged(judgement, reward)
                asked.write(done)
                tally = reward.judge.tally
                say(
                    f"judged {start + len(chunk):,} of {len(pending):,}: "
                    f"{tally.num_calls:,} calls, {tally.num_cached:,} cached"
                    + (f", {tally.cost_usd:.4f} USD" if tally.cost_is_known else "")
                )
                reward.note(judgements)
        finally:
            await reward.close()

    asyncio.run(score())
    say(_summary(asked, [row for row in done if row is not None]))
    return 0


def _summary(asked: ScoreFile, rows: Sequence[OutputRow]) -> str:
    causes = Counter(row["judge_cause"] for row in rows if row["judge_cause"] is not None)
    rewards = (row[asked.score_column] for row in rows)
    scored = [float(reward) for reward in rewards if isinstance(reward, int | float)]
    text = f"{asked.output}: {len(scored):,} of {len(rows):,} rows have a score"
    if len(scored) >= MIN_ESTIMATED:
        mean = estimate(scored)
        text += f", mean {mean.mean:+.3f} (95% interval {mean.low:+.3f} to {mean.high:+.3f})"
    if causes:
        text += "; " + ", ".join(f"{cause}: {num}" for cause, num in causes.most_common())
    return text
