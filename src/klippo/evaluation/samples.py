"""Samples of the fixed evaluation prompts: one row each, with proxy score and KL; gold comes later.

B sequences, T response tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.tensors.estimators import masked_sum
from klippo.types import Prompt, Rollout, Scores, TokenBatch

SampleRow = dict[str, Any]
"""step, episodes, prompt_id, prompt, response, response_ids, length, finished, proxy, kl_k1_nats,
kl_exact_nats; then members and parts where the reward has them; prompt_content where the data has a
template, and columns; last gold and gold_model, once it was scored."""
MAX_COLUMN = 2000
"""Longest column that rows keep, in characters of JSON."""


@torch.no_grad()
def evaluate(
    policy: ActorCritic,
    reference: Reference,
    rollout: Rollout,
    scores: Scores,
    *,
    step: int,
    episodes: int,
    parts: Sequence[Tensor],
) -> list[SampleRow]:
    """Rows for a rollout of the evaluation prompts, in its order; KL in nats per sequence.

    `parts`: the rollout's row numbers, each once, in groups that pass together.
    """
    rows: dict[int, SampleRow] = {}
    ids = rollout.response_token_ids()
    for index in parts:
        tokens = policy.lm.with_frozen_states(rollout.tokens.rows(index))
        mask = tokens.response_mask
        hidden = policy.lm.hidden(tokens)
        logprobs, _, ref_logprobs, kl = reference.compare(
            policy.lm, tokens, rollout.temperature, hidden
        )
        kl_k1 = masked_sum(logprobs - ref_logprobs, mask, 1).tolist()
        kl_exact = masked_sum(kl, mask, 1).tolist()
        for i, k1_nats, exact_nats in zip(index.tolist(), kl_k1, kl_exact, strict=True):
            row: SampleRow = {
                "step": step,
                "episodes": episodes,
                "prompt_id": rollout.prompts[i].id,
                "prompt": rollout.prompts[i].text,
                "response": rollout.responses[i],
                "response_ids": ids[i],
                "length": len(ids[i]),
                "finished": bool(rollout.finished[i]),
                "proxy": _number(scores.reward[i]),
                "kl_k1_nats": k1_nats,
                "kl_exact_nats": exact_nats,
            }
            if scores.members is not None:
                row["members"] = [_number(member) for member in scores.members[:, i]]
            if scores.parts:
                row["parts"] = {name: _number(part[i]) for name, part in scores.parts.items()}
            rows[i] = row | rest_of_prompt(rollout.prompts[i])
    return [rows[i] for i in range(len(rollout))]


def rest_of_prompt(prompt: Prompt, max_column: int | None = MAX_COLUMN) -> dict[str, Any]:
    """What rewards read beside a prompt's text: its content without template, and the columns.

    Columns that JSON cannot hold, or longer than `max_column` characters, are left out.
    """
    rest: dict[str, Any] = {}
    if prompt.content is not None:
        rest["prompt_content"] = prompt.content
    rest["columns"] = {}
    for name, value in prompt.meta.items():
        try:
            length = len(json.dumps(value, ensure_ascii=False))
        except (TypeError, ValueError):
            continue
        if max_column is None or length <= max_column:
            rest["columns"][name] = value
    return rest


def prompt_of(row: Mapping[str, Any], prompt_column: str = "prompt") -> Prompt:
    """The prompt of a row, for rewards; its token ids are not kept.

    Rows without columns have `prompt_column` alone: what the policy read.
    """
    return Prompt(
        id=row["prompt_id"],
        text=row["prompt"],
        token_ids=[],
        content=row.get("prompt_content"),
        meta=row.get("columns", {prompt_column: row["prompt"]}),
    )


def rollout_of(rows: Sequence[SampleRow], prompts: Sequence[Prompt]) -> Rollout:
    """Rows as a Rollout again, for reward sources; prompt tokens are not kept: a dummy each."""
    lengths = torch.tensor([row["length"] for row in rows])
    width = int(lengths.max())
    padded = [row["response_ids"] + [0] * (width - row["length"]) for row in rows]
    prompt_ids = torch.zeros(len(rows), 1, dtype=torch.long)
    return Rollout(
        prompts=list(prompts),
        responses=[row["response"] for row in rows],
        tokens=TokenBatch(
            prompt_ids=prompt_ids,
            prompt_mask=torch.ones_like(prompt_ids, dtype=torch.bool),
            response_ids=torch.tensor(padded),
            response_mask=torch.arange(width) < lengths[:, None],
        ),
        finished=torch.tensor([row["finished"] for row in rows]),
        temperature=1.0,
    )


def summarize(rows: Sequence[SampleRow]) -> dict[str, float]:
    """Means over rows that were scored; keys name their units."""
    keys = {
        "eval/proxy_mean": "proxy",
        "eval/gold_mean": "gold",
        "eval/kl_exact_nats": "kl_exact_nats",
        "eval/kl_k1_nats": "kl_k1_nats",
        "eval/length_tokens": "length",
        "eval/finished_share": "finished",
    }
    summary = {}
    for name, key in keys.items():
        values = [float(row[key]) for row in rows if row.get(key) is not None]
        if values:
            summary[name] = sum(values) / len(values)
    return summary


def _number(value: torch.Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)
