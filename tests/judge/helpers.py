"""Clients of the fault server, with pauses a hundred times shorter."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from klippo.judge.client import JudgeClient
from klippo.judge.messages import Answer, Request
from klippo.judge.settings import TransportSettings
from klippo.judge.transport import Timing
from tests.judge.server import FaultServer, Step

QUICK = Timing(backoff_s=0.005, backoff_cap_s=0.02, pause_cap_s=0.15, drain_s=1.0, poll_s=0.005)


def question(number: int | str = 0, **more: Any) -> Request:
    messages = (
        {"role": "system", "content": "Judge."},
        {"role": "user", "content": f"response {number}"},
    )
    return Request(**({"messages": messages, "max_tokens": 16} | more))


def settings(server: FaultServer | str, **more: Any) -> TransportSettings:
    url = server if isinstance(server, str) else server.url
    given = {"provider": "local", "model": "toy-judge", "base_url": url, "timeout_s": 5.0} | more
    return TransportSettings.model_validate(given)


def ask_all(
    server: FaultServer | str,
    requests: Sequence[Request],
    *,
    cache: Path | None = None,
    timing: Timing = QUICK,
    account: str = "default",
    **more: Any,
) -> list[Answer]:
    """The answers of one client that lives as long as this call."""

    async def run() -> list[Answer]:
        client = JudgeClient(settings(server, **more), cache=cache, timing=timing, account=account)
        try:
            return await asyncio.gather(*(client.ask(request) for request in requests))
        finally:
            await client.close()

    return asyncio.run(run())


def answer_of(*steps: Step, otherwise: Step | None = None, **more: Any) -> tuple[Answer, int]:
    """What becomes of one request under a script, and how often the server was called."""
    with FaultServer(steps, otherwise) as server:
        request = more.pop("request", question())
        return ask_all(server, [request], **more)[0], len(server.hits)
