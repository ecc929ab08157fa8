"""The stage behind `klippo compare`: the same prompts through two models, answer against answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from klippo.config.load import load_config
from klippo.data.prompts import build_prompts
from klippo.data.rows import load_rows, train_source, validation_source
from klippo.data.settings import DataSettings
from klippo.errors import ConfigError
from klippo.evaluation.samples import SampleRow
from klippo.report.tables import change_table, compare_rows, samples_table
from klippo.rewards.resolve import resolve_scores
from klippo.rewards.settings import ColumnSettings, RewardSettings
from klippo.rollouts.collate import collate
from klippo.rollouts.sampling import Sampling
from klippo.rollouts.seeds import response_seeds
from klippo.runs.folder import CONFIG_FILE, STATUS_FILE, write_text
from klippo.stages.build import build_reward, choose_device, room_for_prompts
from klippo.stages.models import OpenModel, open_model
from klippo.stages.reward_names import reward_named
from klippo.stages.session import pick
from klippo.types import Prompt, Rollout

SHOWN = 5


def compare(
    before: str,
    after: str,
    *,
    prompts: Path | None = None,
    reward: str | None = None,
    num_prompts: int = 64,
    output: Path | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
) -> int:
    """Print whether the answers changed and, given a reward, whether they got better."""
    console = Console()
    device = choose_device("auto")
    settings = _reward_settings(reward, before, after)
    first, second = open_model(before, device), open_model(after, device)
    data = second.data if prompts is None else own_prompts(second.data, str(prompts))
    if data.train == "prompts":
        raise ConfigError("neither model is a run folder; say which prompts: --prompts FILE")
    scorer = None
    if settings is not None:
        scorer = build_reward(settings, device=device, prompt_column=data.prompt_columns[0])
    sides = []
    for opened in (first, second):
        limit = second.max_tokens if max_tokens is None else max_tokens
        asked = held_out_prompts(opened, data, second.data_seed, num_prompts, limit, seed)
        rollout = _answers(opened, asked, limit, seed)
        scores = None if scorer is None else resolve_scores(scorer, rollout).reward
        sides.append(_rows(rollout, scores))
    before_rows, after_rows = sides
    compared = compare_rows(before_rows, after_rows)
    same = sum(a["response"] == b["response"] for a, b in zip(*sides, strict=True))
    console.print(samples_table(before_rows[:SHOWN], after_rows[:SHOWN]))
    console.print(change_table(compared, len(before_rows)))
    console.print(
        f"{same} of {len(before_rows)} answers are identical "
        "(both models drew the same random numbers).",
        soft_wrap=True,
    )
    if output is not None:
        figures = {
            key: {
                "difference": c.difference.mean,
                "low": c.difference.low,
                "high": c.difference.high,
            }
            for key, c in compared.items()
        }
        pairs = [{"before": b, "after": a} for b, a in zip(*sides, strict=True)]
        text = json.dumps({"identical": same, "measures": figures, "pairs": pairs}, indent=1)
        write_text(output, text + "\n")
    return 0


def _answers(opened: OpenModel, prompts: list[Prompt], max_tokens: int, seed: int) -> Rollout:
    """Fresh answers, with the same random numbers for each model."""
    limits = [max_tokens] * len(prompts)
    seeds = response_seeds(seed, range(len(prompts)))
    completions = opened.engine(Sampling()).generate(prompts, limits, seeds)
    return collate(prompts, completions, opened.tokenizer, temperature=1.0, device=opened.device)


def own_prompts(data: DataSettings, source: str) -> DataSettings:
    """The same reading of prompts, of another file or data set as a whole."""
    whole = {"train": source, "subset": None, "split": "train"}
    return data.model_copy(update=whole | {"validation": None, "validation_size": 0})


def held_out_prompts(
    opened: OpenModel,
    data: DataSettings,
    data_seed: int,
    num_prompts: int,
    max_tokens: int,
    seed: int,
) -> list[Prompt]:
    """Prompts as the model reads them: of the held-out rows, or of all where none are held out.

    `data_seed` held them out when the run trained; `seed` chooses among them.
    """
    rows, held_out = load_rows(data, data_seed)
    room = room_for_prompts(opened.model, max_tokens, data.max_prompt_tokens)
    prompts = build_prompts(
        held_out or rows,
        data,
        opened.tokenizer,
        max_prompt_tokens=room,
        seed=seed,
        source=validation_source(data) if held_out else train_source(data),
    )
    return pick(prompts, num_prompts, seed)


def _rows(rollout: Rollout, scores: torch.Tensor | None) -> list[SampleRow]:
    rows: list[SampleRow] = []
    for i, prompt in enumerate(rollout.prompts):
        row: dict[str, Any] = {
            "prompt": prompt.text,
            "response": rollout.responses[i],
            "length": int(rollout.tokens.response_mask[i].sum()),
            "finished": bool(rollout.finished[i]),
        }
        if scores is not None:
            row["reward"] = None if bool(scores[i].isnan()) else float(scores[i])
        rows.append(row)
    return rows


def _reward_settings(reward: str | None, *runs: str) -> RewardSettings | None:
    """The reward asked for; without one, the gold reward of a run (or else its training reward).

    None where that is a column of logged responses, which says nothing about fresh ones.
    """
    if reward is not None:
        return reward_named(reward)
    for run in reversed(runs):
        if (Path(run) / STATUS_FILE).is_file():
            config = load_config(Path(run) / CONFIG_FILE).config
            reads = config.gold or config.reward
            return None if isinstance(reads, ColumnSettings) else reads
    return None
