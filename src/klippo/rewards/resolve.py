"""Scores from any reward source, sync or async, for callers that are not async."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from klippo.errors import NotFiniteRewardError, RewardError
from klippo.rewards.combined import SumReward
from klippo.types import EagerRewardSource, Prompt, RewardSource, Rollout, Scores

T = TypeVar("T")

CLOSING_S = 15.0
"""Longest that a source may take to close."""


def resolve_scores(
    source: RewardSource, rollout: Rollout, *, skip_not_finite: bool = False
) -> Scores:
    """Score a rollout, waiting for an async source; also inside a running event loop (a notebook).

    Async sources all run on one event loop in a thread of its own, so that what they keep between
    calls (connections) stays usable. With `skip_not_finite` a response whose reward is no finite
    number counts as unscored, and `not_finite` says so. Raises RewardError when the scores do
    not fit the rollout, NotFiniteRewardError for such a reward.
    """
    result = source.score(rollout)
    scores = wait_for(result) if inspect.isawaitable(result) else result
    if not isinstance(scores, Scores):
        raise RewardError(
            f"{type(source).__name__}.score returned {type(scores).__name__}, not Scores"
        )
    shape, dtype = tuple(scores.reward.shape), scores.reward.dtype
    if shape != (len(rollout),) or not dtype.is_floating_point:
        raise RewardError(
            f"{type(source).__name__}.score returned {dtype} rewards of shape {shape}; float32 of "
            f"shape ({len(rollout)},) is needed, one per response"
        )
    infinite = scores.reward.isinf()
    not_finite = {
        row: f"{type(source).__name__}.score returned {float(scores.reward[row])} for row {row} "
        f"(prompt {rollout.prompts[row].text[:60]!r}); return NaN for a response that cannot be "
        "scored"
        for row in infinite.nonzero().flatten().tolist()
    } | dict(scores.not_finite)
    if not not_finite:
        return scores
    if not skip_not_finite:
        raise NotFiniteRewardError(
            f"{not_finite[min(not_finite)]}, or leave such responses out with "
            "health.reward_not_finite=skip"
        )
    reward = torch.where(infinite, torch.full_like(scores.reward, torch.nan), scores.reward)
    return replace(scores, reward=reward, not_finite=not_finite)


def begin_with(source: RewardSource) -> Callable[[Prompt, str], None] | None:
    """What starts the scoring of one finished response; None if all are scored as a batch."""
    eager = list(_eager(source))
    if not eager:
        return None

    def begin(prompt: Prompt, response: str) -> None:
        for one in eager:
            asyncio.run_coroutine_threadsafe(one.begin(prompt, response), _event_loop())

    return begin


def _eager(source: RewardSource) -> Iterator[EagerRewardSource]:
    if isinstance(source, SumReward):
        for part in source.parts.values():
            yield from _eager(part.source)
    elif isinstance(source, EagerRewardSource):
        yield source


def close_source(source: RewardSource) -> None:
    """Let a source that waits for answers end in order; others have nothing to end."""
    close = getattr(source, "close", None)
    if close is not None:
        asyncio.run_coroutine_threadsafe(close(), _event_loop()).result(CLOSING_S)


def wait_for(result: Awaitable[T]) -> T:
    """What a source's own call gives, awaited on the loop on which it scores."""

    async def finish() -> T:
        return await result

    future = asyncio.run_coroutine_threadsafe(finish(), _event_loop())
    try:
        return future.result()
    except BaseException:  # Ctrl-C reaches this thread, not the loop's
        future.cancel()
        raise


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()

    def run() -> None:
        torch.set_grad_enabled(False)  # per thread
        loop.run_forever()

    threading.Thread(target=run, name="klippo-rewards", daemon=True).start()
    return loop
