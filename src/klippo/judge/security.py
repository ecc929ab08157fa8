"""The judge's key: where it may go, and that it shows nowhere."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import re
import socket
import urllib.request
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from klippo.errors import ConfigError, PreflightError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

HIDDEN = "[api key]"
MIN_REDACTED = 6
"""A shorter "key" (`EMPTY`, `x`) is a stand-in for servers that want any; it is no secret."""
OWNERS: Mapping[str, str] = {
    "OPENAI_API_KEY": "openai.com",
    "ANTHROPIC_API_KEY": "anthropic.com",
    "GEMINI_API_KEY": "googleapis.com",
    "GOOGLE_API_KEY": "googleapis.com",
}
"""Whose key is in a variable of this name; it goes to that domain and no other."""
METADATA = (ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200"))
"""Clouds' metadata services that are not link-local."""
HTTP_LOGGERS = ("httpx2", "httpcore2.connection", "httpcore2.http11", "httpcore2.proxy")


class Secret:
    """A key that is shown by no repr, and that hides itself in any text."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def __repr__(self) -> str:
        return "Secret()"

    def __reduce__(self) -> str:
        raise TypeError("a key is not written anywhere")

    def header(self) -> str:
        """The key itself, for the header that carries it."""
        return self._value

    def hide(self, text: str) -> str:
        """The text with every copy of the key replaced."""
        return self.hide_in(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def hide_in(self, body: bytes) -> bytes:
        """The same for bytes."""
        if len(self._value) >= MIN_REDACTED:
            for form in {self._value, json.dumps(self._value)[1:-1]}:
                body = body.replace(form.encode(), HIDDEN.encode())
        return body

    def filter(self, record: logging.LogRecord) -> bool:
        """Hide the key in a log record: a server may echo it in a header."""
        shown = record.getMessage()
        hidden = self.hide(shown)
        if hidden != shown:
            record.msg, record.args = hidden, None
        return True


def hide_in_logs(secret: Secret) -> Secret:
    """Hide the key in what the HTTP library logs; `unhide_logs` ends it."""
    for name in HTTP_LOGGERS:
        logging.getLogger(name).addFilter(secret)
    return secret


def unhide_logs(secret: Secret) -> None:
    """Take the filter off."""
    for name in HTTP_LOGGERS:
        logging.getLogger(name).removeFilter(secret)


def read_key(variable: str | None) -> Secret | None:
    """The key in an environment variable; None if no variable is named.

    Raises PreflightError when the variable is not set or holds what cannot be sent in a header.
    """
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value:
        raise PreflightError(
            f"the judge's key is missing: the environment variable {variable} is not set; run "
            f"export {variable}=... first, or name another one with api_key_env"
        )
    if re.fullmatch(r"[\x21-\x7e]+", value) is None:
        raise PreflightError(
            f"the environment variable {variable} holds spaces, line ends or other characters "
            "that no key has; set it again"
        )
    return Secret(value)


def refuse_key_in_url(url: object) -> None:
    """Raise ConfigError, without the URL in it, when its user info or query may hold a key."""
    if not isinstance(url, str):
        return
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018, reading it checks it
    except ValueError:
        raise ConfigError(
            "judge: base_url is not a URL, or its port is not a number (not shown here, it may "
            "hold a key); write for instance https://api.openai.com/v1"
        ) from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            "judge: base_url holds user info, a query or a fragment (not shown here, it may be a "
            "key); leave them out, and name the key's environment variable with api_key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"judge: base_url={url!r} must start with https:// or http:// and name a host, as in "
            "https://api.openai.com/v1"
        )


def refuse_foreign_key(variable: str | None, url: str) -> None:
    """Raise ConfigError when a provider's key would go to a host that is not the provider's."""
    owner = OWNERS.get(variable or "")
    host = (urlsplit(url).hostname or "").lower().rstrip(".")
    is_owners = host == owner or host.endswith(f".{owner}")
    if owner is None or (is_owners and urlsplit(url).scheme == "https"):
        return
    raise ConfigError(
        f"judge: {variable} is a key for {owner}, and base_url={url} is another place; put that "
        "server's own key into a variable of another name and set api_key_env to it"
    )


async def check_address(url: str, *, has_key: bool, allow_plain_http: bool) -> None:
    """Resolve the host and raise PreflightError for an address that is not allowed.

    Link-local addresses (where clouds keep their credentials) are refused; plain http with a key
    is only for this machine itself, unless allowed.
    """
    addresses = await _resolve(urlsplit(url))
    for address in addresses:
        if address.is_link_local or address.is_multicast or address in METADATA:
            raise PreflightError(
                f"judge: base_url={url} leads to {address}, a link-local or metadata address, "
                "where no judge is; correct base_url"
            )
    is_local = bool(addresses) and all(address.is_loopback for address in addresses)
    is_plain = urlsplit(url).scheme != "https"
    if has_key and is_plain and not is_local and not allow_plain_http:
        raise PreflightError(
            f"judge: base_url={url} would send the key unencrypted to another machine; use "
            "https://, a tunnel to 127.0.0.1, no key, or allow_plain_http: true"
        )


async def _resolve(parts: SplitResult) -> list[IPAddress]:
    loop, host = asyncio.get_running_loop(), parts.hostname or ""
    try:
        entries = await loop.getaddrinfo(host, parts.port, type=socket.SOCK_STREAM)
    except OSError as error:
        proxies = urllib.request.getproxies()
        has_proxy = bool(proxies.get("https") or proxies.get("all"))
        if parts.scheme == "https" and has_proxy and not urllib.request.proxy_bypass(host):
            return []  # the proxy resolves it
        raise PreflightError(
            f"judge: the host {host} of base_url cannot be found ({error.strerror or error}); "
            "correct base_url, or check the network"
        ) from None
    addresses = [ipaddress.ip_address(str(entry[4][0]).split("%")[0]) for entry in entries]
    return [getattr(address, "ipv4_mapped", None) or address for address in addresses]


def origin_of(url: str) -> str:
    """scheme://host:port, in lower case."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{port}"
