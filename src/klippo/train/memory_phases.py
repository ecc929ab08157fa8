"""What each phase of a step holds beside the models, found on shapes alone.

B sequences, P prompt tokens, T response tokens, S tokens of a scored text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.policy.tracing import IN_BLOCKS, Bytes, LiveBytes, storage_bytes
from klippo.rollouts.sampling import Sampling, draw
from klippo.types import TokenBatch

META = torch.device("meta")


def generation_bytes(policy: ActorCritic, rows: int, prompt: int, response: int) -> Bytes:
    """Sampling B=`rows` responses: the cache, and the first or the last token's forward pass."""
    return _largest(
        _decoding_bytes(policy, rows, 0, prompt),
        _decoding_bytes(policy, rows, prompt + response - 2, 1),
    )


def _decoding_bytes(policy: ActorCritic, rows: int, cached: int, new: int) -> Bytes:
    """One forward pass over `new` tokens behind `cached` ones, and a draw."""
    from transformers import DynamicCache

    model: Any = policy.lm.model
    with _traced(policy) as live, torch.no_grad():
        cache: Any = DynamicCache(config=model.config)
        if cached > 0:
            model(input_ids=_ids(rows, 1), past_key_values=cache, use_cache=True)
            for layer in cache.layers:
                shape = [*layer.keys.shape[:2], cached, layer.keys.shape[-1]]
                layer.keys, layer.values = (
                    layer.keys.new_empty(shape),
                    layer.values.new_empty(shape),
                )
        mask = torch.ones(rows, cached + new, dtype=torch.long, device=META)
        output = model(
            input_ids=_ids(rows, new),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        numbers = torch.zeros(rows, dtype=torch.float64, device=META)
        draw(output.logits[:, -1].float(), Sampling(), numbers)
        held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        cache_bytes = min(storage_bytes(held), live.at_peak.get("activations", 0))
    found = dict(live.at_peak)
    found["activations"] = found.get("activations", 0) - cache_bytes
    return found | {"key-value cache": cache_bytes}


def forward_bytes(
    policy: ActorCritic, reference: Reference, rows: int, prompt: int, response: int
) -> Bytes:
    """Log-probs, entropy and values of B=`rows` sequences, and the reference's log-probs."""
    with _traced(policy, reference) as live, torch.no_grad():
        batch = policy.lm.with_frozen_states(_batch(rows, prompt, response))
        policy(batch, 1.0)
        reference.logprobs(batch, 1.0)
    return live.at_peak


def frozen_state_bytes(policy: ActorCritic, rows: int, prompt: int, response: int) -> Bytes:
    """What frozen blocks make of a rollout batch of B=`rows`, kept until the update is done."""
    with _traced(policy):
        states = policy.lm.with_frozen_states(_batch(1, prompt, response)).frozen_states
    return {} if states is None else {"outputs of frozen blocks": rows * states.nbytes}


def evaluation_bytes(
    policy: ActorCritic, reference: Reference, rows: int, prompt: int, response: int
) -> Bytes:
    """The exact KL of B=`rows` sequences, over whole chunks of logits of both models."""
    with _traced(policy, reference) as live, torch.no_grad():
        batch = policy.lm.with_frozen_states(_batch(rows, prompt, response))
        reference.compare(policy.lm, batch, 1.0, policy.lm.hidden(batch))
    return live.at_peak


def update_bytes(
    policy: ActorCritic, rows: int, prompt: int, response: int, *, parts: int, with_entropy: bool
) -> Bytes:
    """Forward and backward passes over micro-batches of B=`rows`; several add their gradients up.

    The gradients at that moment are told apart from what the passes hold.
    """
    batch = _batch(rows, prompt, response)
    policy.train()
    with _traced(policy) as live:
        for _ in range(min(parts, 2)):
            known = policy.lm.with_frozen_states(batch)
            torch.autograd.backward(update_loss(policy, known, with_entropy=with_entropy))
        gradients = storage_bytes(
            p.grad for p in policy.parameters() if p.grad is not None and live.had(p.grad)
        )
    policy.zero_grad(set_to_none=True)
    policy.eval()
    found = dict(live.at_peak)
    found["activations"] = found.get("activations", 0) - gradients
    return found | {"gradients": gradients}


def update_loss(policy: ActorCritic, batch: TokenBatch, *, with_entropy: bool) -> torch.Tensor:
    """A loss that runs what PPO's loss runs: trunk, LM head in one pass, critic."""
    hidden = policy.lm.hidden(batch)

    def loss_of(logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logprobs + entropy, logprobs[:, None].detach()

    mask = torch.ones_like(batch.response_mask)
    loss, _ = policy.lm.loss(batch, mask, hidden, 1.0, loss_of, {}, with_entropy=with_entropy)
    values: torch.Tensor = policy.critic(batch, hidden, after_last=False)
    return loss + values.sum()


def scoring_bytes(scorer: nn.Module, rows: int, length: int) -> Bytes:
    """A reward model's forward pass over B=`rows` texts of S=`length` tokens."""
    live = LiveBytes(0, [*scorer.parameters(), *scorer.buffers()])
    with live, torch.no_grad():
        scorer(_ids(rows, length), torch.ones(rows, length, dtype=torch.long, device=META))
    return live.at_peak


@contextmanager
def _traced(policy: ActorCritic, reference: Reference | None = None) -> Iterator[LiveBytes]:
    modules: list[nn.Module] = [policy] if reference is None else [policy, reference.lm]
    known = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    vocabulary = len(policy.lm.model.get_output_embeddings().weight)
    live = LiveBytes(vocabulary, known)
    with live:
        yield live


def _ids(rows: int, length: int) -> torch.Tensor:
    return torch.zeros(rows, length, dtype=torch.long, device=META)


def _batch(rows: int, prompt: int, response: int) -> TokenBatch:
    return TokenBatch(
        prompt_ids=_ids(rows, prompt),
        prompt_mask=_ids(rows, prompt).bool(),
        response_ids=_ids(rows, response),
        response_mask=_ids(rows, response).bool(),
    )


def _largest(*phases: Bytes) -> Bytes:
    return max(phases, key=total_bytes)


def total_bytes(found: Bytes) -> int:
    """Of all kinds."""
    return sum(size for kind, size in found.items() if kind != IN_BLOCKS)
