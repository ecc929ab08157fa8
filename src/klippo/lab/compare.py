"""`klippo compare`: the same prompts through one model and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_json
from rich.console import Console

from klippo.config.load import load_config
from klippo.config.schema import RunConfig
from klippo.data.files import Row, source_of
from klippo.data.rows import data_of, rows_kept
from klippo.data.sampler import pick
from klippo.data.settings import DataSettings
from klippo.errors import ConfigError
from klippo.evaluation.comparison import (
    Answer,
    Comparison,
    OutputChange,
    by_group,
    compare_answers,
    output_change,
    style_values,
)
from klippo.evaluation.style import word_shift
from klippo.judge.reward import prompt_text
from klippo.lab.measures import (
    Measure,
    groups_of,
    lower_is_better,
    matches,
    open_measures,
    rewards_by_name,
    score_alone,
    split_name,
)
from klippo.lengths import longest
from klippo.policy.actor_critic import CausalLM
from klippo.policy.weights import WeightChange, weight_change
from klippo.ranks import choose_device
from klippo.report.comparison import answers_table, comparison_tables
from klippo.rollouts.collate import collate
from klippo.rollouts.sampling import Sampling, response_seeds
from klippo.runs.folder import write_bytes
from klippo.runs.models import (
    START,
    UNNAMED,
    Dtype,
    ModelSource,
    OpenModel,
    locate_model,
    open_model,
    start_of,
)
from klippo.types import Prompt, Rollout

SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """A model with its answers."""

    opened: OpenModel
    rollout: Rollout
    answers: Mapping[int, Answer]
    """By prompt id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Questions:
    """What is the same for every model."""

    groups: Mapping[int, str]
    """By prompt id."""
    measures: Sequence[Measure]
    prompt_column: str
    seeds: Mapping[int, int]
    """The random numbers of each prompt, by its id."""
    max_tokens: int
    batch_size: int


def compare(
    before: str,
    afters: Sequence[str],
    *,
    prompts: str | None = None,
    rewards: Sequence[str] = (),
    by: str | None = None,
    num_prompts: int = 64,
    output: Path | None = None,
    max_tokens: int | None = None,
    batch_size: int = 64,
    dtype: Dtype = "float32",
    seed: int = 0,
) -> int:
    """Print whether the answers changed and, given rewards, whether they got better."""
    console, device = Console(), choose_device("auto")
    sources = _named_sources(afters)
    base = start_of(sources.values()) if before == START else locate_model(before)
    runs = [source.config for source in (*sources.values(), base)]
    rows, data, lead = _rows(prompts, next((run for run in runs if run is not None), None))
    settings = rewards_by_name(rewards, runs)
    groups = groups_of(rows, by, source_of(rows))
    columns, column = rows[0].columns, data.prompt_columns[0]
    measures = open_measures(settings, columns, device=device, prompt_column=column)
    with console.status("The answers before"):
        opened = open_model(base, device, dtype=dtype, like=lead)
        of_run = None if lead is None else longest(lead.rollout.response_length)
        length = next(n for n in (max_tokens, of_run, opened.max_tokens) if n is not None)
        once: dict[tuple[int, ...], Prompt] = {}  # logged data has a row per response
        for prompt in opened.prompts(rows, data, length, seed):
            once.setdefault(tuple(prompt.token_ids), prompt)
        chosen = pick(list(once.values()), num_prompts, seed)
        numbers = response_seeds(seed, range(len(chosen)))
        questions = _Questions(
            groups=groups,
            measures=measures,
            prompt_column=column,
            seeds=dict(zip((prompt.id for prompt in chosen), numbers, strict=True)),
            max_tokens=length,
            batch_size=batch_size,
        )
        first = _answer(opened, chosen, questions)
    comparisons, answers = [], {"before": first.answers}
    for name, source in sources.items():
        with console.status(f"The answers of {name}"):
            opened = open_model(source, device, dtype=dtype, like=lead)
            asked = [row for row in rows if row.number in questions.seeds]
            side = _answer(opened, opened.prompts(asked, data, length, seed), questions)
            comparisons.append(_compare(name, first, side, questions))
            answers[name] = side.answers
            del opened, side  # before the next model is loaded
    tables = comparison_tables(comparisons, lower=lower_is_better(settings))
    for table in (*tables, answers_table(answers, list(settings), SHOWN)):
        console.print(table)
    if output is not None:
        figures = {
            "before": base.name,
            "num_prompts": len(chosen),
            "max_tokens": length,
            "seed": seed,
            "comparisons": comparisons,
            "answers": [_row(prompt.id, answers) for prompt in chosen],
        }
        write_bytes(output, to_json(figures, indent=1, inf_nan_mode="null") + b"\n")
    return 0


def _named_sources(afters: Sequence[str]) -> dict[str, ModelSource]:
    """The models by short names: those given, or the ends of their paths if these differ."""
    split = [split_name(text) for text in afters]
    ends = [Path(rest).name for _, rest in split]
    names = [
        name or (end if ends.count(end) == 1 else rest)
        for (name, rest), end in zip(split, ends, strict=True)
    ]
    for name in names:
        if names.count(name) > 1 or name == "before":
            raise ConfigError(
                f"AFTER {name}: "
                + ("is what BEFORE is called" if name == "before" else "is there twice")
                + "; give each model another name, as in NAME=RUN"
            )
    return {name: locate_model(rest) for name, (_, rest) in zip(names, split, strict=True)}


def _rows(
    prompts: str | None, lead: RunConfig | None
) -> tuple[list[Row], DataSettings, RunConfig | None]:
    """The rows to ask about, how prompts are read, and the run that says so."""
    if prompts is not None and prompts.endswith((".yaml", ".yml")):
        lead, prompts = load_config(prompts).config, None
    if lead is None and prompts is None:
        raise ConfigError(
            "none of the models is a run folder; say which prompts: --prompts FILE, or a run's "
            "config.yaml for its held-out prompts"
        )
    data = UNNAMED if lead is None else lead.data
    if prompts is not None:
        data = data_of(prompts, data)
    return rows_kept(data, 0 if lead is None else lead.seed), data, lead


def _answer(opened: OpenModel, prompts: list[Prompt], questions: _Questions) -> _Side:
    """Fresh answers with their values; the random numbers of a prompt are those of every model."""
    completions = opened.engine(Sampling(), questions.batch_size).generate(
        prompts,
        [questions.max_tokens] * len(prompts),
        [questions.seeds[prompt.id] for prompt in prompts],
    )
    rollout = collate(prompts, completions, opened.tokenizer, temperature=1.0, device=opened.device)
    scores = score_alone(questions.measures, rollout)
    answers = {
        prompt.id: Answer(
            prompt_id=prompt.id,
            prompt=prompt_text(prompt, questions.prompt_column),
            group=questions.groups[prompt.id],
            text=rollout.responses[i],
            values={name: values[i] for name, values in scores.items()} | style_values(rollout, i),
        )
        for i, prompt in enumerate(prompts)
    }
    return _Side(opened=opened, rollout=rollout, answers=answers)


def _compare(name: str, first: _Side, second: _Side, questions: _Questions) -> Comparison:
    """Every figure of one AFTER, on the prompts that both models could read."""
    prompts = second.rollout.prompts
    before = [first.answers[prompt.id] for prompt in prompts]
    after = [second.answers[prompt.id] for prompt in prompts]
    texts = [one.text for one in before], [one.text for one in after]
    pairwise = [measure for measure in questions.measures if measure.is_pairwise]
    duels = {measure.name: matches(measure, prompts, *texts) for measure in pairwise}
    weights: WeightChange | str
    try:
        weights = weight_change(first.opened.model, second.opened.model)
    except ValueError as error:
        weights = str(error)
    return Comparison(
        name=name,
        model=second.opened.name,
        whole=compare_answers(before, after, duels),
        groups=by_group(before, after, duels),
        num_identical=sum(b == a for b, a in zip(*texts, strict=True)),
        words=word_shift(*texts),
        weights=weights,
        outputs=_output_change(first, second, questions.batch_size),
    )


def _output_change(first: _Side, second: _Side, batch_size: int) -> OutputChange | str:
    before, after = first.opened, second.opened
    width = [len(one.model.get_output_embeddings().weight) for one in (before, after)]
    if width[0] != width[1] or before.tokenizer.get_vocab() != after.tokenizer.get_vocab():
        return "the vocabularies differ"
    models = CausalLM(before.model), CausalLM(after.model)
    return output_change(*models, first.rollout, second.rollout, batch_size)


def _row(prompt_id: int, answers: Mapping[str, Mapping[int, Answer]]) -> dict[str, Any]:
    """A prompt with what every model said to it."""
    given = {name: side[prompt_id] for name, side in answers.items() if prompt_id in side}
    return {
        "prompt_id": prompt_id,
        "prompt": given["before"].prompt,
        "group": given["before"].group,
        "answers": {name: {"response": a.text, **a.values} for name, a in given.items()},
    }
