"""How many tokens fit: the model's context, the longest response, room for prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klippo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def longest(response_length: int | list[int]) -> int:
    """The most tokens that a response may have."""
    return response_length if isinstance(response_length, int) else response_length[1]


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that the model's positions allow; None if its config does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


def room_for_prompts(
    model: PreTrainedModel, response_length: int | list[int], limit: int | None
) -> int:
    """The longest prompt, in tokens, that leaves room for the longest response.

    Raises ConfigError if none does.
    """
    context = context_length(model)
    if context is None:
        return limit or 2**31
    room = context - longest(response_length)
    if room < 1:
        raise ConfigError(
            f"rollout.response_length={response_length} leaves no room for a prompt: the model's "
            f"context is {context} tokens; use at most {context - 1}"
        )
    return room if limit is None else min(room, limit)
