"""Wire formats: how a request is written for a server, and how its answer is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from klippo.judge.messages import Request

NUM_LOGPROBS = 20
FEWER_LOGPROBS = 5
"""Some servers allow fewer; this is asked for after the first refusal."""
ANTHROPIC_VERSION = "2023-06-01"
UNSUPPORTED = re.compile(
    "support|unknown|unrecogni|unexpected|permitted|allowed|extra|deprecated|instead", re.IGNORECASE
)
"""Words of an error that a parameter is not known, rather than that its value is wrong."""

JSON = Mapping[str, object]


class NoAnswerError(Exception):
    """A body with status 200 that is no answer: HTML, an error, no choices."""


class BrokenJSONError(Exception):
    """A body that starts like JSON and is none: cut, most likely."""


class DuplicateKeyError(Exception):
    """JSON that names a key twice, so that two readers would read two things."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens as the server counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer of a server."""

    text: str | None
    cause: str | None
    """None, `truncated`, `empty` or `refusal`; then there is no text."""
    label_logprobs: Mapping[str, float] | None = None
    usage: Usage | None = None


@dataclass
class Learned:
    """What this server and model do not take, learned from its refusals, once each."""

    dropped: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    num_logprobs: int = NUM_LOGPROBS


class Wire:
    """A wire format."""

    path: ClassVar[str]
    optional: ClassVar[tuple[str, ...]]
    """Parameters that a server may do without."""

    def headers(self, key: str | None) -> dict[str, str]:
        """The headers that carry the key."""
        raise NotImplementedError

    def body(
        self, model: str, request: Request, max_tokens: int, learned: Learned
    ) -> dict[str, object]:
        """The body of the call."""
        body: dict[str, object] = {"model": model, "max_tokens": max_tokens}
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.labels and "logprobs" in self.optional:
            body |= {"logprobs": True, "top_logprobs": learned.num_logprobs}
        body |= self._special(request)
        return {
            learned.renamed.get(key, key): value
            for key, value in body.items()
            if key not in learned.dropped
        }

    def _special(self, request: Request) -> dict[str, object]:
        """Messages and schema in this format."""
        raise NotImplementedError

    def read(self, body: JSON) -> Reply:
        """The answer in a body with status 200. Raises NoAnswerError if there is none."""
        raise NotImplementedError


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

    def read(self, body: JSON) -> Reply:
        choices = body.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, Mapping):
            raise NoAnswerError("no choices")
        message, reason = choice.get("message"), choice.get("finish_reason")
        if not isinstance(message, Mapping):
            raise NoAnswerError("a choice without a message")
        refused = bool(message.get("refusal")) or reason == "content_filter"
        return _reply(
            _joined(message.get("content")),
            refused=refused,
            cut=reason == "length",
            label_logprobs=None if refused else _first_logprobs(choice.get("logprobs")),
            usage=_usage(body, ("prompt_tokens",), "completion_tokens"),
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
            schema = {"type": "json_schema", "schema": request.schema}
            body["output_config"] = {"format": schema}
        return body

    def read(self, body: JSON) -> Reply:
        content, reason = body.get("content"), body.get("stop_reason")
        if body.get("type") == "error" or not isinstance(content, list):
            raise NoAnswerError("no content")
        cached = ("cache_creation_input_tokens", "cache_read_input_tokens")
        return _reply(
            _joined(content),
            refused=reason == "refusal",
            cut=reason in ("max_tokens", "model_context_window_exceeded", "pause_turn"),
            usage=_usage(body, ("input_tokens", *cached), "output_tokens"),
        )


WIRES: Mapping[str, Wire] = {
    "openai_chat": OpenAIChat(),
    "anthropic_messages": AnthropicMessages(),
}


def parse_json(body: bytes) -> JSON:
    """The JSON object in a body.

    Raises NoAnswerError for what never was JSON (HTML) or is no object, BrokenJSONError for what is
    cut, DuplicateKeyError.
    """
    start = body.lstrip()[:1]
    try:
        parsed = json.loads(body.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        if start == b"{":
            raise BrokenJSONError("JSON that is cut or broken") from None
        raise NoAnswerError("HTML" if start == b"<" else "no JSON") from None
    if not isinstance(parsed, dict):
        raise NoAnswerError("JSON that is no object")
    return parsed


def read_reply(wire: Wire, body: bytes) -> Reply:
    """The answer in a body with status 200; raises like `parse_json`."""
    parsed = parse_json(body)
    if parsed.get("error"):
        raise NoAnswerError(f"an error with status 200: {error_text(parsed)}")
    return wire.read(parsed)


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
    if not isinstance(error, Mapping):
        return set()
    values = (error.get(name) for name in ("code", "type", "status"))
    return {value.lower() for value in values if isinstance(value, str)}


def learn(wire: Wire, learned: Learned, sent: JSON, error: JSON) -> str | None:
    """Draw a lesson from a refused body: what changes from now on, or None.

    `max_tokens` is renamed if it is called unsupported; an optional parameter is dropped if it is
    named at all. vLLM calls the number of log-probs `logprobs`, as it does the flag.
    """
    said = error_text(error)
    for name in _named(error, [*wire.optional, "max_tokens", "max_completion_tokens"]):
        if name not in sent:
            continue
        if name in wire.optional and name not in learned.dropped:
            too_many = name == "top_logprobs" or (
                name == "logprobs" and re.search(r"greater than|at most|maximum", said)
            )
            if too_many and learned.num_logprobs > FEWER_LOGPROBS:
                learned.num_logprobs = FEWER_LOGPROBS
                return f"asks for {FEWER_LOGPROBS} log-probs, not {NUM_LOGPROBS}"
            learned.dropped |= {"logprobs", "top_logprobs"} if "logprobs" in name else {name}
            return f"leaves out {name}"
        is_unsupported = UNSUPPORTED.search(said + json.dumps(error)) is not None
        if name == "max_tokens" and not learned.renamed and is_unsupported:
            learned.renamed["max_tokens"] = "max_completion_tokens"
            return "says max_completion_tokens for max_tokens"
    return None


def _named(error: JSON, names: Sequence[str]) -> list[str]:
    """Which of the names an error is about; its `param` comes first."""
    details = error.get("error", error)
    parameter = details.get("param") if isinstance(details, Mapping) else None
    if isinstance(parameter, str):
        parameter = parameter.split(".")[0].split("[")[0]
        if parameter in names:
            return [parameter]
    text = error_text(error, limit=600) + " " + json.dumps(error.get("detail", ""))[:600]
    if re.search(r"context length|too (large|long)", text, re.IGNORECASE):
        return []
    matches = [(m.start(), n) for n in names if (m := re.search(rf"\b{re.escape(n)}\b", text))]
    return [name for _, name in sorted(matches)]


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise DuplicateKeyError("a key is there twice")
    return unique


def _joined(content: object) -> str:
    """Text from a string, or from a list of blocks of which some are text."""
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    texts = [b.get("text") for b in blocks if isinstance(b, Mapping) and b.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def _reply(
    text: str,
    *,
    refused: bool,
    cut: bool,
    usage: Usage | None,
    label_logprobs: Mapping[str, float] | None = None,
) -> Reply:
    """A cut answer has no text; log-probs of its first token are complete all the same."""
    cause = "refusal" if refused else "truncated" if cut else None
    if cause is None and not text.strip():
        cause = "empty"
    usable = text if cause is None else None
    if label_logprobs is not None:
        cause = None
    return Reply(text=usable, cause=cause, label_logprobs=label_logprobs, usage=usage)


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


def _usage(body: JSON, read: Sequence[str], written: str) -> Usage | None:
    """None if the server counted nothing, or nonsense."""
    usage = body.get("usage")
    if not isinstance(usage, Mapping):
        return None
    counts = [usage.get(name) or 0 for name in (*read, written)]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 or n > 10**9 for n in counts):
        return None
    if not any(counts):
        return None
    return Usage(prompt_tokens=sum(counts[:-1]), completion_tokens=counts[-1])
