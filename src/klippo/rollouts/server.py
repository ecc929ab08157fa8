"""The HTTP of a rollout server: who may ask, and how jobs and their answers travel."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import socket
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from klippo.rollouts.opening import Opening
from klippo.rollouts.protocol import (
    DIGEST,
    HEARTBEAT_S,
    PROTOCOL,
    RUN,
    TOKEN_VARIABLE,
    VERSION,
    Asked,
    bearer,
)
from klippo.rollouts.service import Answer, RolloutService

KEEPALIVE_S = 60
"""How long a run's open connection is silent before it is probed, in seconds."""


class RolloutServer(ThreadingHTTPServer):
    """Reads requests in threads; the service answers them."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        host: str,
        port: int,
        service: RolloutService,
        *,
        engine: str,
        token: str | None,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """Listens at once. `engine` says in words what samples, as in `vLLM 0.32.0 on cpu`."""
        self.service = service
        self.engine = engine
        self.token = token
        self.heartbeat_s = heartbeat_s
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"


class _Handler(BaseHTTPRequestHandler):
    server: RolloutServer
    timeout = 60  # for a client that sends nothing, or reads nothing; seconds

    def do_GET(self) -> None:
        with suppress(OSError):
            if self._is_admitted():
                if self.path == "/health":
                    held = self.server.service.is_held
                    self._json(200, {"engine": self.server.engine, "is_held": held})
                else:
                    self._refuse(404, f"no {self.path} here")

    def do_POST(self) -> None:
        paths: dict[str, Callable[[str, bytes], None]] = {
            "/open": self._open,
            "/weights": self._weights,
            "/generate": self._generate,
        }
        with suppress(OSError):
            if not self._is_admitted():
                return
            answer = paths.get(self.path)
            run, length = self.headers.get(RUN, ""), self.headers.get("Content-Length", "")
            if answer is None or not run or not length.isdecimal():
                self._refuse(400, f"{self.path} needs {RUN} and Content-Length")
                return
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                return  # the client ended in the middle of it
            try:
                answer(run, body)
            except ValidationError as error:
                self._refuse(400, f"{self.path}: {error}")

    def _open(self, run: str, body: bytes) -> None:
        """The answer ends when the connection does: with it the run gives the server back."""
        opening = Opening.model_validate_json(body)
        service = self.server.service
        hold = service.hold(run)
        if hold is None:
            self._refuse(409, "it serves another run until that one ends")
            return
        try:
            self._stream(service.open(run, opening))
            self._wait_for_the_end()
        finally:
            service.release(hold)

    def _weights(self, run: str, body: bytes) -> None:
        digest = hashlib.sha256(body).hexdigest()
        if digest != self.headers.get(DIGEST):
            self._refuse(400, "the weights were damaged on their way")
            return
        self._stream(self.server.service.renew(run, digest, body))

    def _generate(self, run: str, body: bytes) -> None:
        self._stream(self.server.service.generate(run, Asked.model_validate_json(body)))

    def _is_admitted(self) -> bool:
        token, given = self.server.token, self.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), bearer(token).encode()):
            self._refuse(401, f"it needs the token that its {TOKEN_VARIABLE} has")
            return False
        if token is None and not _is_this_machine(self.headers.get("Host", "")):
            self._refuse(421, "without a token it answers to localhost and 127.0.0.1 alone")
            return False
        if (theirs := self.headers.get(VERSION)) != PROTOCOL:
            said = f"it speaks protocol {PROTOCOL}, and who asks {theirs}"
            self._refuse(409, f"{said}; install the same Klippo in both places")
            return False
        return True

    def _stream(self, answer: Answer) -> None:
        try:
            self.send_response(200)
            self.send_header("Content-Type", "application/x-ndjson")
            self.end_headers()
            for line in answer.lines(self.server.heartbeat_s):
                text = "" if line is None else json.dumps(line)
                self.wfile.write(text.encode() + b"\n")
        finally:
            answer.leave()

    def _wait_for_the_end(self) -> None:
        self.connection.settimeout(None)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
        while self.connection.recv(64):
            pass

    def _refuse(self, status: int, reason: str) -> None:
        self._json(status, {"error": reason})

    def _json(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "klippo"

    def log_message(self, format: str, *args: Any) -> None:
        """The service says what happens; single requests are no news."""


def _is_this_machine(host: str) -> bool:
    """Whether the Host header says so; a web page whose name was made to lead here says its own."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
