"""The judge's client with a notebook, and what it takes beside a bare call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np

from klippo.judge.client import JudgeClient
from klippo.judge.judging import INSTRUCTIONS, Judge, make_request
from klippo.judge.messages import Answer, Request
from klippo.judge.rubric import Material, render
from klippo.judge.settings import JudgeSettings
from klippo.judge.wire import WIRES


class Recorder:
    """A backend that passes everything on, and keeps the log-probs by question."""

    def __init__(self, client: JudgeClient) -> None:
        self._client = client
        self.logprobs: dict[str, dict[str, float] | None] = {}

    async def ask(self, request: Request) -> Answer:
        """Ask the client."""
        answer = await self._client.ask(request)
        given = answer.label_logprobs
        self.logprobs[request.messages[-1]["content"]] = None if given is None else dict(given)
        return answer


async def overhead(settings: JudgeSettings, materials: Sequence[Material]) -> dict[str, Any]:
    """Milliseconds per call, one at a time: a bare POST and Klippo's client, in turns.

    Every question was asked before, so that the server has its prompt's cache either way; the
    client has no cache of its own. The difference's interval is a 95% bootstrap over questions.
    """
    assert settings.score_source != "auto"
    requests = []
    client = JudgeClient(settings.api)
    judge = Judge(settings, client)
    for material in materials:
        text, _ = render(
            judge.rubric,
            material,
            INSTRUCTIONS[settings.score_source, settings.rationale],
            criteria=next(iter(judge.criteria.values())),
            max_chars=settings.max_response_chars,
        )
        request = make_request(text, settings.score_source, settings)
        requests.append(replace(request, max_tokens=4, temperature=0.0))
    times: dict[str, list[float]] = {"bare": [], "klippo": []}
    wire = WIRES[settings.api.wire_format]()
    try:
        async with httpx2.AsyncClient(timeout=settings.api.timeout_s) as http:

            async def bare(request: Request) -> None:
                body = wire.body(settings.api.model, request, request.max_tokens)
                answer = await http.post(f"{settings.api.url}{wire.path}", json=body)
                answer.raise_for_status()

            hello = make_request("Say hello.", "line", settings)
            await client.ask(replace(hello, max_tokens=4))  # connects
            for request in requests:
                await bare(request)
            for number, request in enumerate(requests):
                for name in ("bare", "klippo") if number % 2 else ("klippo", "bare"):
                    start = time.perf_counter()
                    await (bare(request) if name == "bare" else client.ask(request))
                    times[name].append(1000 * (time.perf_counter() - start))
    finally:
        await client.close()
    gaps = np.subtract(times["klippo"], times["bare"])
    drawn = np.random.default_rng(0).choice(gaps, (2000, len(gaps)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {
        "num": len(gaps),
        "bare_ms": statistics.median(times["bare"]),
        "klippo_ms": statistics.median(times["klippo"]),
        "difference_ms": {"value": float(np.median(gaps)), "low": float(low), "high": float(high)},
    }
