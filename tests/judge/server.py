"""A judge's server on loopback that fails as it is told to: one step of a script per call."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

USAGE = {"prompt_tokens": 10, "completion_tokens": 5}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the server does with one call."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drip_s: float | None = None
    """Send one byte per so many seconds."""
    cut: int | None = None
    """Close after so many bytes of the body."""
    resets: bool = False
    """Break the connection off without an answer."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One call that came in whole."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]


def encoded(content: Any, **more: Any) -> Step:
    """A step with a JSON body."""
    headers = {"Content-Type": "application/json"} | dict(more.pop("headers", {}))
    return Step(body=json.dumps(content).encode(), headers=headers, **more)


def ok(text: str | None = "Score: 7", *, finish: str = "stop", **more: Any) -> Step:
    """An answer in OpenAI's format."""
    message = {"role": "assistant", "content": text} | more.pop("message", {})
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finish}
    if (logprobs := more.pop("logprobs", None)) is not None:
        top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    usage = more.pop("usage", USAGE)
    content = {"id": "x", "choices": [choice]} | ({} if usage is None else {"usage": usage})
    return encoded(content, **more)


def error(status: int, message: str = "no", **fields: Any) -> Step:
    """An error in OpenAI's format."""
    headers = fields.pop("headers", {})
    return encoded({"error": {"message": message} | fields}, status=status, headers=headers)


def zipped(step: Step) -> Step:
    """The same with a packed body."""
    headers = dict(step.headers) | {"Content-Encoding": "gzip"}
    return replace(step, body=gzip.compress(step.body), headers=headers)


class FaultServer:
    """Serves a script, then `otherwise` for ever; remembers what came in."""

    def __init__(
        self,
        script: Iterable[Step] = (),
        otherwise: Step | Callable[[Hit], Step] | None = None,
    ) -> None:
        self.script = iter(script)
        self.otherwise: Step | Callable[[Hit], Step] = otherwise or ok()
        self.hits: list[Hit] = []
        self.times: list[float] = []
        self.num_in_flight = 0
        self.most_in_flight = 0
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._numbers = itertools.count()

    def __enter__(self) -> FaultServer:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One call; True when the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
        body = await reader.readexactly(int(headers["content-length"]))
        hit = Hit(path=head[0].split(" ")[1], headers=headers, body=json.loads(body))
        self.hits.append(hit)
        self.times.append(self._loop.time())
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        try:
            return await self._play(self._next(hit), writer)
        finally:
            self.num_in_flight -= 1

    def _next(self, hit: Hit) -> Step:
        step = next(self.script, None)
        if step is not None:
            return step
        return self.otherwise(hit) if callable(self.otherwise) else self.otherwise

    async def _play(self, step: Step, writer: asyncio.StreamWriter) -> bool:
        if step.delay_s:
            await asyncio.sleep(step.delay_s)
        if step.resets:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return False
        given = {"Content-Length": str(len(step.body))} | dict(step.headers)
        lines = [f"HTTP/1.1 {step.status} X", *(f"{k}: {v}" for k, v in given.items())]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        if step.drip_s is None and step.cut is None:
            writer.write(head + step.body)
            await writer.drain()
            return True
        writer.write(head)
        for place in range(len(step.body) if step.cut is None else step.cut):
            writer.write(step.body[place : place + 1])
            if step.drip_s is not None:
                await writer.drain()
                await asyncio.sleep(step.drip_s)
        await writer.drain()
        return step.cut is None
