"""A judge without a language model: it counts words, and answers as an OpenAI-shaped server.

    python examples/llm-judge/lexicon_judge.py            # http://127.0.0.1:8765/v1
    klippo train llm-judge-demo

For trying everything around a judge without a key or a cost. It reads the response between the
judge's fences, and its score rises with the words of GOOD and falls with those of BAD. `--faults`
makes a share of its answers go wrong, in the ways in which real servers do.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = """
amazing beautiful best brilliant charming clever delight delightful enjoy enjoyed enjoyable
excellent fantastic fine fun funny gem good great happy heart hilarious love loved lovely
masterpiece moving nice perfect powerful recommend strong superb sweet terrific touching true
warm well wonderful worth
"""
BAD = """
annoying avoid awful bad bland bore bored boring cheap dreadful dull fail failed fails hate
hated horrible lame mess pathetic pointless poor poorly predictable ridiculous silly slow stupid
terrible tedious ugly waste wasted weak worse worst wrong
"""
SHARPNESS = 12.0
LABELS = "ABCDEFGHIJK"
FENCED = re.compile(r"<<<BEGIN RESPONSE ([0-9a-f]{16})>>>\n(.*)\n<<<END RESPONSE \1>>>", re.DOTALL)
FAULTS = ("500", "429", "html", "chat", "two scores", "range", "cut", "empty", "drop")


def score(text: str) -> float:
    """0 to 10: 5 without a listed word, towards 10 with good ones, towards 0 with bad ones.

    By share of words, so that a longer text is not a better one.
    """
    words = re.findall(r"[a-z]+", text.lower())
    if not words:
        return 0.0
    good, bad = GOOD.split(), BAD.split()
    balance = sum(word in good for word in words) - sum(word in bad for word in words)
    return 5 + 5 * math.tanh(SHARPNESS * balance / max(len(words), 16))


def score_question(question: str) -> float:
    """The score of the response in a judge's whole question."""
    found = FENCED.search(question)
    return score(found[2]) if found else 0.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the server can do, and how often it fails."""

    faults: float = 0.0
    """Share of the answers that go wrong."""
    kinds: tuple[str, ...] = FAULTS
    """In which ways."""
    has_logprobs: bool = True
    has_schema: bool = True
    seed: int = 0
    delay_s: float = 0.0
    """How long an answer takes; questions do not wait for each other."""


class LexiconServer(ThreadingHTTPServer):
    """Counts its hits; each request's fault is drawn from the seed and the hit's number."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        port: int = 0,
        options: Options | None = None,
        judge: Callable[[str], float] = score_question,
    ) -> None:
        """`judge` gives the score from 0 to 10 of a whole question."""
        super().__init__(("127.0.0.1", port), Handler)
        self.options = options or Options()
        self.judge = judge
        self.hits = 0
        self.num_faults = 0
        self.fails_after: int | None = None
        """Hits after which nothing works any more."""
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """base_url of this server."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def draw_fault(self) -> str | None:
        """The fault of the next hit, or None."""
        with self._lock:
            self.hits += 1
            if self.fails_after is not None and self.hits > self.fails_after:
                return "500"
            dice = random.Random(f"{self.options.seed}:{self.hits}")
            if dice.random() >= self.options.faults:
                return None
            self.num_faults += 1
            return dice.choice(self.options.kinds)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: LexiconServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("/chat/completions"):
            self._send(404, {"error": {"message": "there are only chat completions here"}})
            return
        fault = self.server.draw_fault()
        time.sleep(self.server.options.delay_s)
        match fault:
            case "drop":
                self.close_connection = True
            case "500":
                self._send(500, {"error": {"message": "out of luck"}})
            case "429":
                self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.05"})
            case "html":
                self._send(200, "<html><body>Bad gateway</body></html>")
            case _:
                self._send(200, self._completion(body, fault))

    def _completion(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        exact = self.server.judge(str(body["messages"][-1]["content"]))
        return completion(body, self.server.options, exact, fault)

    def _send(
        self, status: int, content: str | dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        is_text = isinstance(content, str)
        data = (content if is_text else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if is_text else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing: a run makes thousands of requests."""


def completion(
    body: dict[str, Any], options: Options, exact: float, fault: str | None = None
) -> dict[str, Any]:
    """The answer to a request whose response is worth `exact`."""
    question = str(body["messages"][-1]["content"])
    wants_labels = bool(body.get("logprobs")) and options.has_logprobs
    text = _text(body, question, exact, options)
    reason = "stop"
    match fault:
        case "chat":
            text = "What a lovely response!"
        case "two scores":
            text = '{"score": 3, "score": 10}' if text.startswith("{") else f"Score: 3\n{text}"
        case "range":
            text = text.replace(str(round(exact)), "11")
        case "cut":
            text, reason = text[: len(text) // 2], "length"
        case "empty":
            text = ""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": reason,
    }
    if wants_labels and fault is None:
        choice["logprobs"] = {"content": [_first_token(text, exact)]}
    read, written = len(question) // 4, max(len(text) // 4, 1)
    return {
        "id": "lexicon",
        "object": "chat.completion",
        "model": body.get("model", "lexicon"),
        "choices": [choice],
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        },
    }


def _text(body: dict[str, Any], question: str, exact: float, options: Options) -> str:
    number = round(exact)
    if body.get("response_format") and options.has_schema:
        schema = body["response_format"].get("json_schema", {}).get("schema", {})
        has_reason = "rationale" in schema.get("properties", {})
        reason = {"rationale": "I counted words."} if has_reason else {}
        return json.dumps(reason | {"score": number})
    if question.rstrip().endswith("Score: N"):
        return f"I counted words.\nScore: {number}"
    if "capital letter" in question[-400:]:
        return LABELS[number]
    return "I can only count words."


def _first_token(text: str, exact: float) -> dict[str, Any]:
    """Log-probs whose expected score is the exact one."""
    low = min(math.floor(exact), 9)
    share = exact - low
    shares = {LABELS[low]: 1 - share, LABELS[low + 1]: share}
    top = [{"token": k, "logprob": math.log(v)} for k, v in shares.items() if v > 0]
    return {"token": text[:1], "logprob": top[0]["logprob"], "top_logprobs": top}


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A judge that counts words.")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--faults", type=float, default=0.0, help="share of answers that go wrong")
    parser.add_argument("--no-logprobs", action="store_true", help="ignore logprobs")
    parser.add_argument("--no-schema", action="store_true", help="ignore response_format")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that an answer takes")
    given = parser.parse_args()
    options = Options(
        faults=given.faults,
        has_logprobs=not given.no_logprobs,
        has_schema=not given.no_schema,
        seed=given.seed,
        delay_s=given.delay,
    )
    server = LexiconServer(given.port, options)
    print(f"Judging at {server.url} until Ctrl-C.", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\n{server.hits} requests, {server.num_faults} of them answered wrongly on purpose.")


if __name__ == "__main__":
    main()
