"""Sampling with a Hugging Face causal LM and its key-value cache.

B prompts still decoding, P prompt tokens, V vocabulary. Rows leave the batch when they are done, so
that a short response costs no more than its own tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from klippo.rollouts.collate import left_pad
from klippo.rollouts.sampling import Sampling, draw, uniforms
from klippo.types import Completion, OnDone, Prompt


class HFEngine:
    """The policy's own weights: nothing to sync, log-probs in the policy's precision."""

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: frozenset[int],
        sampling: Sampling,
        batch_size: int | None = None,
        record_logprobs: bool = False,
        autocast: bool = False,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Responses are sampled inside `around()`, which prepares the model."""
        self.model = model
        self.stop_ids = stop_ids
        self.sampling = sampling
        self.batch_size = batch_size
        self.record_logprobs = record_logprobs
        self.autocast = autocast
        self._around = around
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def sync(self) -> None:
        """The engine decodes with the policy's own weights: they are always current."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_lengths: Sequence[int],
        seeds: Sequence[int],
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in order; at most `max_lengths[i]` tokens each.

        `seeds[i]` alone decides the random numbers of completion i. `on_done(i, completion)` is
        called for each when it is finished.
        """
        size = self.batch_size or len(prompts)
        # Prompts of like length share a batch: little padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        done: dict[int, Completion] = {}
        with self._around():
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                decoding = self._decode(
                    [prompts[i] for i in rows],
                    [max_lengths[i] for i in rows],
                    [seeds[i] for i in rows],
                )
                for row, completion in decoding:
                    done[rows[row]] = completion
                    if on_done is not None:
                        on_done(rows[row], completion)
        return [done[i] for i in range(len(prompts))]

    @torch.no_grad()
    def _decode(
        self, prompts: list[Prompt], max_lengths: list[int], seeds: list[int]
    ) -> Iterator[tuple[int, Completion]]:
        """Each completion with its row among `prompts`, when it is finished."""
        from transformers import DynamicCache

        device = self.model.get_input_embeddings().weight.device
        step_ids, mask = left_pad([prompt.token_ids for prompt in prompts], device)
        limits = torch.tensor(max_lengths, device=device)
        random = uniforms(seeds, max(max_lengths)).to(device)  # (B, T) float64
        stops = torch.tensor(sorted(self.stop_ids), device=device, dtype=torch.long)
        rows = torch.arange(len(prompts), device=device)  # (B,) which prompt a batch row serves
        cache = DynamicCache(config=self.model.config)
        token_ids: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        for t in range(max(max_lengths)):
            logits = self._next_logits(step_ids, mask, cache)
            drawn, drawn_logprobs = draw(logits, self.sampling, random[rows, t])
            stopped = torch.isin(drawn, stops)
            alive = ~stopped & (t + 1 < limits)
            for row, token, logprob, stop, more in zip(
                rows.tolist(),
                drawn.tolist(),
                drawn_logprobs.tolist(),
                stopped.tolist(),
                alive.tolist(),
                strict=True,
            ):
                token_ids[row].append(token)
                logprobs[row].append(logprob)
                if not more:
                    yield (
                        row,
                        Completion(
                            token_ids=token_ids[row],
                            finished=stop,
                            logprobs=logprobs[row] if self.record_logprobs else None,
                        ),
                    )
            if not alive.any():
                break
            if not alive.all():
                keep = alive.nonzero().squeeze(1)
                rows, limits, mask, drawn = rows[keep], limits[keep], mask[keep], drawn[keep]
                cache.batch_select_indices(keep)
            step_ids = drawn[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)

    def _next_logits(self, step_ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Logits (B, V) float32 after the newest tokens; the cache grows by them."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step_ids.shape[1] :]
        options = {"position_ids": positions} if self._takes_positions else {}
        with torch.autocast(step_ids.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model(
                input_ids=step_ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **options,
            )
        logits: Tensor = output.logits[:, -1].float()
        return logits
