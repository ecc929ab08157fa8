"""The judge's key shows nowhere and goes nowhere else."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from klippo.errors import ConfigError, JudgeError, PreflightError
from klippo.judge.client import JudgeClient
from klippo.judge.security import Secret, check_address, hide_in_logs, unhide_logs
from klippo.judge.settings import TransportSettings
from tests.judge.helpers import QUICK, ask_all, question, settings
from tests.judge.server import FaultServer, Hit, Step, encoded, error, ok

KEY = 'sk-SENTINEL-"42"-key'
ESCAPED = json.dumps(KEY)[1:-1]


def made(**given: Any) -> TransportSettings:
    return TransportSettings.model_validate({"model": "m"} | given)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    return KEY


def echo(hit: Hit) -> Step:
    """A server that says the key wherever it can."""
    headers = {"X-Echo": hit.headers["authorization"], "Content-Type": "application/json"}
    number = hit.body["messages"][1]["content"].split()[-1]
    if number == "1":
        return error(401, f"Incorrect API key provided: {KEY}", headers=headers)
    if number == "2":
        return error(400, f"odd {KEY}", headers=headers)
    if number == "3":
        return error(500, f"odd {KEY}", headers=headers)
    if number == "4":
        return Step(status=302, headers=headers | {"Location": f"http://x/{KEY}"})
    if number == "5":
        return encoded({"error": {"message": KEY}}, headers=headers)
    return ok(f"Your key is {KEY}. Score: 1", headers=headers)


@pytest.mark.parametrize("number", range(6))
def test_the_key_is_found_nowhere(
    number: int, key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    cache = tmp_path / "judge.sqlite"
    shown: list[str] = []

    async def run(url: str) -> None:
        client = JudgeClient(settings(url, api_key_env="JUDGE_KEY"), cache=cache, timing=QUICK)
        shown.extend([repr(client), repr(vars(client)), str(client.settings)])
        try:
            shown.append(repr(await client.ask(question(number))))
        except JudgeError as problem:
            shown.append("".join(traceback.format_exception(problem)))
            shown.append(repr(problem.__context__) + repr(problem.__cause__))
        finally:
            await client.close()

    with FaultServer(otherwise=echo) as server:
        asyncio.run(run(server.url))
        assert server.hits[0].headers["authorization"] == f"Bearer {KEY}"
    shown += [record.getMessage() + str(record.args) for record in caplog.records]
    assert any(
        "receive_response_headers" in record.name + text
        for record, text in zip(caplog.records, shown[-len(caplog.records) :], strict=True)
    )
    for text in shown:
        assert KEY not in text
        assert ESCAPED not in text
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert KEY.encode() not in content
        assert ESCAPED.encode() not in content


CHILD = """
import asyncio, logging, sys
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
from tests.judge.helpers import ask_all, question
print(ask_all(sys.argv[1], [question(int(sys.argv[3]))], cache=Path(sys.argv[2]),
              api_key_env="JUDGE_KEY"))
"""


@pytest.mark.parametrize("number", [0, 1])
def test_the_key_is_not_in_the_output_of_a_process_that_logs_everything(
    number: int, key: str, tmp_path: Path
) -> None:
    with FaultServer(otherwise=echo) as server:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, server.url, str(tmp_path / "judge.sqlite"), str(number)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            check=False,
        )
    assert "httpcore2" in done.stderr
    assert ("Traceback" in done.stderr) == (number == 1)
    for text in (done.stdout, done.stderr):
        assert KEY not in text
        assert "SENTINEL" not in text


def test_a_secret_cannot_be_shown_or_written() -> None:
    secret = Secret(KEY)
    assert KEY not in repr(secret) + str(secret) + f"{[secret]}"
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    assert secret.hide(f"a {KEY} b {ESCAPED}") == "a [api key] b [api key]"


def test_the_filter_on_logs_is_taken_off_again() -> None:
    logger = logging.getLogger("httpcore2.http11")
    before = list(logger.filters)
    unhide_logs(hide_in_logs(Secret(KEY)))
    assert logger.filters == before


@pytest.mark.parametrize("name", ["api_key", "key", "token"])
def test_a_literal_key_is_refused_without_an_echo(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**{name: KEY})
    assert "SENTINEL" not in str(caught.value)
    assert "api_key_env" in str(caught.value)


@pytest.mark.parametrize("value", [KEY, "sk-SENTINEL", "AIzaSENTINEL", "AKIASENTINEL", 5, ""])
def test_a_key_in_place_of_a_variables_name_is_refused_without_an_echo(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        made(api_key_env=value)
    assert "SENTINEL" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:SENTINEL@api.example.com/v1",
        "https://SENTINEL@api.example.com/v1",
        "https://api.example.com/v1?key=SENTINEL",
        "https://api.example.com/v1#SENTINEL",
    ],
)
def test_a_url_that_may_hold_a_key_is_refused_without_an_echo(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(base_url=url)
    assert "SENTINEL" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["ftp://x/v1", "file:///etc/passwd", "x", "https://", "http://[", "http://x:y/v1"]
)
def test_only_http_and_https_are_spoken(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url"):
        made(base_url=url)


@pytest.mark.parametrize(
    ("provider", "url"),
    [
        ("openai", "https://evil.example.com/v1"),
        ("openai", "https://api.openai.com.evil.example/v1"),
        ("openai", "https://notopenai.com/v1"),
        ("openai", "http://api.openai.com/v1"),
        ("openai", "https://api.anthropic.com/v1"),
        ("anthropic", "https://api.openai.com/v1"),
        ("gemini", "http://127.0.0.1:8000/v1"),
    ],
)
def test_a_providers_key_never_goes_to_another_origin(
    provider: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    with pytest.raises(ConfigError, match="another place") as caught:
        JudgeClient(made(provider=provider, base_url=url))
    assert "SENTINEL" not in str(caught.value)


@pytest.mark.parametrize("provider", ["openai", "anthropic", "gemini"])
def test_a_providers_own_address_is_fine(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, KEY)

    async def make() -> None:
        await JudgeClient(made(provider=provider)).close()

    asyncio.run(make())


@pytest.mark.parametrize("value", [None, "", "two words", "line\nend", "schlüssel"])
def test_a_missing_or_broken_key_names_the_variable(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("JUDGE_KEY", raising=False)
    else:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(PreflightError, match="JUDGE_KEY"):
        JudgeClient(settings("http://127.0.0.1:9/v1", api_key_env="JUDGE_KEY"))


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    async def getaddrinfo(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)


def check(url: str, *, has_key: bool = True, allowed: bool = False) -> None:
    asyncio.run(check_address(url, has_key=has_key, allow_plain_http=allowed))


@pytest.mark.parametrize(
    "addresses",
    [
        ["169.254.169.254"],
        ["10.0.0.1", "169.254.1.1"],
        ["fe80::1%eth0"],
        ["::ffff:169.254.169.254"],
        ["fd00:ec2::254"],
    ],
)
def test_a_link_local_address_is_refused_by_what_the_name_resolves_to(
    addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, *addresses)
    for scheme in ("http", "https"):
        with pytest.raises(PreflightError, match="link-local"):
            check(f"{scheme}://judge.example/v1", has_key=False, allowed=True)


def test_plain_http_carries_a_key_to_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "127.0.0.1", "::1")
    check("http://localhost:8000/v1")
    resolving(monkeypatch, "127.0.0.1", "10.0.0.7")
    with pytest.raises(PreflightError, match="unencrypted"):
        check("http://localhost.example:8000/v1")
    check("http://judge.example/v1", allowed=True)
    check("http://judge.example/v1", has_key=False)
    check("https://judge.example/v1")


def test_the_decimal_form_of_a_link_local_address_is_refused() -> None:
    with pytest.raises(PreflightError, match=r"169\.254\.169\.254"):
        check("http://2852039166/v1", has_key=False)


def test_a_proxy_never_sees_plain_http(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer() as proxy, FaultServer() as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        (answer,) = ask_all(server, [question()], api_key_env="JUDGE_KEY")
        assert (answer.cause, proxy.hits) == (None, [])


def test_a_cap_in_usd_needs_prices_and_a_server_of_ones_own_an_address() -> None:
    with pytest.raises(ValidationError, match="needs prices"):
        made(max_usd=1.0)
    with pytest.raises(ValidationError, match="base_url is missing"):
        made(provider="vllm")
    prices = {"usd_per_million_prompt_tokens": 0, "usd_per_million_completion_tokens": 0}
    assert made(max_usd=1.0, **prices).prices == (0.0, 0.0)
