"""The judge's client: from a request to an answer, whatever the network does."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from klippo.errors import BudgetError, JudgeError
from klippo.judge import security
from klippo.judge.messages import Answer, Request
from klippo.judge.settings import TransportSettings
from klippo.judge.store import Meter, Spend, Store, Stored
from klippo.judge.transport import Connections, Gate, Timing, Verdict
from klippo.judge.wire import WIRES, UnreadableError

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
    task: asyncio.Task[Answer] = field(init=False)
    num_waiting: int = 0
    num_changes: int = 0
    """Attempts after which the body was changed; they do not count against max_attempts."""
    is_claimed: bool = False
    num_attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nano_usd: int = 0

    def wants_more_tokens(self, answer: Answer) -> bool:
        has_more = self.max_tokens > self.request.max_tokens
        return answer.cause in ("truncated", "empty") and not has_more


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

        `cache` is the file to use if the settings name none; without either, answers are kept in
        memory. `account` is whose budget this is, in a cache that several runs share. Raises
        PreflightError without a key, ConfigError if the key belongs to another server.
        """
        assert settings.url is not None  # the settings checked it
        security.refuse_foreign_key(settings.key_variable, settings.url)
        self.settings = settings
        self.timing = timing or Timing()
        self._gate = Gate(settings.concurrency)
        self._secret = security.read_key(settings.key_variable)
        self._wire = WIRES[settings.wire_format]()
        self._url = settings.url + self._wire.path
        self.store = Store(Path(settings.cache).expanduser() if settings.cache else cache, account)
        self._meter = Meter(settings)
        self._reserved = Spend()
        """By attempts in flight; calls stay spent in any case."""
        self._connections = Connections(self._url, settings.model, self._wire, self._secret)
        self._running: dict[str, _Work] = {}
        self._random = random.Random()  # the pauses; no seed of a run depends on it
        self._fatal: str | None = None
        self._num_strays = 0
        self._last_stray = 0.0
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"JudgeClient({self.settings.model!r} at {self.settings.url!r})"

    async def ask(self, request: Request) -> Answer:
        """Answer one request, from the cache if it was answered before.

        Raises JudgeError when the judge cannot be used, BudgetError when the budget is used up,
        PreflightError when its address may not be used, StorageError when the cache cannot be
        written. Everything else is an Answer with a cause.
        """
        key = self.key(request)
        stored = self.store.look_up(key)
        if stored is not None:
            return self._from_store(stored)
        while not self._is_stopped:
            is_first = key not in self._running
            work = self._begin(request, key) if is_first else self._running[key]
            work.num_waiting += 1
            try:
                answer = await asyncio.shield(work.task)
            finally:
                work.num_waiting -= 1
            if answer.cause != "stopped" or self._is_stopped:
                return answer if is_first else _unpaid(answer)
        return Answer(cause="stopped")

    def key(self, request: Request) -> str:
        """What its answer is stored under: sha256 of the question's canonical JSON."""
        question = {
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
        text = json.dumps(question, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def _is_stopped(self) -> bool:
        return self._gate.halted.is_set() and self._fatal is None

    def stop(self) -> None:
        """Issue no new call; those in flight finish. Call this on the client's event loop."""
        self._gate.halt()

    async def close(self, drain_s: float | None = None) -> None:
        """Stop, let the calls in flight finish for so long, and close connections and cache."""
        self.stop()
        tasks = [work.task for work in self._running.values()]
        if tasks:
            patience_s = self.timing.drain_s if drain_s is None else drain_s
            _, late = await asyncio.wait(tasks, timeout=patience_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._connections.close()
        await self.store.flush()
        self.store.close()

    def _begin(self, request: Request, key: str) -> _Work:
        work = self._running[key] = _Work(request, key, request.max_tokens)
        work.task = asyncio.get_running_loop().create_task(self._answer(work))
        # An exception counts as seen, even if everyone who asked has gone.
        work.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return work

    async def _answer(self, work: _Work) -> Answer:
        """Attempts until there is an answer, a cause, or no patience left."""
        try:
            while True:
                async with self._gate:
                    outcome = await self._step(work)
                if isinstance(outcome, Answer):
                    return outcome
                await self._gate.wait(outcome)
        finally:
            del self._running[work.key]
            if work.is_claimed:
                self.store.release(work.key)

    async def _step(self, work: _Work) -> Answer | float:
        """One attempt, with a turn at the gate: the answer, or how long to wait for the next."""
        if self._fatal is not None:
            raise JudgeError(self._fatal)
        if self._is_stopped or work.num_waiting == 0:
            return self._priced(Answer(cause="stopped"), work)
        await self._connections.open(allow_plain_http=self.settings.allow_plain_http)
        body = self._body(work)
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        work.is_claimed = work.is_claimed or self.store.claim(work.key)
        if not work.is_claimed:
            return self.timing.poll_s
        worst = self._meter.worst(len(content), len(work.request.messages), work.max_tokens)
        outcome = await self.store.reserve(work.key, worst, self._meter)
        if isinstance(outcome, Stored):
            return self._from_store(outcome)
        if outcome is not None:
            self._refuse_beyond_budget(outcome, worst)
            return self.timing.poll_s
        verdict = await self._attempt(work, content, worst)
        answer = self._conclude(work, body, verdict)
        if answer is not None:
            return self._priced(answer, work)
        if verdict.kind != "retry":  # the gate waits for a 429; what was learned is tried at once
            return 0.0
        wait_s = self._wait_s(work.num_attempts, verdict)
        self._log(logging.DEBUG, f"{verdict.detail}; again in {wait_s:.2f} s")
        return wait_s

    def _body(self, work: _Work) -> dict[str, object]:
        return self._wire.body(self.settings.model, work.request, work.max_tokens)

    def _refuse_beyond_budget(self, total: Spend, worst: Spend) -> None:
        """Raise BudgetError, unless what is in flight may turn out to cost less."""
        cap = self._meter.cap_passed_by(total + worst)
        if cap is None or self._meter.cap_passed_by(total - self._reserved + worst) is None:
            return
        raise BudgetError(
            f"the judge's budget is used up: {total} are spent or reserved, and the next call (at "
            f"worst {worst.tokens} tokens, {worst.nano_usd / 1e9:.4f} USD) would pass "
            f"{cap}={getattr(self.settings, cap)}; raise {cap} to continue, paid answers are kept"
        )

    async def _attempt(self, work: _Work, content: bytes, worst: Spend) -> Verdict:
        """One call, settled in the ledger before anything else happens."""
        reserved = replace(worst, calls=0)
        self._reserved += reserved
        began = time.monotonic()
        try:
            verdict = await self._connections.post(content, self.settings.timeout_s)
            verdict = self._note(work, verdict, began)
            counted = verdict.answer or Answer()
            num_tokens = counted.prompt_tokens + counted.completion_tokens
            actual = worst
            if not verdict.was_sent:
                actual = Spend()
            elif not verdict.is_paid:
                actual = Spend(calls=1)
            elif num_tokens > 0:
                actual = self._meter.spend(counted.prompt_tokens, counted.completion_tokens)
            work.num_attempts += 1
            work.nano_usd += actual.nano_usd
            work.prompt_tokens += counted.prompt_tokens
            work.completion_tokens += counted.completion_tokens
            stored = None  # what is final is kept
            if verdict.kind == "unusable" and verdict.is_paid:
                stored = Stored(cause=verdict.cause)
            elif verdict.answer is not None and not work.wants_more_tokens(verdict.answer):
                stored = Stored(body=verdict.body)
            await self.store.settle(worst - actual, work.key, stored)
        finally:
            self._reserved -= reserved
        excess = self._meter.learn(num_tokens, worst)
        if excess is not None:
            text = f"a call used {excess:.2f} times the tokens reserved for it"
            self._warn_once("margin", text)
        return verdict

    def _note(self, work: _Work, verdict: Verdict, began: float) -> Verdict:
        """Move the gate, and count strays: too many in a row are fatal."""
        if verdict.kind == "answer":
            self._num_strays = 0
            self._gate.succeeded()
        elif verdict.kind == "limited":
            self._gate.limited(self._wait_s(work.num_attempts, verdict))
        if verdict.is_stray and began >= self._last_stray:  # not counted: begun before the last one
            self._num_strays += 1
            self._last_stray = time.monotonic()
        if verdict.is_stray and self._num_strays >= STRAYS:
            detail = f"{STRAYS} answers in a row were no judge's ({verdict.detail}); is base_url "
            return replace(verdict, kind="fatal", detail=detail + "right? most end in /v1")
        return verdict

    def _conclude(self, work: _Work, body: Mapping[str, object], verdict: Verdict) -> Answer | None:
        """The answer, or None for another attempt. Raises JudgeError for what is fatal."""
        if verdict.kind == "fatal":
            if self._fatal is None:
                variable = self.settings.key_variable
                key = "no key is sent" if variable is None else f"the key is from {variable}"
                judge = f"judge {self.settings.model} at {self.settings.url}"
                self._fatal = self._hide(f"{judge} cannot be used: {verdict.detail}; {key}")
            self._gate.halt()
            raise JudgeError(self._fatal)
        if verdict.answer is not None:
            if work.wants_more_tokens(verdict.answer):
                work.max_tokens *= MORE_TOKENS
                if work.num_attempts < self.settings.max_attempts:
                    return None
            return verdict.answer
        if verdict.kind == "refused" and self._learns(work, body, verdict):
            return None
        if verdict.kind in ("unusable", "refused"):
            self._warn_once(verdict.detail, f"a request has no answer: {verdict.detail}")
            return Answer(cause=verdict.cause)
        if work.num_attempts - work.num_changes >= self.settings.max_attempts:
            self._warn_once(verdict.detail, f"gave a request up: {verdict.detail}")
            return Answer(cause=verdict.cause or "transport")
        return None

    def _learns(self, work: _Work, body: Mapping[str, object], verdict: Verdict) -> bool:
        """True if the next body will be another one, by this refusal or by another request's."""
        lesson = self._wire.learn(body, verdict.error)
        if lesson is not None:
            self._log(logging.INFO, f"{lesson} from now on ({verdict.detail})")
        if lesson is None and self._body(work) == body:
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
            return Answer(cause=stored.cause, cached=True)
        try:
            return _unpaid(self._wire.read(stored.body))
        except UnreadableError:
            return Answer(cause="parse", cached=True)

    def _priced(self, answer: Answer, work: _Work) -> Answer:
        return replace(
            answer,
            prompt_tokens=work.prompt_tokens,
            completion_tokens=work.completion_tokens,
            cost_usd=None if self.settings.prices is None else work.nano_usd / 1e9,
            num_attempts=work.num_attempts,
        )

    def _warn_once(self, key: str, text: str) -> None:
        if key not in self._warned and len(self._warned) < 100:
            self._warned.add(key)
            self._log(logging.WARNING, f"{text} (said once)")

    def _log(self, level: int, text: str) -> None:
        logger.log(level, "judge %s: %s", self.settings.model, self._hide(text))

    def _hide(self, text: str) -> str:
        return text if self._secret is None else self._secret.hide(text)


def _unpaid(answer: Answer) -> Answer:
    """The same without its costs, because somebody else has paid or it was paid before."""
    return Answer(
        text=answer.text, label_logprobs=answer.label_logprobs, cause=answer.cause, cached=True
    )
