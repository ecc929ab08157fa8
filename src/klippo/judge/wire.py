"""Wire formats: how a request is written for a server, and how its answer is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from klippo.judge.messages import Answer, Request

NUM_LOGPROBS = 20
FEWER_LOGPROBS = 5
"""Some servers allow fewer; this is asked for after the first refusal."""
ANTHROPIC_VERSION = "2023-06-01"
UNSUPPORTED = re.compile(
    "support|unknown|unrecogni|unexpected|permitted|allowed|extra|deprecated|instead", re.IGNORECASE
)
"""Words of an error that a parameter is not known, rather than that its value is wrong."""

JSON = Mapping[str, object]


class UnreadableError(Exception):
    """A body without an answer that can be read.

    With a `cause` it is a judge's; without one it is a stray: HTML, an error, no choices.
    """

    def __init__(self, detail: str, cause: str | None = None, *, can_retry: bool = True) -> None:
        super().__init__(detail)
        self.cause = cause
        self.can_retry = can_retry


class Wire:
    """A wire format, and what a client has learned that its server does not take."""

    path: ClassVar[str]
    optional: ClassVar[tuple[str, ...]]
    """Parameters that a server may do without."""

    def __init__(self) -> None:
        self.dropped: set[str] = set()
        self.tokens_name = "max_tokens"
        self.num_logprobs = NUM_LOGPROBS

    def headers(self, key: str | None) -> dict[str, str]:
        """The headers that carry the key."""
        raise NotImplementedError

    def body(self, model: str, request: Request, max_tokens: int) -> dict[str, object]:
        """The body of the call."""
        body: dict[str, object] = {"model": model, self.tokens_name: max_tokens}
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.labels and "logprobs" in self.optional:
            body |= {"logprobs": True, "top_logprobs": self.num_logprobs}
        body |= self._special(request)
        return {key: value for key, value in body.items() if key not in self.dropped}

    def _special(self, request: Request) -> dict[str, object]:
        """Messages and schema in this format."""
        raise NotImplementedError

    def read(self, body: bytes) -> Answer:
        """The answer in a body with status 200, with its tokens. Raises UnreadableError."""
        parsed = parse_body(body)
        if parsed.get("error"):
            raise UnreadableError(f"an error with status 200: {error_text(parsed)}")
        return self._read(parsed)

    def _read(self, body: JSON) -> Answer:
        raise NotImplementedError

    def learn(self, sent: JSON, error: JSON) -> str | None:
        """Draw a lesson from a refused body: what changes from now on, or None.

        `max_tokens` is renamed if it is called unsupported; an optional parameter is dropped if it
        is named at all. vLLM calls the number of log-probs `logprobs`, as it does the flag.
        """
        said = error_text(error)
        for name in _named(error, [*self.optional, "max_tokens", "max_completion_tokens"]):
            if name not in sent or name in self.dropped:
                continue
            if name in self.optional:
                too_many = name == "top_logprobs" or (
                    name == "logprobs" and re.search(r"greater than|at most|maximum", said)
                )
                if too_many and self.num_logprobs > FEWER_LOGPROBS:
                    self.num_logprobs = FEWER_LOGPROBS
                    return f"asks for {FEWER_LOGPROBS} log-probs, not {NUM_LOGPROBS}"
                self.dropped |= {"logprobs", "top_logprobs"} if "logprobs" in name else {name}
                return f"leaves out {name}"
            is_unsupported = UNSUPPORTED.search(said + json.dumps(error)) is not None
            if name == self.tokens_name == "max_tokens" and is_unsupported:
                self.tokens_name = "max_completion_tokens"
                return "says max_completion_tokens for max_tokens"
        return None


class OpenAIChat(Wire):
    """`/chat/completions`: OpenAI, Gemini's compatible endpoint, vLLM, Ollama, transformers."""

    path = "/chat/completions"
    optional = ("temperature", "response_format", "top_logprobs", "logprobs")

    def headers(self, key: str | None) -> dict[str, str]:
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def _special(self, request: Request) -> dict[str, object]:
        body: dict[str, object] = {"messages": [dict(message) for message in request.messages]}
        if request.schema is not None:
            schema = {"name": "answer", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _read(self, body: JSON) -> Answer:
        choices = body.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, Mapping):
            raise UnreadableError("no choices")
        message, reason = choice.get("message"), choice.get("finish_reason")
        if not isinstance(message, Mapping):
            raise UnreadableError("a choice without a message")
        refused = bool(message.get("refusal")) or reason == "content_filter"
        return _answer(
            message.get("content"),
            cause="refusal" if refused else "truncated" if reason == "length" else None,
            label_logprobs=None if refused else _first_logprobs(choice.get("logprobs")),
            counts=_counts(body, "prompt_tokens", "completion_tokens"),
        )


class AnthropicMessages(Wire):
    """`/messages`, Anthropic's own format: it takes a schema, and gives no log-probs."""

    path = "/messages"
    optional = ("temperature", "output_config")

    def headers(self, key: str | None) -> dict[str, str]:
        version = {"anthropic-version": ANTHROPIC_VERSION}
        return version if key is None else version | {"x-api-key": key}

    def _special(self, request: Request) -> dict[str, object]:
        system = [m["content"] for m in request.messages if m["role"] == "system"]
        others = [dict(m) for m in request.messages if m["role"] != "system"]
        body: dict[str, object] = {"messages": others}
        if system:
            body["system"] = "\n\n".join(system)
        if request.schema is not None:
            body["output_config"] = {"format": {"type": "json_schema", "schema": request.schema}}
        return body

    def _read(self, body: JSON) -> Answer:
        content, reason = body.get("content"), body.get("stop_reason")
        if body.get("type") == "error" or not isinstance(content, list):
            raise UnreadableError("no content")
        is_cut = reason in ("max_tokens", "model_context_window_exceeded", "pause_turn")
        cached = ("cache_creation_input_tokens", "cache_read_input_tokens")
        return _answer(
            content,
            cause="refusal" if reason == "refusal" else "truncated" if is_cut else None,
            counts=_counts(body, "input_tokens", *cached, "output_tokens"),
        )


WIRES: Mapping[str, type[Wire]] = {
    "openai_chat": OpenAIChat,
    "anthropic_messages": AnthropicMessages,
}


def parse_body(body: bytes) -> JSON:
    """The JSON object in a body. Raises UnreadableError."""
    start = body.lstrip()[:1]
    try:
        parsed = json.loads(body.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        if start == b"{":
            raise UnreadableError("JSON that is cut or broken", "parse") from None
        raise UnreadableError("HTML" if start == b"<" else "no JSON") from None
    if not isinstance(parsed, dict):
        raise UnreadableError("JSON that is no object")
    return parsed


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        # Two readers would read two things.
        raise UnreadableError("JSON with a key twice", "parse", can_retry=False)
    return unique


def error_text(body: JSON, limit: int = 300) -> str:
    """The server's own words for an error."""
    error = body.get("error", body)
    if isinstance(error, Mapping):
        error = error.get("message") or body.get("detail") or error
    text = error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[:limit] + "..."


def error_codes(body: JSON) -> set[str]:
    """`code`, `type` and `status` of an error, in lower case."""
    error = body.get("error", body)
    values = map(error.get, ("code", "type", "status")) if isinstance(error, Mapping) else ()
    return {value.lower() for value in values if isinstance(value, str)}


def _named(error: JSON, names: Sequence[str]) -> list[str]:
    """Which of the names an error is about; its `param` comes first."""
    details = error.get("error", error)
    parameter = details.get("param") if isinstance(details, Mapping) else None
    if isinstance(parameter, str) and (name := re.split(r"[.\[]", parameter)[0]) in names:
        return [name]
    text = error_text(error, limit=600) + " " + json.dumps(error.get("detail", ""))[:600]
    if re.search(r"context length|too (large|long)", text, re.IGNORECASE):
        return []
    matches = [(m.start(), n) for n in names if (m := re.search(rf"\b{re.escape(n)}\b", text))]
    return [name for _, name in sorted(matches)]


def _answer(
    content: object,
    *,
    cause: str | None,
    counts: tuple[int, int],
    label_logprobs: Mapping[str, float] | None = None,
) -> Answer:
    """From a string, or from a list of blocks of which some are text.

    A cut answer has no text; log-probs of its first token are complete all the same.
    """
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [b.get("text") for b in blocks if isinstance(b, Mapping) and b.get("type") == "text"]
    text = "".join(text for text in texts if isinstance(text, str))
    if cause is None and not text.strip():
        cause = "empty"
    return Answer(
        text=text if cause is None else None,
        cause=cause if label_logprobs is None else None,
        label_logprobs=label_logprobs,
        prompt_tokens=counts[0],
        completion_tokens=counts[1],
    )


def _first_logprobs(logprobs: object) -> dict[str, float] | None:
    """Token text -> log-prob of the first token; None if they are missing or make no sense."""
    try:
        first = logprobs["content"][0]  # type: ignore[index]
        listed = [*(first.get("top_logprobs") or []), first]
        pairs = [(entry["token"], float(entry["logprob"])) for entry in listed]
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):
        return None
    best: dict[str, float] = {}
    for token, value in pairs:
        if not isinstance(token, str) or math.isnan(value) or value > 1e-3:
            return None
        if math.isfinite(value):
            best[token] = max(value, best.get(token, -math.inf))
    return best or None


def _counts(body: JSON, *names: str) -> tuple[int, int]:
    """Tokens read and written (the last name); 0 if the server counted nothing, or nonsense."""
    usage = body.get("usage")
    counts = [usage.get(name) or 0 for name in names] if isinstance(usage, Mapping) else [0]
    if any(type(n) is not int or not 0 <= n <= 10**9 for n in counts):
        return 0, 0
    return sum(counts[:-1]), counts[-1]
