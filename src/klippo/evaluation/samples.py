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
    kl_k1, kl_exact = torch.zeros(2, len(rollout), dtype=torch.float64).unbind()
    for index in parts:
        tokens = policy.lm.with_frozen_states(rollout.tokens.rows(index))
        mask, hidden = tokens.response_mask, policy.lm.hidden(tokens)
        logprobs, _, ref_logprobs, kl = reference.compare(
            policy.lm, tokens, rollout.temperature, hidden
        )
        kl_k1[index.cpu()] = masked_sum(logprobs - ref_logprobs, mask, 1).double().cpu()
        kl_exact[index.cpu()] = masked_sum(kl, mask, 1).double().cpu()
    rewards, ids = known(scores.reward), rollout.response_token_ids()
    members = [] if scores.members is None else [known(member) for member in scores.members]
    named = {name: known(part) for name, part in scores.parts.items()}
    rows = []
    for i, prompt in enumerate(rollout.prompts):
        row: SampleRow = {
            "step": step,
            "episodes": episodes,
            "prompt_id": prompt.id,
            "prompt": prompt.text,
            "response": rollout.responses[i],
            "response_ids": ids[i],
            "length": len(ids[i]),
            "finished": bool(rollout.finished[i]),
            "proxy": rewards[i],
            "kl_k1_nats": float(kl_k1[i]),
            "kl_exact_nats": float(kl_exact[i]),
        }
        if members:
            row["members"] = [member[i] for member in members]
        if named:
            row["parts"] = {name: part[i] for name, part in named.items()}
        rows.append(row | rest_of_prompt(prompt))
    return rows


def known(scores: Tensor) -> list[float | None]:
    """Scores as JSON holds them: null for NaN, which is a score that is missing."""
    return [None if value != value else value for value in scores.tolist()]


def rest_of_prompt(prompt: Prompt, max_column: int | None = MAX_COLUMN) -> dict[str, Any]:
    """What rewards read beside a prompt's text: its content without template, and the columns.

    Columns that JSON cannot hold, or longer than `max_column` characters, are left out.
    """
    columns = {}
    for name, value in prompt.meta.items():
        try:
            length = len(json.dumps(value, ensure_ascii=False))
        except (TypeError, ValueError):
            continue
        if max_column is None or length <= max_column:
            columns[name] = value
    content = {} if prompt.content is None else {"prompt_content": prompt.content}
    return content | {"columns": columns}


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
    names = {
        "proxy": "proxy_mean",
        "gold": "gold_mean",
        "kl_exact_nats": "kl_exact_nats",
        "kl_k1_nats": "kl_k1_nats",
        "length": "length_tokens",
        "finished": "finished_share",
    }
    values = {key: [float(row[key]) for row in rows if row.get(key) is not None] for key in names}
    return {f"eval/{names[key]}": sum(of) / len(of) for key, of in values.items() if of}
