"""Connections to the judge, each with the key in its own origin's requests only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from klippo.judge import security
from klippo.judge.wire import Wire

if TYPE_CHECKING:
    import httpx2


class Connections:
    """One HTTP client per connection, handed out by turns.

    A client with a pool of many looks through all of its connections at every call, which at 64 of
    them costs more than the call.
    """

    def __init__(self, url: str, wire: Wire, secret: security.Secret | None) -> None:
        self._url, self._wire, self._secret = url, wire, secret
        self._idle: list[httpx2.AsyncClient] = []
        self._all: list[httpx2.AsyncClient] = []
        self._filter: security.KeyFilter | None = None
        self._is_checked = False
        self._opening = asyncio.Lock()
        self._tls: Any = None

    async def open(self, *, allow_plain_http: bool) -> None:
        """At first use: check the judge's address. Raises PreflightError."""
        async with self._opening:
            if self._is_checked:
                return
            await security.check_address(
                self._url, has_key=self._secret is not None, allow_plain_http=allow_plain_http
            )
            if self._secret is not None:
                self._filter = security.hide_in_logs(self._secret)
            self._is_checked = True

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
        self._all, self._idle = [], []
        if self._filter is not None:
            security.unhide_logs(self._filter)
            self._filter = None

    def _new(self) -> httpx2.AsyncClient:
        import httpx2

        is_https = self._url.startswith("https://")
        if self._tls is None:
            self._tls = httpx2.create_ssl_context() if is_https else False  # one for all
        client = httpx2.AsyncClient(
            auth=self._sign,
            verify=self._tls,
            headers={"Content-Type": "application/json", "Accept-Encoding": "gzip"},
            follow_redirects=False,
            timeout=None,  # the deadline of an attempt is total
            limits=httpx2.Limits(max_connections=1, max_keepalive_connections=1),
            trust_env=is_https,  # a proxy would read plain http
        )
        self._all.append(client)
        return client

    def _sign(self, request: httpx2.Request) -> httpx2.Request:
        """Set the key's header when a request goes out, so that no client holds it."""
        value = None if self._secret is None else self._secret.header()
        request.headers.update(self._wire.headers(value))
        return request
