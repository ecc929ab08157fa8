"""The failure matrix of the judge's transport, row by row."""

from __future__ import annotations

import gzip
import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from klippo.errors import JudgeError
from klippo.judge.transport import BODY_CAP, retry_after_s
from tests.judge.helpers import answer_of, ask_all, question
from tests.judge.server import FaultServer, Step, encoded, error, ok, zipped

HTML = Step(body=b"<html>Bad gateway</html>", headers={"Content-Type": "text/html"})


def test_an_answer_comes_through_with_its_usage() -> None:
    answer, num_hits = answer_of(ok("Score: 7"))
    assert (answer.text, answer.cause, answer.cached, num_hits) == ("Score: 7", None, False, 1)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.num_attempts) == (10, 5, 1)
    assert answer.cost_usd is None


TRANSIENT = {
    "timeout": Step(delay_s=9),
    "drip": Step(body=ok().body, drip_s=0.05),
    "drip in the head": Step(delay_s=0.1, body=ok().body, drip_s=0.05),
    "reset": Step(resets=True),
    "short body": Step(body=ok().body, cut=20),
    "nothing at all": Step(body=ok().body, cut=0),
    "cut gzip": Step(body=gzip.compress(ok().body)[:-9], headers={"Content-Encoding": "gzip"}),
    "no gzip": Step(body=b"no gzip at all", headers={"Content-Encoding": "gzip"}),
    "brotli": Step(body=b"xx", headers={"Content-Encoding": "br"}),
    "html": HTML,
    "empty body": Step(),
    "error in a 200": encoded({"error": {"message": "upstream failed"}}),
    "no choices": encoded({"choices": []}),
    "a list": encoded([1]),
    "no message": encoded({"choices": [{}]}),
    "cut json": Step(body=ok().body[:-5]),
    "not utf-8": Step(body=b'{"a": "\xff"}'),
    "deep": Step(body=b'{"a":' + b"[" * 200_000),
} | {str(code): error(code) for code in (408, 409, 500, 502, 503, 504, 520, 529)}


@pytest.mark.parametrize("name", TRANSIENT)
def test_what_passes_is_tried_again(name: str) -> None:
    answer, num_hits = answer_of(TRANSIENT[name], ok("Score: 3"), timeout_s=0.25)
    assert (answer.text, answer.cause, answer.num_attempts, num_hits) == ("Score: 3", None, 2, 2)


@pytest.mark.parametrize("name", ["reset", "short body", "500", "429"])
def test_patience_ends_after_six_attempts(name: str) -> None:
    step = error(429) if name == "429" else TRANSIENT[name]
    answer, num_hits = answer_of(otherwise=step)
    assert (answer.text, answer.cause, answer.num_attempts, num_hits) == (None, "transport", 6, 6)


def test_an_answer_that_is_always_cut_is_unscored_as_parse() -> None:
    answer, num_hits = answer_of(otherwise=TRANSIENT["cut json"])
    assert (answer.cause, num_hits) == ("parse", 6)


def test_json_with_a_key_twice_is_unscored_and_not_paid_twice() -> None:
    body = ok().body[:-1] + b', "choices": []}'
    answer, num_hits = answer_of(Step(body=body))
    assert (answer.text, answer.cause, num_hits) == (None, "parse", 1)


def test_a_server_that_cannot_be_reached_is_a_cause() -> None:
    with FaultServer() as server:
        url = server.url
    (answer,) = ask_all(url, [question()], max_calls=1)
    assert (answer.cause, answer.num_attempts) == ("transport", 6)


FATAL = {
    "401": (error(401, "Incorrect API key"), "the key was refused"),
    "403": (error(403), "the key was refused"),
    "402": (error(402), "no credit is left"),
    "quota": (error(429, "You exceeded", code="insufficient_quota"), "no credit is left"),
    "quota by type": (error(429, type="insufficient_quota"), "no credit is left"),
    "credit": (error(400, "Your credit balance is too low"), "no credit is left"),
    "model 404": (error(404, "x", code="model_not_found"), "no model toy-judge there"),
    "model 404 in words": (error(404, "The model `toy-judge` does not exist."), "no model toy-j"),
    "model 400": (error(400, "invalid model ID", param="model"), "no model toy-judge there"),
    "model 400 of transformers serve": (
        encoded({"detail": "Server is pinned to 'another'; requested 'toy-judge'."}, status=400),
        "no model toy-judge there",
    ),
    "wrong path": (encoded({"detail": "Not Found"}, status=404), "is base_url right?"),
    "405": (Step(status=405), "is base_url right?"),
}


@pytest.mark.parametrize("name", FATAL)
def test_what_never_passes_is_fatal_at_the_first_call(name: str) -> None:
    step, words = FATAL[name]
    with FaultServer(otherwise=step) as server:
        with pytest.raises(JudgeError, match="cannot be used") as caught:
            ask_all(server, [question()])
        assert words in str(caught.value)
        assert len(server.hits) == 1
    assert caught.value.exit_code == 4


def test_after_a_fatal_answer_nobody_calls_any_more() -> None:
    with FaultServer(otherwise=error(401)) as server:
        with pytest.raises(JudgeError):
            ask_all(server, [question(i) for i in range(50)], concurrency=2)
        assert len(server.hits) <= 2


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with FaultServer() as other:
        step = Step(status=status, headers={"Location": other.url + "/chat/completions"})
        with FaultServer([step]) as server, pytest.raises(JudgeError, match="not followed"):
            ask_all(server, [question()])
        assert other.hits == []


def test_three_stray_bodies_in_a_row_are_fatal() -> None:
    with FaultServer(otherwise=HTML) as server:
        with pytest.raises(JudgeError, match="is base_url right"):
            ask_all(server, [question()])
        assert len(server.hits) == 3


def test_strays_between_answers_are_not_in_a_row() -> None:
    script = [HTML, HTML, ok(), HTML, HTML, ok()]
    with FaultServer(script) as server:
        answers = ask_all(server, [question(0), question(1)], concurrency=1)
    assert [answer.cause for answer in answers] == [None, None]


def test_many_strays_at_the_same_moment_count_as_one() -> None:
    strays = [Step(body=b"<p>", delay_s=0.1)] * 20
    with FaultServer(strays) as server:
        answers = ask_all(server, [question(i) for i in range(20)], concurrency=20)
    assert {answer.cause for answer in answers} == {None}


NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "pause_s"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "300ms"}, 0.3),
        ({"retry-after": format_datetime(NOW + timedelta(seconds=30), usegmt=True)}, 30.0),
        ({"retry-after": format_datetime(NOW - timedelta(seconds=30), usegmt=True)}, 0.0),
        ({"retry-after": "Wed, 02 Jan 2030 03:04:15 -0000"}, 10.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: Any, pause_s: float | None) -> None:
    assert retry_after_s(headers, NOW) == pause_s


@pytest.mark.parametrize("given", ["ms", "seconds", "date", "capped"])
def test_a_429_pauses_every_request(given: str) -> None:
    headers = {
        "ms": {"Retry-After-Ms": "100"},
        "seconds": {"Retry-After": "0.1"},
        "date": {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=90))},
        "capped": {"Retry-After": "86400"},
    }[given]
    with FaultServer([error(429, headers=headers)]) as server:
        answers = ask_all(server, [question(i) for i in range(6)], concurrency=1)
        pause_s = server.times[1] - server.times[0]
    assert {answer.cause for answer in answers} == {None}
    assert 0.09 <= pause_s < 1.0


def test_a_429_halves_the_calls_in_flight_and_answers_raise_them_again() -> None:
    burst = [error(429, headers={"Retry-After-Ms": "30"})] * 8
    with FaultServer(burst, ok(delay_s=0.01)) as server:
        widths: list[int] = []

        def note(hit: Any) -> Step:
            widths.append(server.num_in_flight)
            return ok(delay_s=0.01)

        server.otherwise = note
        answers = ask_all(server, [question(i) for i in range(200)], concurrency=8)
    assert {answer.cause for answer in answers} == {None}
    assert max(widths[:6]) <= 5
    assert max(widths[-40:]) == 8


def test_a_truncated_answer_is_asked_for_again_with_more_room_and_never_read() -> None:
    with FaultServer([ok("Score: 1", finish="length"), ok("Score: 10")]) as server:
        (answer,) = ask_all(server, [question()])
        assert [hit.body["max_tokens"] for hit in server.hits] == [16, 64]
    assert (answer.text, answer.num_attempts) == ("Score: 10", 2)
    assert (answer.prompt_tokens, answer.completion_tokens) == (20, 10)


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (ok("Score: 1", finish="length"), "truncated"),
        (ok(""), "empty"),
        (ok(" \n"), "empty"),
        (ok(None), "empty"),
    ],
)
def test_truncated_or_empty_twice_is_a_cause(step: Step, cause: str) -> None:
    answer, num_hits = answer_of(otherwise=step)
    assert (answer.text, answer.cause, num_hits) == (None, cause, 2)


@pytest.mark.parametrize(
    "step",
    [
        ok(None, message={"refusal": "I cannot"}),
        ok("Score: 10", message={"refusal": "I cannot"}),
        ok("", finish="content_filter"),
        error(400, "filtered", code="content_filter"),
    ],
)
def test_a_refusal_is_not_asked_again(step: Step) -> None:
    answer, num_hits = answer_of(step)
    assert (answer.text, answer.cause, num_hits) == (None, "refusal", 1)


def test_logprobs_of_the_first_token_are_whole_in_an_answer_that_is_cut() -> None:
    step = ok("H", finish="length", logprobs={"H": -0.1, "I": -2.5, "J": float("-inf")})
    answer, num_hits = answer_of(step, request=question(labels=("H", "I"), max_tokens=1))
    assert (answer.cause, answer.text, num_hits) == (None, None, 1)
    assert answer.label_logprobs == {"H": -0.1, "I": -2.5}


def test_a_server_that_ignores_logprobs_gives_none() -> None:
    answer, _ = answer_of(ok("H"), request=question(labels=("H", "I")))
    assert (answer.text, answer.label_logprobs) == ("H", None)


def test_a_body_over_the_cap_is_not_read_to_its_end() -> None:
    step = ok("x" * BODY_CAP)
    answer, num_hits = answer_of(step)
    assert (answer.text, answer.cause, num_hits) == (None, "too_large", 1)


@pytest.mark.timed
def test_a_gzip_bomb_is_capped_while_it_unpacks() -> None:
    bomb = zipped(Step(body=b'{"choices": "' + b"0" * 300_000_000))
    assert len(bomb.body) < 400_000
    start = time.perf_counter()
    answer, num_hits = answer_of(bomb)
    assert (answer.cause, num_hits) == ("too_large", 1)
    assert time.perf_counter() - start < 2.0


def test_a_packed_answer_is_unpacked() -> None:
    answer, _ = answer_of(zipped(ok("Score: 4")))
    assert answer.text == "Score: 4"


REFUSALS: dict[str, tuple[Step, dict[str, Any], dict[str, Any]]] = {
    "temperature": (
        error(400, "Unsupported value: 'temperature' does not support 0", param="temperature"),
        {"temperature": 0.0},
        {"temperature": None},
    ),
    "max_tokens": (
        error(
            400,
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
            param="max_tokens",
            code="unsupported_parameter",
        ),
        {},
        {"max_tokens": None, "max_completion_tokens": 16},
    ),
    "response_format": (
        error(400, "response_format json_schema is not supported"),
        {"schema": {"type": "object"}},
        {"response_format": None},
    ),
    "logprobs": (
        error(400, 'Unknown name "logprobs": Cannot find field.'),
        {"labels": ("A",)},
        {"logprobs": None, "top_logprobs": None},
    ),
    "fewer logprobs": (
        error(400, "top_logprobs must be at most 5", param="top_logprobs"),
        {"labels": ("A",)},
        {"logprobs": True, "top_logprobs": 5},
    ),
    "fewer logprobs of vLLM": (  # its own words, with --max-logprobs 10
        error(
            400,
            "Requested sample logprobs of 20, which is greater than max allowed: 10 "
            "(parameter=logprobs, value=20)",
            param="logprobs",
        ),
        {"labels": ("A",)},
        {"logprobs": True, "top_logprobs": 5},
    ),
    "422": (
        encoded({"detail": [{"loc": ["body", "temperature"], "msg": "extra"}]}, status=422),
        {"temperature": 1.0},
        {"temperature": None},
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_parameter_is_dropped_or_renamed_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    step, asked, expected = REFUSALS[name]
    with FaultServer([step]) as server:
        requests = [question(i, **asked) for i in range(3)]
        answers = ask_all(server, requests, concurrency=1)
        bodies = [hit.body for hit in server.hits]
    assert [answer.cause for answer in answers] == [None] * 3
    assert len(bodies) == 4
    for body in bodies[1:]:
        assert {key: body.get(key) for key in expected} == expected
    assert sum("from now on" in record.message for record in caplog.records) == 1


def test_refused_parameters_in_a_row_are_all_learned() -> None:
    steps = [REFUSALS["temperature"][0], REFUSALS["max_tokens"][0], REFUSALS["response_format"][0]]
    request = question(temperature=0.0, schema={"type": "object"})
    answer, num_hits = answer_of(*steps, request=request, max_attempts=1)
    assert (answer.cause, num_hits) == (None, 4)


@pytest.mark.parametrize(
    "step",
    [
        error(400, "This model's maximum context length is 8 tokens, max_tokens is too large"),
        error(400, "no idea"),
        error(413, "too big"),
        error(400, "max_tokens must be positive", param="max_tokens"),
        Step(status=400, body=b"<html>"),
    ],
)
def test_a_refusal_that_teaches_nothing_costs_this_row_alone(step: Step) -> None:
    answer, num_hits = answer_of(step)
    assert (answer.cause, num_hits) == ("rejected", 1)


def test_temperature_schema_and_logprobs_are_sent_only_where_asked_for() -> None:
    with FaultServer() as server:
        ask_all(server, [question()])
        assert set(server.hits[0].body) == {"model", "messages", "max_tokens"}
        assert server.hits[0].path == "/v1/chat/completions"
        assert "authorization" not in server.hits[0].headers


def anthropic(text: str, reason: str = "end_turn") -> Step:
    usage = {"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 2}
    content = [{"type": "thinking", "thinking": "Score: 9"}, {"type": "text", "text": text}]
    return encoded({"type": "message", "content": content, "stop_reason": reason, "usage": usage})


def test_anthropics_own_format_is_spoken() -> None:
    script = [
        error(400, "temperature: Extra inputs are not permitted", type="invalid_request_error"),
        anthropic("Score: 1", "max_tokens"),
        anthropic("Score: 8"),
    ]
    with FaultServer(script) as server:
        request = question(temperature=0.0, schema={"type": "object"})
        (answer,) = ask_all(server, [request], protocol="anthropic_messages")
        first, last = server.hits[0], server.hits[-1]
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("Score: 8", 14, 4)
    assert first.path == "/v1/messages"
    assert first.headers["anthropic-version"] == "2023-06-01"
    assert first.body["system"] == "Judge."
    assert [message["role"] for message in first.body["messages"]] == ["user"]
    assert first.body["output_config"]["format"]["type"] == "json_schema"
    assert ("temperature" in first.body, "temperature" in last.body) == (True, False)
    assert last.body["max_tokens"] == 64


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (anthropic("no", "refusal"), "refusal"),
        (anthropic(""), "empty"),
        (encoded({"type": "error", "error": {"type": "overloaded_error"}}), None),
        (error(529, type="overloaded_error"), None),
    ],
)
def test_anthropics_failures_are_understood(step: Step, cause: str | None) -> None:
    answer, _ = answer_of(
        step,
        otherwise=anthropic("Score: 5") if cause is None else step,
        protocol="anthropic_messages",
    )
    assert answer.cause == cause


def test_bodies_are_json_that_any_server_reads() -> None:
    with FaultServer() as server:
        ask_all(server, [question("lone \ud800 and ü")])
        content = server.hits[0].body["messages"][1]["content"]
    assert content == "response lone ? and ü"
    assert json.dumps(content)
