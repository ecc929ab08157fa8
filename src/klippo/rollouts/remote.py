"""One rollout server as a run sees it: what is sent there, and what it means when it fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from klippo.errors import PreflightError
from klippo.rollouts.opening import Opening, PackedWeights
from klippo.rollouts.protocol import (
    DIGEST,
    KINDS,
    PROTOCOL,
    RUN,
    VERSION,
    Asked,
    bearer,
    read_completion,
    read_token,
)
from klippo.types import Completion

if TYPE_CHECKING:
    import httpx2

Lines = Iterator[dict[str, Any] | None]
CHUNK = 2**20
"""Bytes of weights that are handed to the connection at once."""


class UnavailableError(Exception):
    """The server did not do it this time; another attempt may help. The text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Patience with one server, in seconds."""

    connect_s: float = 5.0
    """Longest that a server may take to say that it is there."""
    silence_s: float = 60.0
    """Longest pause between two signs of life."""
    backoff_s: float = 0.5
    """Pause after the first attempt; twice as long after each further one."""
    backoff_cap_s: float = 10.0
    """Longest pause."""


class RemoteServer:
    """A server that this run holds as long as the connection of `/open` lasts."""

    def __init__(self, url: str, opening: Opening, run: str, timing: Timing) -> None:
        self.url = url
        self._opening = opening
        self._timing = timing
        self._http = _client(url, timing)
        self._http.headers[RUN] = run
        self._hold: tuple[httpx2.Response, Lines] | None = None
        self._digest: str | None = None

    def prepare(self, packed: PackedWeights) -> None:
        """See to it that the server has these weights.

        Raises UnavailableError, and PreflightError for what no other attempt mends.
        """
        with self._or_forget():
            if self._hold is None:
                self._open()
            if self._digest != packed.digest:
                self._send(packed)
                self._digest = packed.digest

    def generate(
        self, asked: Asked, tell: Callable[[int, Completion], None], stop: threading.Event
    ) -> None:
        """Ask for completions and tell each when it arrives, until `stop` is set.

        Raises as `prepare` does, and ConfigError for a prompt that is too long.
        """
        body = asked.model_dump_json().encode()
        with self._or_forget():
            response = self._post("/generate", body)
            try:
                for line in _lines(self.url, response):
                    if stop.is_set():
                        return
                    if line is not None and "i" in line:
                        tell(*read_completion(line))
            finally:
                response.close()

    def forget(self) -> None:
        """Start anew with the next request."""
        if self._hold is not None:
            self._hold[0].close()
        self._hold = None
        self._digest = None

    @contextmanager
    def _or_forget(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.forget()
            raise

    def _open(self) -> None:
        with _as_unavailable():  # one that hangs is found out here, and soon
            self._http.get("/health", timeout=self._timing.connect_s)
        response = self._post("/open", self._opening.model_dump_json().encode())
        lines = _lines(self.url, response)
        self._hold = response, lines  # reading on, without an end, is what keeps the connection
        for line in lines:
            if line is not None:
                self._digest = line["end"]["weights"]
                break

    def _send(self, packed: PackedWeights) -> None:
        headers = {DIGEST: packed.digest, "Content-Length": str(packed.num_bytes)}
        response = self._post("/weights", _chunks(packed.parts), headers)
        try:
            for _ in _lines(self.url, response):
                pass
        finally:
            response.close()

    def _post(
        self, path: str, content: bytes | Iterator[bytes], headers: dict[str, str] | None = None
    ) -> httpx2.Response:
        """The response of status 200, its body still to be read."""
        with _as_unavailable():
            request = self._http.build_request("POST", path, content=content, headers=headers)
            response = self._http.send(request, stream=True)
            if response.status_code != 200:
                response.read()
                response.close()
                raise UnavailableError(_reason(response))
        return response


def greet(urls: Sequence[str], timing: Timing | None = None) -> None:
    """Make sure that servers are there, free, and alike.

    Raises PreflightError that names the first that is not.
    """
    engines = {url: _greet_one(url, timing or Timing()) for url in urls}
    first, *others = engines
    for url in others:
        if engines[url] != engines[first]:
            raise PreflightError(
                f"rollout.vllm.servers: {first} has {engines[first]}, and {url} has "
                f"{engines[url]}; the same request must get the same response everywhere, so "
                "install the same"
            )


def _greet_one(url: str, timing: Timing) -> str:
    """What the server samples with."""
    try:
        with _as_unavailable(), _client(url, timing) as client:
            response = client.get("/health")
            if response.status_code != 200:
                raise UnavailableError(_reason(response))
            about = response.json()
            if about["is_held"]:
                raise UnavailableError("it serves another run until that one ends")
            return str(about["engine"])
    except (KeyError, TypeError):
        reason = "what answers is no rollout server"
    except UnavailableError as error:
        reason = str(error)
    port = urlsplit(url).port
    raise PreflightError(
        f"rollout.vllm.servers: {url} cannot be used: {reason}. A server is started there with "
        f"klippo serve-rollouts --port {port}"
    )


def _lines(url: str, response: httpx2.Response) -> Lines:
    """The lines of an answer to its end; None for a sign of life."""
    with _as_unavailable():
        for text in response.iter_lines():
            line = json.loads(text) if text else None
            if line is not None and "error" in line:
                kind = KINDS.get(line["kind"])
                if kind is None:
                    raise UnavailableError(line["error"])
                raise kind(f"{url}: {line['error']}")
            yield line
            if line is not None and "end" in line:
                return
    raise UnavailableError("the connection broke off")


def _client(url: str, timing: Timing) -> httpx2.Client:
    import httpx2

    headers = {VERSION: PROTOCOL}
    if token := read_token():
        headers["Authorization"] = bearer(token)
    silence = httpx2.Timeout(timing.silence_s, connect=timing.connect_s)
    # Servers are named by their addresses: no proxy of the environment stands between.
    return httpx2.Client(base_url=url, headers=headers, timeout=silence, trust_env=False)


@contextmanager
def _as_unavailable() -> Iterator[None]:
    """What goes wrong on the way to a server, in one kind of error."""
    import httpx2

    try:
        yield
    except (httpx2.TimeoutException, TimeoutError) as error:
        raise UnavailableError(f"no sign of life ({type(error).__name__})") from error
    except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
        raise UnavailableError(str(error) or type(error).__name__) from error
    except json.JSONDecodeError as error:
        raise UnavailableError("what answers is no rollout server") from error


def _chunks(parts: Sequence[bytes]) -> Iterator[bytes]:
    for part in parts:
        for start in range(0, len(part), CHUNK):
            yield part[start : start + CHUNK]


def _reason(response: httpx2.Response) -> str:
    """Why a server refused, in its own words where it is a rollout server."""
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"what answers is no rollout server (status {response.status_code})"
