"""What is asked of a judge and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question to the judge."""

    messages: tuple[Mapping[str, str], ...]
    """Mappings with `role` and `content`, in order."""
    max_tokens: int
    """Longest answer; a truncated or empty one is asked for again with 4 times as many."""
    schema: Mapping[str, object] | None = None
    """JSON schema of the answer, enforced if the server can."""
    labels: tuple[str, ...] = ()
    """If not empty, log-probs of the first answer token are asked for."""
    vote: int = 0
    """Number of this vote on the same question; the cache keeps one answer per vote."""
    temperature: float | None = None
    """Left out of the call if None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The outcome of a request."""

    text: str | None = None
    """None if there is no usable text."""
    label_logprobs: Mapping[str, float] | None = None
    """Token text -> log-prob of the first answer token in nats; None if the server gave none."""
    cause: str | None = None
    """Why there is nothing to use: `refusal`, `truncated`, `empty`, `too_large`, `parse`,
    `rejected`, `transport` or `stopped`; None if all is well."""
    cached: bool = False
    """True if no call was made, because an earlier answer was stored."""
    prompt_tokens: int = 0
    """As the server counts them; 0 if cached."""
    completion_tokens: int = 0
    """What the judge wrote; 0 if cached."""
    cost_usd: float | None = 0.0
    """Of all attempts for this answer; None without prices, 0 if cached."""
    num_attempts: int = 0
    """HTTP calls made for this answer; 0 if cached."""


@runtime_checkable
class JudgeBackend(Protocol):
    """Anything that answers requests: `JudgeClient`, or your own in ten lines."""

    async def ask(self, request: Request) -> Answer:
        """Answer one request.

        Return an Answer with a cause for what concerns this request alone; raise what stops the
        run.
        """
        ...
