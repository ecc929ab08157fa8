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
from typing import Any
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

    def __reduce__(self) -> Any:
        raise TypeError("a key is not written anywhere")

    def header(self, prefix: str = "") -> str:
        """The value of the header that carries the key."""
        return prefix + self._value

    def hide(self, text: str) -> str:
        """The text with every copy of the key replaced."""
        if len(self._value) < MIN_REDACTED:
            return text
        for form in {self._value, json.dumps(self._value)[1:-1]}:
            text = text.replace(form, HIDDEN)
        return text

    def hide_in(self, body: bytes) -> bytes:
        """The same for bytes."""
        if len(self._value) < MIN_REDACTED:
            return body
        for form in {self._value, json.dumps(self._value)[1:-1]}:
            body = body.replace(form.encode(), HIDDEN.encode())
        return body


class KeyFilter(logging.Filter):
    """Hides the key in what the HTTP library logs: a server may echo it in a header."""

    def __init__(self, secret: Secret) -> None:
        super().__init__()
        self._secret = secret

    def filter(self, record: logging.LogRecord) -> bool:
        shown = record.getMessage()
        hidden = self._secret.hide(shown)
        if hidden != shown:
            record.msg, record.args = hidden, None
        return True


def hide_in_logs(secret: Secret) -> KeyFilter:
    """Put the filter on the HTTP library's loggers; `unhide_logs` takes it off."""
    found = KeyFilter(secret)
    for name in HTTP_LOGGERS:
        logging.getLogger(name).addFilter(found)
    return found


def unhide_logs(found: KeyFilter) -> None:
    """Take the filter off."""
    for name in HTTP_LOGGERS:
        logging.getLogger(name).removeFilter(found)


def is_variable_name(value: Any) -> bool:
    """True for what looks like OPENAI_API_KEY, and not like a key."""
    return (
        isinstance(value, str)
        and re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", value) is not None
        and not value.startswith("AKIA")
    )


def read_key(variable: str | None) -> Secret | None:
    """The key in an environment variable; None where no variable is named.

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


def refuse_key_in_url(url: Any) -> None:
    """Raise ConfigError, without the URL in it, when its user info or query may hold a key."""
    if not isinstance(url, str):
        return
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError(
            "judge: base_url is not a URL; write for instance https://api.openai.com/v1"
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
    try:
        parts.port  # noqa: B018, reading it checks it
    except ValueError:
        raise ConfigError(f"judge: base_url={url!r} has a port that is not a number") from None


def refuse_foreign_key(variable: str | None, url: str) -> None:
    """Raise ConfigError when a provider's key would go to a host that is not the provider's."""
    owner = OWNERS.get(variable or "")
    host = (urlsplit(url).hostname or "").lower().rstrip(".")
    if owner is None or ((host == owner or host.endswith("." + owner)) and _is_https(url)):
        return
    raise ConfigError(
        f"judge: {variable} is a key for {owner}, and base_url={url} is another place; put that "
        "server's own key into a variable of another name and set api_key_env to it"
    )


async def check_address(url: str, *, has_key: bool, allow_plain_http: bool) -> None:
    """Resolve the host and raise PreflightError when the judge may not be there.

    Link-local addresses (where clouds keep their credentials) are refused; plain http with a key
    is only for this machine itself, unless allowed.
    """
    parts = urlsplit(url)
    addresses = await _resolve(parts)
    for address in addresses:
        if address.is_link_local or address.is_multicast or address in METADATA:
            raise PreflightError(
                f"judge: base_url={url} leads to {address}, a link-local or metadata address, "
                "where no judge is; correct base_url"
            )
    is_here = bool(addresses) and all(address.is_loopback for address in addresses)
    if has_key and not _is_https(url) and not is_here and not allow_plain_http:
        raise PreflightError(
            f"judge: base_url={url} would send the key unencrypted to another machine; use "
            "https://, a tunnel to 127.0.0.1, no key, or allow_plain_http: true"
        )


async def _resolve(parts: SplitResult) -> list[IPAddress]:
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        if parts.scheme == "https" and uses_proxy(host):
            return []  # the proxy resolves it
        raise PreflightError(
            f"judge: the host {host} of base_url cannot be found ({error.strerror or error}); "
            "correct base_url, or check the network"
        ) from None
    return [_plain(ipaddress.ip_address(str(entry[4][0]).split("%")[0])) for entry in found]


def _plain(address: IPAddress) -> IPAddress:
    mapped = getattr(address, "ipv4_mapped", None)
    return address if mapped is None else mapped


def uses_proxy(host: str) -> bool:
    """True when the environment sends https to this host through a proxy."""
    proxies = urllib.request.getproxies()
    return bool(proxies.get("https") or proxies.get("all")) and not urllib.request.proxy_bypass(
        host
    )


def origin_of(url: str) -> str:
    """scheme://host:port, in lower case."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{port}"


def _is_https(url: str) -> bool:
    return urlsplit(url).scheme == "https"
