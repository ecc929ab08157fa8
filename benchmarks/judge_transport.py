"""How fast the judge's transport is, against a server on loopback in a process of its own.

    python benchmarks/judge_transport.py [RESULT.json]

overhead  64 calls at a time to a server that answers at once: milliseconds per call, everything
          included (HTTP, cache and ledger with a synced write before and after each call)
latency   256 calls to a server that takes 200 ms, 64 at a time, over the ideal of 4 x 200 ms
cached    the same 256 requests again: milliseconds per answer
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from klippo.judge.client import JudgeClient
from klippo.judge.messages import Request
from klippo.judge.settings import TransportSettings
from klippo.judge.store import spent_in

CONCURRENCY = 64
BODY = json.dumps(
    {
        "choices": [{"message": {"content": "Score: 7"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 400, "completion_tokens": 5},
    }
).encode()
REPLY = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
    + str(len(BODY)).encode()
    + b"\r\n\r\n"
    + BODY
)


async def _serve(delay_s: float, pipe: Connection) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]
                await reader.readexactly(int(length))
                await asyncio.sleep(delay_s)
                writer.write(REPLY)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _server(delay_s: float, pipe: Connection) -> None:
    asyncio.run(_serve(delay_s, pipe))


@contextmanager
def server_of(delay_s: float) -> Iterator[str]:
    """The address of a server, in a process of its own, whose answers take so long."""
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_server, args=(delay_s, there), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}/v1"
    finally:
        process.terminate()
        process.join()


def measure(num_calls: int, delay_s: float, *, repeats: int = 1) -> dict[str, Any]:
    """Seconds for so many calls, and for the same requests from the cache."""
    with server_of(delay_s) as url:
        runs = [asyncio.run(_run(url, num_calls)) for _ in range(repeats)]
    return {"called_s": [run[0] for run in runs], "cached_s": [run[1] for run in runs]}


async def _run(url: str, num_calls: int) -> tuple[float, float]:
    settings = TransportSettings(
        provider="local",
        model="toy",
        base_url=url,
        concurrency=CONCURRENCY,
        usd_per_million_prompt_tokens=2.5,
        usd_per_million_completion_tokens=10.0,
        max_usd=1000.0,
    )
    with tempfile.TemporaryDirectory() as folder:
        client = JudgeClient(settings, cache=Path(folder) / "judge.sqlite")
        await _ask(client, -CONCURRENCY, 0)  # connections are open, modules loaded
        called_s = await _ask(client, 0, num_calls)
        cached_s = await _ask(client, 0, num_calls)
        assert spent_in(Path(folder) / "judge.sqlite", "default").calls == num_calls + CONCURRENCY
        await client.close()
    return called_s, cached_s


async def _ask(client: JudgeClient, first: int, last: int) -> float:
    text = "A response of some length that is to be judged. " * 30
    requests = [
        Request(messages=({"role": "user", "content": f"{i}: {text}"},), max_tokens=16)
        for i in range(first, last)
    ]
    start = time.perf_counter()
    answers = await asyncio.gather(*(client.ask(request) for request in requests))
    assert all(answer.text == "Score: 7" for answer in answers)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, and write where asked to."""
    at_once = measure(2048, 0.0, repeats=3)
    slow = measure(256, 0.2, repeats=3)
    ideal_s = 256 / CONCURRENCY * 0.2
    results = {
        "kind": "judge",
        "name": "The judge's transport",
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/judge_transport.py benchmarks/results/judge_transport.json",
        "overhead_ms": [round(1000 * s / 2048, 3) for s in at_once["called_s"]],
        "cached_ms": [round(1000 * s / 2048, 3) for s in at_once["cached_s"]],
        "latency_over_ideal": [round(s / ideal_s, 3) for s in slow["called_s"]],
        "concurrency": CONCURRENCY,
        "num_cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
    text = json.dumps(results, indent=2)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
