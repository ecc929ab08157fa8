"""A policy's weights as another program reads them: adapters folded in, checkpoint names."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from klippo.policy.actor_critic import ActorCritic
from klippo.policy.weights import effective_weights


@torch.no_grad()
def merged_weights(policy: ActorCritic) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the causal LM, one after the other; the policy's own stay as they are.

    Those of `effective_weights` (float32), and the buffers that a checkpoint holds. A head that is
    tied to the embedding is not repeated.
    """
    model = policy.lm.model
    yield from effective_weights(model)
    stored = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
