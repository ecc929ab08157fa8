"""One HTTP attempt: sending it, bounding it, and judging what its outcome means."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import ssl
import time
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from klippo.judge import security
from klippo.judge.messages import Answer
from klippo.judge.wire import JSON, UnreadableError, Wire, error_codes, error_text, parse_body

if TYPE_CHECKING:
    import httpx2

BODY_CAP = 256 * 1024
"""Longest body, in bytes after unpacking."""
NO_CREDIT = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
WRONG_MODEL = {"model_not_found", "invalid_model", "model_not_available"}


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
class Verdict:
    """What one attempt means for the request, the client and the budget."""

    kind: Literal["answer", "retry", "limited", "refused", "unusable", "fatal"]
    """`limited`: 429; `refused`: a 400, from which something may be learned; `unusable`: this row
    alone is lost."""
    detail: str = ""
    """For logs and errors; may quote the server."""
    cause: str | None = None
    """Of `unusable`, and of `retry` if no attempt is left."""
    answer: Answer | None = None
    body: bytes = b""
    """That the answer was read from."""
    error: JSON = field(default_factory=dict)
    """The body of a refusal."""
    is_paid: bool = True
    """False if the server cannot have charged for it."""
    was_sent: bool = True
    """False if no server was reached."""
    is_stray: bool = False
    """True for a 200 that no judge sends; three in a row are fatal."""
    pause_s: float | None = None
    """What the server asked for."""


class Connections:
    """One HTTP client per connection, taken in turns; the key goes to its own origin only.

    A client with a pool looks through all of its connections at every call, which at 64 of them
    costs more than the call.
    """

    def __init__(self, url: str, model: str, wire: Wire, secret: security.Secret | None) -> None:
        self._url, self._model, self._wire, self._secret = url, model, wire, secret
        self._all: list[httpx2.AsyncClient] = []
        self._idle: list[httpx2.AsyncClient] = []
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
                security.hide_in_logs(self._secret)
            import httpx2

            is_https = self._url.startswith("https://")
            self._tls = httpx2.create_ssl_context() if is_https else False

    async def post(self, content: bytes, timeout_s: float) -> Verdict:
        """One POST under a total deadline; whatever goes wrong is in the Verdict."""
        import httpx2

        client = self._idle.pop() if self._idle else self._new()
        try:
            async with (
                asyncio.timeout(timeout_s),
                client.stream("POST", self._url, content=content) as response,
            ):
                body, problem = await _receive(response, BODY_CAP)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol) as error:
            detail = f"no connection ({type(error).__name__})"
            return Verdict(kind="retry", detail=detail, is_paid=False, was_sent=False)
        except (TimeoutError, httpx2.TimeoutException):
            return Verdict(kind="retry", detail="timeout")
        except (httpx2.HTTPError, httpx2.StreamError, OSError, zlib.error) as error:
            return Verdict(kind="retry", detail=f"broken connection ({type(error).__name__})")
        finally:
            self._idle.append(client)
        if self._secret is not None:  # a server may echo it
            body = self._secret.hide_in(body)
        if response.status_code != 200:
            return _judge_failure(response.status_code, response.headers, body, self._model)
        return _judge_success(body, problem, self._wire)

    async def close(self) -> None:
        """Close them all."""
        for client in self._all:
            await client.aclose()
        if self._secret is not None:
            security.unhide_logs(self._secret)

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


async def _receive(response: httpx2.Response, cap: int) -> tuple[bytes, str | None]:
    """The body, unpacked here so that no more than the cap is ever held; what is wrong with it."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "x-gzip"):
        return b"", f"encoding {encoding[:20]}"
    unpacking = zlib.decompressobj(wbits=31) if "gzip" in encoding else None
    body = bytearray()
    async for chunk in response.aiter_raw():
        room = cap + 1 - len(body)
        body += chunk[:room] if unpacking is None else unpacking.decompress(chunk, room)
        if len(body) > cap:
            return bytes(body[:cap]), "too_large"
    if unpacking is not None and not unpacking.eof:
        return b"", "body cut short"
    return bytes(body), None


def _judge_success(body: bytes, problem: str | None, wire: Wire) -> Verdict:
    if problem == "too_large":
        return Verdict(kind="unusable", cause="too_large", detail="an answer over 256 KB")
    if problem is not None:
        return Verdict(kind="retry", detail=problem)
    try:
        return Verdict(kind="answer", answer=wire.read(body), body=body)
    except UnreadableError as error:
        return Verdict(
            kind="retry" if error.can_retry else "unusable",
            detail=f"a 200 with {error}",
            cause=error.cause,
            is_stray=error.cause is None,
        )


def _judge_failure(status: int, headers: Mapping[str, str], body: bytes, model: str) -> Verdict:
    try:
        error = parse_body(body)
    except UnreadableError:
        error = {}
    codes = error_codes(error)
    said = f"{status}: {error_text(error)}" if error else str(status)
    pause_s = retry_after_s(headers)
    if status == 402 or codes & NO_CREDIT or "credit balance" in said.lower():
        fatal = f"no credit is left ({said}); top it up"
    elif status in (401, 403):
        fatal = f"the key was refused ({said})"
    elif status == 429:
        return Verdict(kind="limited", detail=said, is_paid=False, pause_s=pause_s)
    elif status in (408, 409, 425) or status >= 500:
        is_paid = status >= 500 and status not in (503, 529)
        return Verdict(kind="retry", detail=said, is_paid=is_paid, pause_s=pause_s)
    elif _is_wrong_model(status, codes, error, model):
        fatal = f"no model {model} there ({said})"
    elif status in (404, 405, 410) or status < 400:
        location = headers.get("location", "")
        moved = f"; it points to {location[:200]}, which is not followed" if location else ""
        fatal = f"no judge answers at base_url ({said}{moved}); is base_url right? most end in /v1"
    elif codes & {"content_filter", "content_policy_violation"}:
        return Verdict(kind="unusable", cause="refusal", detail=said, is_paid=False)
    else:
        return Verdict(kind="refused", cause="rejected", detail=said, error=error, is_paid=False)
    return Verdict(kind="fatal", detail=fatal, is_paid=False)


def _is_wrong_model(status: int, codes: set[str], error: JSON, model: str) -> bool:
    details = error.get("error", error)
    if codes & WRONG_MODEL or (isinstance(details, Mapping) and details.get("param") == "model"):
        return True
    text = error_text(error).lower()
    if "server is pinned to" in text:  # transformers serve, with status 400
        return True
    return status == 404 and ("model" in text or model.lower() in text)


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """The pause that a server asks for: `Retry-After-Ms`, or `Retry-After` in seconds or a date."""
    value = headers.get("retry-after", "").strip().lower()
    given = headers.get("retry-after-ms", "")
    for text, unit in ((given, 1000), (value.removesuffix("ms"), 1000 if "ms" in value else 1)):
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(text)) and number >= 0:
                return number / unit
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())


class Gate:
    """How many calls may be in flight, and from when on: one for all requests of a client.

    A 429 pauses all of them and halves their number; each answer raises it again by 1 / number,
    so by one per round. First come, first served.
    """

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.limit = float(concurrency)
        self.num_in_flight = 0
        self.halted = asyncio.Event()
        self._paused_until = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._has_timer = False

    async def __aenter__(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        await turn

    async def __aexit__(self, *_: object) -> None:
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

    def halt(self) -> None:
        """Let everyone who waits through, to see that the client has stopped."""
        self.halted.set()
        self._admit()

    async def wait(self, seconds: float) -> None:
        """Outside the gate; a halt ends it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.halted.wait(), seconds)

    def _admit(self) -> None:
        pause_s = self._paused_until - time.monotonic()
        while self._waiting and (
            self.halted.is_set() or (pause_s <= 0 and self.num_in_flight < math.floor(self.limit))
        ):
            turn = self._waiting.popleft()
            if not turn.done():
                self.num_in_flight += 1
                turn.set_result(None)
        if self._waiting and pause_s > 0 and not self._has_timer:
            self._has_timer = True
            asyncio.get_running_loop().call_later(pause_s + 0.001, self._wake)

    def _wake(self) -> None:
        self._has_timer = False
        self._admit()
