"""The judge's client: from a request to an answer, whatever the network does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from klippo.errors import BudgetError, JudgeError
from klippo.judge import security, wire
from klippo.judge.answers import Figures, answered, failed, free
from klippo.judge.connections import Connections
from klippo.judge.costs import Meter
from klippo.judge.database import Spend
from klippo.judge.messages import Answer, Request
from klippo.judge.settings import TransportSettings
from klippo.judge.store import Start, Store, Stored, cache_key
from klippo.judge.transport import Exchange, Gate, Timing, Verdict, judge_exchange, post
from klippo.judge.wire import Learned, Usage

logger = logging.getLogger(__name__)

MORE_TOKENS = 4
"""A truncated or empty answer is asked for once more with so many times the tokens."""
STRAYS = 3
"""So many stray bodies in a row are no accident."""


@dataclass
class _Work:
    """One question that is being answered, for everyone who asked it meanwhile."""

    request: Request
    key: str
    max_tokens: int
    num_waiting: int = 0
    num_attempts: int = 0
    num_changes: int = 0
    has_more_tokens: bool = False
    is_claimed: bool = False
    usage: Usage = field(default_factory=lambda: Usage(prompt_tokens=0, completion_tokens=0))
    nano_usd: int = 0


class JudgeClient:
    """Asks a judge, at most `concurrency` calls at a time. One event loop uses it."""

    def __init__(
        self,
        settings: TransportSettings,
        *,
        cache: Path | None = None,
        account: str = "default",
        timing: Timing | None = None,
    ) -> None:
        """Read the key and open the cache; no call is made yet.

        `cache` is the file to use where the settings name none; without either, answers are kept
        in memory. `account` is whose budget this is, in a cache that several runs share. Raises
        PreflightError without a key, ConfigError when the key is for another place.
        """
        assert settings.url is not None  # the settings checked it
        security.refuse_key_in_url(settings.url)
        security.refuse_foreign_key(settings.key_variable, settings.url)
        self.settings = settings
        self.timing = timing or Timing()
        self.gate = Gate(settings.concurrency)
        self.learned = Learned()
        self._secret = security.read_key(settings.key_variable)
        self._wire = wire.WIRES[settings.wire_format]
        self._url = settings.url + self._wire.path
        file = Path(settings.cache).expanduser() if settings.cache is not None else cache
        self.store = Store(file, account)
        self._meter = Meter(settings)
        self._connections = Connections(self._url, self._wire, self._secret)
        self._running: dict[str, tuple[_Work, asyncio.Task[Answer]]] = {}
        self._random = random.Random()  # the pauses; no seed of a run depends on it
        self._fatal: str | None = None
        self._is_stopped = False
        self._halt = asyncio.Event()
        self._num_strays = 0
        self._last_stray = 0.0
        self._told: set[str] = set()

    def __repr__(self) -> str:
        return f"JudgeClient({self.settings.model!r} at {self.settings.url!r})"

    async def ask(self, request: Request) -> Answer:
        """Answer one request, from the cache where it was answered before.

        Raises JudgeError when the judge cannot be used, BudgetError when the budget is used up,
        PreflightError when its address may not be used, StorageError when the cache cannot be
        written. Everything else is an Answer with a cause.
        """
        key = self.key(request)
        stored = self.store.look_up(key)
        if stored is not None:
            return self._from_store(stored)
        if self._is_stopped:
            return failed("stopped")
        while True:
            shared = self._running.get(key)
            work, task = shared or self._begin(request, key)
            work.num_waiting += 1
            try:
                answer = await asyncio.shield(task)
            finally:
                work.num_waiting -= 1
            if answer.cause != "stopped" or self._is_stopped:
                return answer if shared is None else free(answer)

    def key(self, request: Request) -> str:
        """What its answer is stored under."""
        return cache_key(
            {
                "protocol": self.settings.wire_format,
                "origin": security.origin_of(self._url),
                "path": urlsplit(self._url).path,
                "model": self.settings.model,
                "messages": [dict(message) for message in request.messages],
                "max_tokens": request.max_tokens,
                "schema": request.schema,
                "labels": list(request.labels),
                "temperature": request.temperature,
                "vote": request.vote,
            }
        )

    def spend(self) -> Mapping[str, float | int]:
        """Calls, tokens and USD of this account so far, over all processes and restarts.

        Attempts that have not come back count at their worst case; `pending_calls` are theirs.
        """
        total, pending = self.store.total(), self.store.pending()
        return {
            "calls": total.calls,
            "tokens": total.tokens,
            "usd": total.nano_usd / 1e9,
            "pending_calls": pending.calls,
            "pending_usd": pending.nano_usd / 1e9,
        }

    def stop(self) -> None:
        """Issue no new call; those in flight finish. To be called on the client's event loop."""
        self._is_stopped = True
        self._halt.set()
        self.gate.open_all()

    async def close(self, drain_s: float | None = None) -> None:
        """Stop, let the calls in flight finish for so long, and close connections and cache."""
        self.stop()
        tasks = [task for _, task in self._running.values()]
        if tasks:
            patience_s = self.timing.drain_s if drain_s is None else drain_s
            _, late = await asyncio.wait(tasks, timeout=patience_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._connections.close()
        self.store.close()

    def _begin(self, request: Request, key: str) -> tuple[_Work, asyncio.Task[Answer]]:
        work = _Work(request=request, key=key, max_tokens=request.max_tokens)
        task = asyncio.get_running_loop().create_task(self._answer(work))
        self._running[key] = (work, task)
        task.add_done_callback(lambda done: self._end(key, done))
        return work, task

    def _end(self, key: str, task: asyncio.Task[Answer]) -> None:
        self._running.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen, also where everyone who asked has gone

    async def _answer(self, work: _Work) -> Answer:
        """Attempts until there is an answer, a cause, or no patience left."""
        try:
            while True:
                await self.gate.enter()
                try:
                    outcome = await self._step(work)
                finally:
                    self.gate.leave()
                if isinstance(outcome, Answer):
                    return outcome
                await self._rest(outcome)
        finally:
            if work.is_claimed:
                await self.store.release(work.key)

    async def _step(self, work: _Work) -> Answer | float:
        """One attempt, with a place in the gate: the answer, or how long to wait for the next."""
        if self._is_stopped or work.num_waiting == 0:
            return failed("stopped", **self._figures(work))
        if self._fatal is not None:
            raise JudgeError(self._fatal)
        await self._connections.open(allow_plain_http=self.settings.allow_plain_http)
        body = self._wire.body(self.settings.model, work.request, work.max_tokens, self.learned)
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        start, worst = await self._reserve(work, content)
        if start.stored is not None:
            return self._from_store(start.stored)
        if start.kind != "reserved":
            return self.timing.poll_s
        work.is_claimed = True
        verdict = await self._attempt(work, content, start, worst)
        answer = self._conclude(work, body, verdict)
        if answer is not None:
            return answer
        if verdict.kind != "retry":  # the gate waits for a 429; what was learned is tried at once
            return 0.0
        wait_s = self._wait_s(work.num_attempts, verdict)
        logger.debug("judge %s: %s; again in %.2f s", *self._named(verdict.detail), wait_s)
        return wait_s

    async def _rest(self, wait_s: float) -> None:
        """Wait, but not when the client stops meanwhile."""
        if wait_s > 0 and not self._halt.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._halt.wait()

    async def _reserve(self, work: _Work, content: bytes) -> tuple[Start, Spend]:
        worst = self._meter.worst(len(content), len(work.request.messages), work.max_tokens)
        patience_s = self.settings.timeout_s + self.timing.backoff_cap_s + self.timing.pause_cap_s
        start = await self.store.start(
            *(work.key, worst, self._meter.caps),
            attempt_s=self.settings.timeout_s + 1.0,
            patience_s=patience_s,
        )
        if start.kind == "over_budget" and not start.may_fit:
            raise BudgetError(self._meter.over_budget(start, worst))
        return start, worst

    async def _attempt(
        self,
        work: _Work,
        content: bytes,
        start: Start,
        worst: Spend,
    ) -> Verdict:
        """One call, settled in the ledger before anything else happens."""
        began = time.monotonic()
        async with self._connections.connection() as http:
            exchange = await post(http, self._url, content, timeout_s=self.settings.timeout_s)
        if self._secret is not None:  # a server may echo it
            exchange = replace(exchange, body=self._secret.hide_in(exchange.body))
        verdict = self._judge(work, exchange, began)
        actual = self._meter.actual(verdict, exchange, worst)
        work.num_attempts += 1
        work.nano_usd += actual.nano_usd
        stored = self._to_store(work, exchange, verdict)
        await self.store.settle(start.reservation, worst, actual, work.key, stored)
        if verdict.reply is not None:
            self._count(work, verdict.reply.usage, worst)
        return verdict

    def _judge(self, work: _Work, exchange: Exchange, began: float) -> Verdict:
        verdict = judge_exchange(exchange, self._wire, self.settings.model)
        if verdict.kind == "answer":
            self._num_strays = 0
            self.gate.succeeded()
        elif verdict.kind == "limited":
            self.gate.limited(self._wait_s(work.num_attempts, verdict))
        if verdict.is_stray and began >= self._last_stray:  # not counted: begun before the last one
            self._num_strays += 1
            self._last_stray = time.monotonic()
        if verdict.is_stray and self._num_strays >= STRAYS:
            detail = f"{STRAYS} answers in a row were no judge's ({verdict.detail}); is base_url "
            return replace(verdict, kind="fatal", detail=detail + "right? most end in /v1")
        return verdict

    def _to_store(self, work: _Work, exchange: Exchange, verdict: Verdict) -> Stored | None:
        """What is final is kept."""
        if verdict.kind == "unusable" and verdict.is_paid:
            return Stored(body=b"", cause=verdict.cause)
        if verdict.kind != "answer" or verdict.reply is None:
            return None
        if verdict.reply.cause in ("truncated", "empty") and not work.has_more_tokens:
            return None
        return Stored(body=exchange.body)

    def _count(self, work: _Work, usage: Usage | None, worst: Spend) -> None:
        if usage is None:
            return
        work.usage = Usage(
            prompt_tokens=work.usage.prompt_tokens + usage.prompt_tokens,
            completion_tokens=work.usage.completion_tokens + usage.completion_tokens,
        )
        excess = self._meter.learn(usage, worst)
        if excess is not None:
            self._tell_once("margin", f"a call used {excess:.2f} times the tokens reserved for it")

    def _conclude(self, work: _Work, body: Mapping[str, Any], verdict: Verdict) -> Answer | None:
        """The answer, or None for another attempt. Raises JudgeError for what is fatal."""
        if verdict.kind == "fatal":
            self._fatal = self._fatal or self._fatal_text(verdict.detail)
            self._halt.set()
            self.gate.open_all()
            raise JudgeError(self._fatal)
        if verdict.kind == "answer" and verdict.reply is not None:
            if verdict.reply.cause in ("truncated", "empty") and not work.has_more_tokens:
                work.has_more_tokens = True
                work.max_tokens *= MORE_TOKENS
                if work.num_attempts < self.settings.max_attempts:
                    return None
            return answered(verdict.reply, **self._figures(work))
        if verdict.kind == "refused" and self._learns(work, body, verdict):
            return None
        if verdict.kind in ("unusable", "refused"):
            self._tell_once(verdict.detail, f"a request has no answer: {verdict.detail}")
            return failed(verdict.cause or "rejected", **self._figures(work))
        if work.num_attempts - work.num_changes >= self.settings.max_attempts:
            self._tell_once(verdict.detail, f"gave a request up: {verdict.detail}")
            return failed(verdict.cause or "transport", **self._figures(work))
        return None

    def _learns(self, work: _Work, body: Mapping[str, Any], verdict: Verdict) -> bool:
        """True when the next body will be another one, by this refusal or by another request's."""
        lesson = wire.learn(self._wire, self.learned, body, verdict.error)
        if lesson is not None:
            logger.info("judge %s: %s from now on (%s)", *self._named(lesson, verdict.detail))
        again = self._wire.body(self.settings.model, work.request, work.max_tokens, self.learned)
        if lesson is None and again == body:
            return False
        work.num_changes += 1
        return True

    def _wait_s(self, num_attempts: int, verdict: Verdict) -> float:
        """Full jitter below a bound that doubles, and no less than what the server asks for."""
        timing = self.timing
        bound_s = min(timing.backoff_cap_s, timing.backoff_s * 2**num_attempts)
        jitter_s = self._random.uniform(0, bound_s)
        if verdict.pause_s is None:
            return jitter_s
        return min(verdict.pause_s, timing.pause_cap_s) + min(jitter_s, timing.backoff_s)

    def _from_store(self, stored: Stored) -> Answer:
        if stored.cause is not None:
            return replace(failed(stored.cause), cached=True)
        try:
            reply = wire.read_reply(self._wire, stored.body)
        except (wire.NoAnswerError, wire.BrokenJSONError, wire.DuplicateKeyError):
            return replace(failed("parse"), cached=True)
        return replace(answered(reply), cached=True)

    def _figures(self, work: _Work) -> Figures:
        usd = None if self.settings.prices is None else work.nano_usd / 1e9
        return {
            "prompt_tokens": work.usage.prompt_tokens,
            "completion_tokens": work.usage.completion_tokens,
            "cost_usd": usd,
            "num_attempts": work.num_attempts,
        }

    def _fatal_text(self, detail: str) -> str:
        variable = self.settings.key_variable
        key = "no key is sent" if variable is None else f"the key is from {variable}"
        model, url = self.settings.model, self.settings.url
        return self._hide(f"judge {model} at {url} cannot be used: {detail}; {key}")

    def _tell_once(self, key: str, text: str) -> None:
        if key not in self._told and len(self._told) < 100:
            self._told.add(key)
            logger.warning("judge %s: %s (said once)", *self._named(text))

    def _named(self, *texts: str) -> tuple[str, ...]:
        return (self.settings.model, *(self._hide(text) for text in texts))

    def _hide(self, text: str) -> str:
        return text if self._secret is None else self._secret.hide(text)
