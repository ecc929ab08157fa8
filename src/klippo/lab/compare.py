"""The stage behind `klippo compare`: the same prompts through one model and others."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from klippo.config.load import load_config
from klippo.config.schema import RunConfig
from klippo.data.sampler import pick
from klippo.errors import ConfigError
from klippo.evaluation.comparison import (
    Answer,
    Comparison,
    OutputChange,
    by_group,
    compare_answers,
    output_change,
    style_values,
    words_of,
)
from klippo.judge.reward import prompt_text
from klippo.lab.held_out import HeldOut, held_out, own_prompts
from klippo.lab.measures import (
    Measure,
    check_rewards,
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
from klippo.runs.folder import write_text
from klippo.runs.models import (
    START,
    UNNAMED,
    Dtype,
    OpenModel,
    Place,
    locate_model,
    open_place,
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
class _Asked:
    """What is the same for every model."""

    kept: HeldOut
    groups: Mapping[int, str]
    measures: Sequence[Measure]
    max_tokens: int | None
    batch_size: int
    seed: int


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
    console = Console()
    device = choose_device("auto")
    places = _named_places(afters)
    base = start_of(places.values()) if before == START else locate_model(before)
    runs = [place.config for place in (*places.values(), base)]
    lead = next((run for run in runs if run is not None), None)
    kept, lead = _rows(prompts, lead)
    settings = rewards_by_name(rewards, runs)
    columns = list(kept.rows[0].columns)
    groups = groups_of(kept.rows, by, kept.source)
    check_rewards(settings, columns)
    prompt_column = kept.data.prompt_columns[0]
    asked = _Asked(
        kept=kept,
        groups=groups,
        measures=open_measures(settings, columns, device=device, prompt_column=prompt_column),
        max_tokens=longest(lead.rollout.response_length)
        if max_tokens is None and lead is not None
        else max_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    with console.status("The answers before"):
        opened = open_place(base, device, dtype=dtype, like=lead)
        limit = opened.max_tokens if asked.max_tokens is None else asked.max_tokens
        asked = dataclasses.replace(asked, max_tokens=limit)
        chosen = pick(_once(kept.prompts(opened, limit, seed)), num_prompts, seed)
        seeds = dict(
            zip((p.id for p in chosen), response_seeds(seed, range(len(chosen))), strict=True)
        )
        first = _answer(opened, chosen, seeds, asked)
    comparisons: list[Comparison] = []
    answers = {"before": first.answers}
    for name, place in places.items():
        with console.status(f"The answers of {name}"):
            opened = open_place(place, device, dtype=dtype, like=lead)
            own = kept.prompts(opened, limit, seed, among=seeds)
            side = _answer(opened, own, seeds, asked)
            comparisons.append(_compare(name, first, side, asked))
            answers[name] = side.answers
            del opened, side  # before the next model is loaded
    for table in comparison_tables(comparisons, lower=lower_is_better(settings)):
        console.print(table)
    console.print(answers_table(answers, list(settings), SHOWN))
    if output is not None:
        figures = {
            "before": base.name,
            "num_prompts": len(chosen),
            "max_tokens": limit,
            "seed": seed,
            "comparisons": _plain(comparisons),
            "answers": [_row(prompt, answers) for prompt in chosen],
        }
        write_text(output, json.dumps(figures, indent=1) + "\n")
    return 0


def _named_places(afters: Sequence[str]) -> dict[str, Place]:
    """The models by short names: their own, or the ends of their paths where these differ."""
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


def _rows(prompts: str | None, lead: RunConfig | None) -> tuple[HeldOut, RunConfig | None]:
    """The rows to ask about, and the run that says how prompts are read."""
    if prompts is not None and prompts.endswith((".yaml", ".yml")):
        lead, prompts = load_config(prompts).config, None
    if lead is None and prompts is None:
        raise ConfigError(
            "none of the models is a run folder; say which prompts: --prompts FILE, or a run's "
            "config.yaml for its held-out prompts"
        )
    data = UNNAMED if lead is None else lead.data
    if prompts is not None:
        data = own_prompts(data, prompts)
    return held_out(data, 0 if lead is None else lead.seed), lead


def _once(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each prompt once: logged data has a row per response."""
    return list({tuple(prompt.token_ids): prompt for prompt in reversed(prompts)}.values())[::-1]


def _answer(
    opened: OpenModel, prompts: list[Prompt], seeds: Mapping[int, int], asked: _Asked
) -> _Side:
    """Fresh answers with their values; the random numbers of a prompt are those of every model."""
    assert asked.max_tokens is not None
    completions = opened.engine(Sampling(), asked.batch_size).generate(
        prompts, [asked.max_tokens] * len(prompts), [seeds[prompt.id] for prompt in prompts]
    )
    rollout = collate(prompts, completions, opened.tokenizer, temperature=1.0, device=opened.device)
    scores = score_alone(asked.measures, rollout)
    column = asked.kept.data.prompt_columns[0]
    answers = {
        prompt.id: Answer(
            prompt_id=prompt.id,
            prompt=prompt_text(prompt, column),
            group=asked.groups[prompt.id],
            text=rollout.responses[i],
            values={name: values[i] for name, values in scores.items()} | style_values(rollout, i),
        )
        for i, prompt in enumerate(prompts)
    }
    return _Side(opened=opened, rollout=rollout, answers=answers)


def _compare(name: str, first: _Side, second: _Side, asked: _Asked) -> Comparison:
    """Every figure of one AFTER, on the prompts that both models could read."""
    prompts = second.rollout.prompts
    before = [first.answers[prompt.id] for prompt in prompts]
    after = [second.answers[prompt.id] for prompt in prompts]
    texts = [one.text for one in before], [one.text for one in after]
    duels = {
        measure.name: matches(measure, prompts, *texts)
        for measure in asked.measures
        if measure.compares_directly
    }
    return Comparison(
        name=name,
        model=second.opened.name,
        whole=compare_answers(before, after, duels),
        groups=by_group(before, after, duels),
        num_identical=sum(b == a for b, a in zip(*texts, strict=True)),
        words=words_of(before, after),
        weights=_weight_change(first.opened, second.opened),
        outputs=_output_change(first, second, asked.batch_size),
    )


def _weight_change(before: OpenModel, after: OpenModel) -> WeightChange | str:
    try:
        return weight_change(before.model, after.model)
    except ValueError as error:
        return str(error)


def _output_change(first: _Side, second: _Side, batch_size: int) -> OutputChange | str:
    before, after = first.opened, second.opened
    width = [len(one.model.get_output_embeddings().weight) for one in (before, after)]
    if width[0] != width[1] or before.tokenizer.get_vocab() != after.tokenizer.get_vocab():
        return "the vocabularies differ"
    models = CausalLM(before.model), CausalLM(after.model)
    return output_change(*models, first.rollout, second.rollout, batch_size)


def _row(prompt: Prompt, answers: Mapping[str, Mapping[int, Answer]]) -> dict[str, Any]:
    """A prompt with what every model said to it."""
    there = {name: side[prompt.id] for name, side in answers.items() if prompt.id in side}
    return {
        "prompt_id": prompt.id,
        "prompt": there["before"].prompt,
        "group": there["before"].group,
        "answers": {
            name: {"response": answer.text} | _plain(answer.values)
            for name, answer in there.items()
        },
    }


def _plain(value: Any) -> Any:
    """Dataclasses as mappings, and what JSON has no number for as null."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
