"""Answers, put together."""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict, Unpack

from klippo.judge.messages import Answer
from klippo.judge.wire import Reply


class Figures(TypedDict, total=False):
    """What an answer cost."""

    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    num_attempts: int


NOTHING: Figures = {
    "prompt_tokens": 0,
    "completion_tokens": 0,
    "cost_usd": 0.0,
    "num_attempts": 0,
}


def answered(reply: Reply, **figures: Unpack[Figures]) -> Answer:
    """What a server replied."""
    return Answer(
        text=reply.text,
        label_logprobs=reply.label_logprobs,
        cause=reply.cause,
        cached=False,
        **(NOTHING | figures),
    )


def failed(cause: str, **figures: Unpack[Figures]) -> Answer:
    """Nothing to use, and why."""
    return Answer(text=None, label_logprobs=None, cause=cause, cached=False, **(NOTHING | figures))


def free(answer: Answer) -> Answer:
    """The same answer for one who asked meanwhile and caused no call."""
    return replace(answer, cached=True, **NOTHING)
