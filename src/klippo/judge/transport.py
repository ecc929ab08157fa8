"""One HTTP attempt: sending it, bounding it, and judging what its outcome means."""

from __future__ import annotations

import asyncio
import email.utils
import math
import ssl
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from klippo.judge import security
from klippo.judge import wire as wires
from klippo.judge.wire import Reply, Wire

if TYPE_CHECKING:
    import httpx2

BODY_CAP = 256 * 1024
"""Longest body, in bytes after unpacking."""
NO_CREDIT = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
WRONG_MODEL = {"model_not_found", "invalid_model", "model_not_available"}
NOT_READ = (wires.NoAnswerError, wires.BrokenJSONError, wires.DuplicateKeyError)


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
    """How long calls in flight may take to finish when the client is closed."""
    poll_s: float = 0.02
    """Between two looks at a question that somebody else is asking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What came back from one attempt."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    problem: str | None = None
    """`timeout`, `too_large`, or what broke the connection."""
    was_sent: bool = True
    """False if no server was reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an exchange means for the request, the client and the budget."""

    kind: Literal["answer", "retry", "limited", "refused", "unusable", "fatal"]
    """`limited`: 429; `refused`: a 400, from which something may be learned; `unusable`: this row
    alone is lost."""
    detail: str = ""
    """For logs and errors; may quote the server."""
    cause: str | None = None
    """Of `unusable`, and of `retry` if no attempt is left."""
    reply: Reply | None = None
    error: Mapping[str, object] = field(default_factory=dict)
    """The body of a refusal."""
    is_paid: bool = True
    """False if the server cannot have charged for it."""
    is_stray: bool = False
    """True for a 200 that no judge sends; three in a row are fatal."""
    pause_s: float | None = None
    """What the server asked for."""


class Connections:
    """One HTTP client per connection, taken in turns; the key goes to its own origin only.

    A client with a pool looks through all of its connections at every call, which at 64 of them
    costs more than the call.
    """

    def __init__(self, url: str, wire: Wire, secret: security.Secret | None) -> None:
        self._url, self._wire, self._secret = url, wire, secret
        self._all: list[httpx2.AsyncClient] = []
        self._idle: list[httpx2.AsyncClient] = []
        self._filter: security.KeyFilter | None = None
        self._opening = asyncio.Lock()
        self._tls: ssl.SSLContext | bool | None = None

    async def open(self, *, allow_plain_http: bool) -> None:
        """At first use: check the judge's address. Raises PreflightError."""
        async with self._opening:
            if self._tls is not None:
                return
            await security.check_address(
                self._url, has_key=self._secret is not None, allow_plain_http=allow_plain_http
            )
            if self._secret is not None:
                self._filter = security.hide_in_logs(self._secret)
            import httpx2

            is_https = self._url.startswith("https://")
            self._tls = httpx2.create_ssl_context() if is_https else False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[httpx2.AsyncClient]:
        """A client that nobody else uses meanwhile."""
        client = self._idle.pop() if self._idle else self._new()
        try:
            yield client
        finally:
            self._idle.append(client)

    async def close(self) -> None:
        """Close them all."""
        for client in self._all:
            await client.aclose()
        if self._filter is not None:
            security.unhide_logs(self._filter)

    def _new(self) -> httpx2.AsyncClient:
        import httpx2

        assert self._tls is not None, "open() comes first"
        client = httpx2.AsyncClient(
            auth=self._sign,
            verify=self._tls,
            headers={"Content-Type": "application/json", "Accept-Encoding": "gzip"},
            follow_redirects=False,
            timeout=None,  # the deadline of an attempt is total
            limits=httpx2.Limits(max_connections=1, max_keepalive_connections=1),
            trust_env=self._tls is not False,  # a proxy would read plain http
        )
        self._all.append(client)
        return client

    def _sign(self, request: httpx2.Request) -> httpx2.Request:
        """Set the key's header when a request goes out, so that no client holds it."""
        value = None if self._secret is None else self._secret.header()
        request.headers.update(self._wire.headers(value))
        return request


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
    problem = None
    body = bytearray()
    if encoding in ("identity", "", "gzip", "x-gzip"):
        unpacking = zlib.decompressobj(wbits=31) if "gzip" in encoding else None
        async for chunk in response.aiter_raw():
            room = cap + 1 - len(body)
            body += chunk[:room] if unpacking is None else unpacking.decompress(chunk, room)
            if len(body) > cap:
                problem = "too_large"
                break
        if problem is None and unpacking is not None and not unpacking.eof:
            problem, body = "body cut short", bytearray()
    else:
        problem = f"encoding {encoding[:20]}"
    return Exchange(
        status=response.status_code,
        headers=dict(response.headers),
        body=bytes(body[:cap]),
        problem=problem,
    )


def judge_exchange(exchange: Exchange, wire: Wire, model: str) -> Verdict:
    """What to do about an exchange."""
    if exchange.status is None:
        return Verdict(kind="retry", detail=exchange.problem or "", is_paid=exchange.was_sent)
    if exchange.status != 200:
        return _judge_failure(exchange, exchange.status, model)
    if exchange.problem == "too_large":
        return Verdict(kind="unusable", cause="too_large", detail="an answer over 256 KB")
    if exchange.problem is not None:
        return Verdict(kind="retry", detail=exchange.problem)
    try:
        return Verdict(kind="answer", reply=wires.read_reply(wire, exchange.body))
    except wires.NoAnswerError as error:
        return Verdict(kind="retry", detail=f"a 200 with {error}", is_stray=True)
    except wires.BrokenJSONError as error:
        return Verdict(kind="retry", detail=f"a 200 with {error}", cause="parse")
    except wires.DuplicateKeyError:
        return Verdict(kind="unusable", cause="parse", detail="JSON with a key twice")


def _judge_failure(exchange: Exchange, status: int, model: str) -> Verdict:
    try:
        error = wires.parse_json(exchange.body)
    except NOT_READ:
        error = {}
    codes = wires.error_codes(error)
    said = f"{status}: {wires.error_text(error)}" if error else str(status)
    fatal: str | None = None
    if status == 402 or codes & NO_CREDIT or "credit balance" in said.lower():
        fatal = f"no credit is left ({said}); top it up"
    elif status in (401, 403):
        fatal = f"the key was refused ({said})"
    elif status == 429:
        pause_s = retry_after_s(exchange.headers)
        return Verdict(kind="limited", detail=said, is_paid=False, pause_s=pause_s)
    elif status in (408, 409, 425) or status >= 500:
        is_paid = status >= 500 and status not in (503, 529)
        pause_s = retry_after_s(exchange.headers)
        return Verdict(kind="retry", detail=said, is_paid=is_paid, pause_s=pause_s)
    elif _is_wrong_model(status, codes, error, model):
        fatal = f"no model {model} there ({said})"
    elif status in (404, 405, 410) or status < 400:
        location = exchange.headers.get("location", "")
        moved = f"; it points to {location[:200]}, which is not followed" if location else ""
        fatal = f"no judge answers at base_url ({said}{moved}); is base_url right? most end in /v1"
    if fatal is not None:
        return Verdict(kind="fatal", detail=fatal, is_paid=False)
    if codes & {"content_filter", "content_policy_violation"}:
        return Verdict(kind="unusable", cause="refusal", detail=said, is_paid=False)
    return Verdict(kind="refused", cause="rejected", detail=said, error=error, is_paid=False)


def _is_wrong_model(status: int, codes: set[str], error: Mapping[str, object], model: str) -> bool:
    details = error.get("error", error)
    if codes & WRONG_MODEL or (isinstance(details, Mapping) and details.get("param") == "model"):
        return True
    text = wires.error_text(error).lower()
    if "server is pinned to" in text:  # transformers serve, with status 400
        return True
    return status == 404 and ("model" in text or model.lower() in text)


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """The pause that a server asks for: `Retry-After-Ms`, or `Retry-After` in seconds or a date."""
    value = headers.get("retry-after", "").strip().lower()
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is None and value.endswith("ms"):
        milliseconds = _number(value[:-2])
    if milliseconds is not None:
        return milliseconds / 1000
    seconds = _number(value)
    if seconds is not None:
        return seconds
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


class Gate:
    """How many calls may be in flight, and from when on: one for all requests of a client.

    A 429 pauses all of them and halves their number; each answer raises it again by 1 / number,
    so by one per round.
    """

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.limit = float(concurrency)
        self.num_in_flight = 0
        self._paused_until = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self) -> None:
        """Wait for a turn; first come, first served."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """Let the next one in."""
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
        self._admit(all_of_them=True)

    def _admit(self, *, all_of_them: bool = False) -> None:
        pause_s = self._paused_until - time.monotonic()
        while self._waiting and (
            all_of_them or (pause_s <= 0 and self.num_in_flight < math.floor(self.limit))
        ):
            turn = self._waiting.popleft()
            if not turn.done():
                self.num_in_flight += 1
                turn.set_result(None)
        if self._waiting and pause_s > 0 and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(pause_s + 0.001, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._admit()
