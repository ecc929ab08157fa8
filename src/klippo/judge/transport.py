"""One HTTP attempt: sending it, bounding it, and saying what its outcome means."""

from __future__ import annotations

import asyncio
import email.utils
import math
import time
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from klippo.judge import wire as wires
from klippo.judge.wire import Reply, Wire

if TYPE_CHECKING:
    import httpx2

BODY_CAP = 256 * 1024
"""Longest body, in bytes after unpacking."""
NO_CREDIT = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Pauses and patience, in seconds."""

    backoff_s: float = 0.5
    """Before retry k the pause is uniform between 0 and backoff_s * 2^k."""
    backoff_cap_s: float = 20.0
    """Longest such pause."""
    pause_cap_s: float = 120.0
    """Longest pause that a server may ask for."""
    drain_s: float = 10.0
    """How long calls in flight may finish when the client is closed."""
    poll_s: float = 0.02
    """Between two looks at what another process does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What came back from one attempt."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    problem: str | None = None
    """`timeout`, `too_large`, or what broke the connection."""
    was_sent: bool = True
    """False where no server was reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an exchange means for the request, the client and the budget."""

    kind: Literal["answer", "retry", "limited", "refused", "unusable", "fatal"]
    """`limited`: 429; `refused`: a 400, of which something may be learned; `unusable`: this row
    alone is lost."""
    detail: str = ""
    """In words, for logs and errors; may hold the server's own."""
    cause: str | None = None
    """Of `unusable`, and of `retry` where it stays so."""
    reply: Reply | None = None
    error: Mapping[str, Any] = field(default_factory=dict)
    """The body of a refusal."""
    is_paid: bool = True
    """False where the server cannot have charged for it."""
    is_stray: bool = False
    """True for a 200 that no judge sends; three in a row are fatal."""
    pause_s: float | None = None
    """What the server asked for."""


async def post(
    client: httpx2.AsyncClient, url: str, body: bytes, *, timeout_s: float, cap: int = BODY_CAP
) -> Exchange:
    """One POST under a total deadline; whatever goes wrong is in the Exchange."""
    import httpx2

    try:
        async with (
            asyncio.timeout(timeout_s),
            client.stream("POST", url, content=body) as response,
        ):
            return await _receive(response, cap)
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol) as error:
        return Exchange(problem=f"no connection ({type(error).__name__})", was_sent=False)
    except (TimeoutError, httpx2.TimeoutException):
        return Exchange(problem="timeout")
    except (httpx2.HTTPError, httpx2.StreamError, OSError, zlib.error) as error:
        return Exchange(problem=f"broken connection ({type(error).__name__})")


async def _receive(response: httpx2.Response, cap: int) -> Exchange:
    """The body, unpacked here so that no more than the cap is ever held."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    headers = dict(response.headers)
    status = response.status_code
    if encoding not in ("identity", "", "gzip", "x-gzip"):
        return Exchange(status=status, headers=headers, problem=f"encoding {encoding[:20]}")
    unpacking = zlib.decompressobj(wbits=31) if "gzip" in encoding else None
    body = bytearray()
    async for chunk in response.aiter_raw():
        room = cap + 1 - len(body)
        body += chunk[:room] if unpacking is None else unpacking.decompress(chunk, room)
        if len(body) > cap:
            return Exchange(
                status=status, headers=headers, body=bytes(body[:cap]), problem="too_large"
            )
    if unpacking is not None and not unpacking.eof:
        return Exchange(status=status, headers=headers, problem="body cut short")
    return Exchange(status=status, headers=headers, body=bytes(body))


def judge_exchange(exchange: Exchange, wire: Wire, model: str) -> Verdict:
    """What to do about an exchange."""
    status, problem = exchange.status, exchange.problem
    if status is None:
        return Verdict(kind="retry", detail=problem or "", is_paid=exchange.was_sent)
    if status == 200:
        return _judge_success(exchange, wire)
    return _judge_failure(exchange, status, model)


def _judge_success(exchange: Exchange, wire: Wire) -> Verdict:
    if exchange.problem == "too_large":
        return Verdict(kind="unusable", cause="too_large", detail="an answer over 256 KB")
    if exchange.problem is not None:
        return Verdict(kind="retry", detail=exchange.problem)
    try:
        reply = wires.read_reply(wire, exchange.body)
    except wires.NoAnswerError as error:
        return Verdict(kind="retry", detail=f"a 200 with {error}", is_stray=True)
    except wires.BrokenJSONError as error:
        return Verdict(kind="retry", detail=f"a 200 with {error}", cause="parse")
    except wires.DuplicateKeyError:
        return Verdict(kind="unusable", cause="parse", detail="JSON with a key twice")
    return Verdict(kind="answer", reply=reply)


def _judge_failure(exchange: Exchange, status: int, model: str) -> Verdict:
    error = _error_body(exchange.body)
    codes, said = wires.error_codes(error), _said(status, error)
    free = status < 500 or status in (503, 529)
    pause_s = retry_after_s(exchange.headers)
    if status == 402 or codes & NO_CREDIT or "credit balance" in said.lower():
        return Verdict(kind="fatal", detail=f"no credit is left ({said}); top it up", is_paid=False)
    if status in (401, 403):
        return Verdict(kind="fatal", detail=f"the key was refused ({said})", is_paid=False)
    if status == 429:
        return Verdict(kind="limited", detail=said, is_paid=False, pause_s=pause_s)
    if status in (408, 409, 425) or status >= 500:
        return Verdict(kind="retry", detail=said, is_paid=not free, pause_s=pause_s)
    if _is_wrong_model(status, codes, error, model):
        return Verdict(kind="fatal", detail=f"no model {model} there ({said})", is_paid=False)
    if status in (404, 405, 410) or status < 400:
        where = exchange.headers.get("location", "")
        moved = f"; it points to {where[:200]}, which is not followed" if where else ""
        detail = f"no judge answers at base_url ({said}{moved}); is base_url right? most end in /v1"
        return Verdict(kind="fatal", detail=detail, is_paid=False)
    if codes & {"content_filter", "content_policy_violation"}:
        return Verdict(kind="unusable", cause="refusal", detail=said, is_paid=False)
    return Verdict(kind="refused", cause="rejected", detail=said, error=error, is_paid=False)


def _error_body(body: bytes) -> Mapping[str, Any]:
    try:
        found: Any = wires.parse_json(body)
    except (wires.NoAnswerError, wires.BrokenJSONError, wires.DuplicateKeyError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _said(status: int, error: Mapping[str, Any]) -> str:
    return f"{status}: {wires.error_text(error)}" if error else str(status)


def _is_wrong_model(status: int, codes: set[str], error: Mapping[str, Any], model: str) -> bool:
    if codes & {"model_not_found", "invalid_model", "model_not_available"}:
        return True
    holder = error.get("error", error)
    if isinstance(holder, Mapping) and holder.get("param") == "model":
        return True
    text = wires.error_text(error).lower()
    if "server is pinned to" in text:  # transformers serve, with status 400
        return True
    return status == 404 and ("model" in text or model.lower() in text)


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """The pause that a server asks for: `Retry-After-Ms`, or `Retry-After` in seconds or a date."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after", "").strip()
    if value.lower().endswith("ms"):
        milliseconds = _number(value[:-2])
        return None if milliseconds is None else milliseconds / 1000
    seconds = _number(value)
    if seconds is not None or not value:
        return seconds
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


class Gate:
    """How many calls may be in flight, and from when on: one for all requests of a client.

    A 429 pauses all of them and halves their number; each answer raises it again by one part in
    the number, so by one per round.
    """

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.limit = float(concurrency)
        self.num_in_flight = 0
        self._paused_until = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self) -> None:
        """Wait for a place; first come, first served."""
        if not self._waiting and self._is_open():
            self.num_in_flight += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """Give the place back."""
        self.num_in_flight -= 1
        self._admit()

    def succeeded(self) -> None:
        """An answer came: allow a little more."""
        self.limit = min(self.concurrency, self.limit + 1 / self.limit)

    def limited(self, pause_s: float) -> None:
        """A 429 came: nobody starts for so long. Many at once halve the number only once."""
        now = time.monotonic()
        if now >= self._paused_until:
            self.limit = max(1.0, self.limit / 2)
        self._paused_until = max(self._paused_until, now + pause_s)

    def open_all(self) -> None:
        """Let everyone who waits through, to see that the client has stopped."""
        self._paused_until = 0.0
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                self.num_in_flight += 1
                place.set_result(None)

    def _is_open(self) -> bool:
        is_free = self.num_in_flight < math.floor(self.limit)
        return is_free and time.monotonic() >= self._paused_until

    def _admit(self) -> None:
        while self._waiting and self._is_open():
            place = self._waiting.popleft()
            if not place.done():
                self.num_in_flight += 1
                place.set_result(None)
        rest_s = self._paused_until - time.monotonic()
        if self._waiting and rest_s > 0 and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(rest_s + 0.001, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._admit()
