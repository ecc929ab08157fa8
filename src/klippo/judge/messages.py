"""What is asked of a judge and what comes back: the line between rubric and transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question to the judge."""

    messages: tuple[Mapping[str, str], ...]
    """Mappings with `role` and `content`, in order."""
    max_tokens: int
    """Longest answer; a truncated or empty one is asked for again with 4 times as many."""
    schema: Mapping[str, Any] | None = None
    """JSON schema of the answer, enforced where the server can."""
    labels: tuple[str, ...] = ()
    """Where not empty, log-probs of the first answer token are asked for."""
    vote: int = 0
    """Number of this vote on the same question; each has an answer of its own in the cache."""
    temperature: float | None = None
    """Left out of the call where None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a request; `cause` says why there is nothing to use."""

    text: str | None
    """None where there is no usable text."""
    label_logprobs: Mapping[str, float] | None
    """Token text -> log-prob of the first answer token in nats; None where the server gave none."""
    cause: str | None
    """None: fine. Else `refusal`, `truncated`, `empty`, `too_large`, `parse`, `rejected`,
    `transport` or `stopped`."""
    cached: bool
    """True where no call was made for it: an earlier answer was stored."""
    prompt_tokens: int
    """Of the answer's call, as the server counts; 0 where cached."""
    completion_tokens: int
    """The same for what it wrote."""
    cost_usd: float | None
    """Of all attempts for this answer; None without prices, 0 where cached."""
    num_attempts: int
    """HTTP calls made for this answer; 0 where cached."""


@runtime_checkable
class JudgeBackend(Protocol):
    """Anything that answers requests: the client here, or a user's own in ten lines."""

    async def ask(self, request: Request) -> Answer:
        """Answer one request.

        What concerns one request alone is an Answer with a cause; what stops the run is raised.
        """
        ...
