"""From prompts and completions to tensors: lengths, masks, stop tokens.

B sequences, P prompt tokens, T response tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from klippo.errors import ConfigError
from klippo.types import Completion, Prompt, Rollout, TokenBatch, Tokenizer


def truncate_after_stop(token_ids: Sequence[int], stop_ids: frozenset[int]) -> Completion:
    """Everything up to and including the first stop token; unfinished without one."""
    for t, token in enumerate(token_ids):
        if token in stop_ids:
            return Completion(token_ids=list(token_ids[: t + 1]), finished=True)
    return Completion(token_ids=list(token_ids), finished=False)


def collate(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    tokenizer: Tokenizer,
    *,
    temperature: float,
    device: torch.device | str,
) -> Rollout:
    """A Rollout of B prompts and their completions; every completion has at least one token."""
    prompt_ids, prompt_mask = left_pad([prompt.token_ids for prompt in prompts], device)
    rows = [completion.token_ids for completion in completions]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    width = int(lengths.max())
    response_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    response_mask = torch.arange(width, device=device) < lengths[:, None]
    logprobs: Tensor | None = None
    if all(completion.logprobs is not None for completion in completions):
        own = [completion.logprobs or [] for completion in completions]
        logprobs = torch.tensor([row + [0.0] * (width - len(row)) for row in own], device=device)
    return Rollout(
        prompts=list(prompts),
        responses=decode(rows, tokenizer),
        tokens=TokenBatch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask.bool(),
            response_ids=response_ids,
            response_mask=response_mask,
        ),
        finished=torch.tensor([completion.finished for completion in completions], device=device),
        temperature=temperature,
        behavior_logprobs=logprobs,
    )


def decode(rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[str]:
    """Responses as text for rewards and people: special tokens are left out."""
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def stop_token_ids(
    tokenizer: Tokenizer, generation_config: Any | None, *, at_eos: bool, extra: Iterable[str | int]
) -> frozenset[int]:
    """The set of tokens that end a response.

    Raises ConfigError for a stop text that is not exactly one token.
    """
    stops: set[int] = set()
    if at_eos:
        eos = getattr(generation_config, "eos_token_id", None)
        stops.update([eos] if isinstance(eos, int) else eos or [])
        if tokenizer.eos_token_id is not None:
            stops.add(tokenizer.eos_token_id)
    for stop in extra:
        ids = [stop] if isinstance(stop, int) else tokenizer.encode(stop, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(
                f"rollout.stop_tokens: {stop!r} is {len(ids)} tokens for this tokenizer, and a "
                f"stop token must be one; give one token's text or id (its tokens: {ids})"
            )
        stops.update(ids)
    return frozenset(stops)


def left_pad(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids (B, P) padded on the left with 0, and their int64 mask, both from lengths."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
