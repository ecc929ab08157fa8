"""One batch of experience from the parts that the processes hold.

B sequences, P prompt tokens, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from klippo.ppo.experience import Experience
from klippo.ranks import Ranks
from klippo.types import TokenBatch

OF_PROMPTS = ("prompt_ids", "prompt_mask")  # (B, P)
OF_RESPONSES = ("response_ids", "response_mask")  # (B, T)
OF_TOKENS = (
    "hidden",  # (B, T, D)
    "mask",
    "old_logprobs",
    "ref_logprobs",
    "old_values",
    "token_rewards",
    "advantages",
    "returns",
    "weights",
)  # (B, T), or None


def gather_experience(experience: Experience, ranks: Ranks) -> Experience:
    """The same with the rows of all processes, those of the first process first.

    These are numbers (with frozen blocks, a hidden state too) per token, small beside any model,
    and with them each process knows every minibatch: which rows learn together does not depend on
    the number of processes.
    """
    if ranks.world_size == 1:
        return experience
    tokens = experience.tokens
    own = {name: getattr(tokens, name).cpu() for name in OF_PROMPTS + OF_RESPONSES}
    if tokens.frozen_states is not None:
        width = tokens.prompt_ids.shape[1]
        own["prompt_states"] = tokens.frozen_states[:, :width].cpu()
        own["response_states"] = tokens.frozen_states[:, width:].cpu()
    for name in OF_TOKENS:
        if getattr(experience, name) is not None:
            own[name] = getattr(experience, name).cpu()
    parts = ranks.gather(own)
    joined: dict[str, Any] = {
        name: _joined([part[name] for part in parts], left=name.startswith("prompt")).to(
            experience.mask.device
        )
        for name in own
    }
    of_batch = {name: joined.pop(name) for name in OF_PROMPTS + OF_RESPONSES}
    if tokens.frozen_states is not None:
        halves = joined.pop("prompt_states"), joined.pop("response_states")
        of_batch["frozen_states"] = torch.cat(halves, 1)
    return replace(experience, tokens=TokenBatch(**of_batch), **joined)


def _joined(parts: Sequence[Tensor], *, left: bool) -> Tensor:
    """(B, width, ...) parts one after the other, padded with zeros to the widest."""
    width = max(part.shape[1] for part in parts)
    sides = [(width - part.shape[1], 0) if left else (0, width - part.shape[1]) for part in parts]
    inner = (0, 0) * (parts[0].dim() - 2)  # `pad` counts from the last dimension
    return torch.cat([pad(part, inner + side) for part, side in zip(parts, sides, strict=True)])
