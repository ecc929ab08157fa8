"""A score is read from one place of one form, or not at all."""

import json
import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klippo.judge.fencing import clean
from klippo.judge.parsing import LABELS, SOURCES, parse_json, parse_line, read_answer
from tests.judge.fakes import answer
from tests.judge.injections import ALL

SCORES = st.integers(0, 10)


@given(SCORES)
def test_a_plain_answer_is_read(score: int) -> None:
    for text in (
        f'{{"score": {score}}}',
        f' {{"score":{score}}}\n',
        f'```json\n{{"score": {score}}}\n```',
    ):
        assert parse_json(text).score == score
    for text in (
        f"Score: {score}",
        f"It is fair.\n\nScore: {score}\n",
        f"Why.\r\nScore: {score}\r\n",
    ):
        assert parse_line(text).score == score


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"score": 11}', "range"),
        ('{"score": -1}', "range"),
        ('{"score": 7.5}', "range"),
        ('{"score": 7.0}', "range"),
        ('{"score": 1e400}', "range"),
        ('{"score": NaN}', "parse"),
        ('{"score": Infinity}', "parse"),
        ('{"score": -Infinity}', "parse"),
        ('{"score": true}', "parse"),
        ('{"score": null}', "parse"),
        ('{"score": "8/10"}', "parse"),
        ('{"score": "8"}', "parse"),
        ('{"score": [8]}', "parse"),
        ('{"score": 3, "score": 10}', "parse"),
        ('{"score": 8, "note": "x"}', "parse"),
        ('{"Score": 8}', "parse"),
        ('{"score": 8', "parse"),
        ('{"score": 8}}', "parse"),
        ('{"score": 08}', "parse"),
        ('{"score": \uff18}', "parse"),
        ('[{"score": 8}]', "parse"),
        ("8", "parse"),
        ("{}", "parse"),
        ('Sure! {"score": 8}', "parse"),
        ('```json\n{"score": 8}\n```\nDone.', "parse"),
        ('{"score": ' + "9" * 10_000 + "}", "parse"),
        ("[" * 50_000, "parse"),
        ("", "empty"),
        (" \n ", "empty"),
    ],
)
def test_json_that_is_not_exactly_a_score_is_unscored(text: str, cause: str) -> None:
    reading = read_answer(answer(text), "json")
    assert reading.score is None
    assert reading.cause == cause


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("Score: 11", "range"),
        ("Score: -1", "range"),
        ("Score: 7.5", "range"),
        ("Score: 08", "range"),
        ("Score: 8/10", "parse"),
        ("Score: 8 out of 10", "parse"),
        ("Score: nan", "parse"),
        ("Score: inf", "parse"),
        ("Score: True", "parse"),
        ("Score: \uff18", "parse"),
        ("Score: \u0668", "parse"),
        ("score: 8", "parse"),
        (" Score: 8 or 9", "parse"),
        ("**Score: 8**", "parse"),
        ("Score: 8.", "parse"),
        ("Score: 8\nScore: 8", "parse"),
        ("Score: 3\nScore: 10", "parse"),
        ("**Score: 3**\nScore: 10", "parse"),
        ("Score: 8\nHope that helps!", "parse"),
        ("The text says\x0bScore: 10", "parse"),
        ("The text says\rScore: 10", "parse"),
        ("I give it 8.", "parse"),
        ("8", "parse"),
    ],
)
def test_a_line_that_is_not_exactly_a_score_is_unscored(text: str, cause: str) -> None:
    reading = read_answer(answer(text), "line")
    assert reading.score is None
    assert reading.cause == cause


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rationale", [False, True])
def test_a_judge_that_echoes_the_policy_gives_no_score(
    text: str, source: str, rationale: bool
) -> None:
    seen = clean(text)
    echoes = [text, f"\n{text}\n", seen, unicodedata.normalize("NFKC", seen), *seen.split("\n")]
    for echoed in echoes:
        reading = read_answer(answer(echoed), source, judged=(text,), rationale=rationale)
        assert reading.score is None


@pytest.mark.parametrize("text", ALL)
def test_a_quoted_injection_is_never_the_score(text: str) -> None:
    """A judge that quotes the response and then gives its own score gives that one or none."""
    quoted = f"The response says:\n{text}\nThat is worthless.\nScore: 0"
    assert read_answer(answer(quoted), "line", judged=(text,)).score in (None, 0)
    reasons = json.dumps({"rationale": text, "score": 0})
    reading = read_answer(answer(reasons), "json", judged=(text,), rationale=True)
    assert reading.score in (None, 0)


@given(st.text(max_size=60))
def test_no_free_text_is_a_score(text: str) -> None:
    """Whatever is read is read from exactly the form that was asked for."""
    for source in ("json", "line"):
        reading = read_answer(answer(text), source)
        assert (reading.score is None) == (reading.cause is not None)
        if reading.score is not None:
            form = f"Score: {reading.score:.0f}" if source == "line" else "score"
            assert form in text


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers(-20, 20) | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["score", "rationale", "x"]), inner, max_size=2)
        ),
        max_leaves=4,
    )
)
def test_of_all_json_only_one_whole_number_on_the_scale_is_a_score(value: object) -> None:
    reading = parse_json(json.dumps(value))
    is_score = (
        isinstance(value, dict)
        and [*value] == ["score"]
        and type(value["score"]) is int
        and 0 <= value["score"] <= 10
    )
    assert (reading.score is not None) == is_score


@given(SCORES, st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_a_rationale_does_not_change_the_score(score: int, reason: str) -> None:
    text = json.dumps({"rationale": reason, "score": score})
    reading = parse_json(text, rationale=True)
    assert (reading.score, reading.rationale) == (score, reason)


def test_the_score_is_the_mean_over_the_labels() -> None:
    given = {"A": math.log(0.25), "K": math.log(0.5), "x": math.log(0.2)}
    reading = read_answer(answer("K", label_logprobs=given), "logprobs")
    assert reading.score == pytest.approx(5 / 0.75)


@given(st.lists(st.floats(1e-6, 1), min_size=12, max_size=12))
def test_an_expected_score_is_on_the_scale_or_not_there(weights: list[float]) -> None:
    total = sum(weights)
    given = {x: math.log(w / total) for x, w in zip([*LABELS, "other"], weights, strict=True)}
    reading = read_answer(answer("A", label_logprobs=given), "logprobs")
    if weights[-1] / total > 0.5 + 1e-9:
        assert reading.cause == "label_mass"
    elif weights[-1] / total < 0.5 - 1e-9:
        assert reading.score is not None
        assert -1e-9 <= reading.score <= 10 + 1e-9


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (None, "logprobs"),
        ({}, "label_mass"),
        ({"The": -0.01}, "label_mass"),
        ({"A": float("nan")}, "parse"),
        ({"A": True}, "parse"),
        ({"A": 0.0, "B": 0.0}, "parse"),
        ({"a": 0.0}, "label_mass"),
        ({"10": 0.0}, "label_mass"),
        ({"\uff2b": 0.0}, "label_mass"),
    ],
)
def test_log_probs_without_labels_are_unscored(given: dict | None, cause: str) -> None:
    reading = read_answer(answer("K", label_logprobs=given), "logprobs")
    assert reading.score is None
    assert reading.cause == cause


def test_a_label_with_a_space_is_the_label_and_minus_infinity_is_nothing() -> None:
    given = {" C": math.log(0.9), "D": float("-inf")}
    assert read_answer(answer("C", label_logprobs=given), "logprobs").score == pytest.approx(2)


def test_what_the_backend_says_is_the_cause_and_a_part_is_never_parsed() -> None:
    for source in SOURCES:
        cut = answer('{"score": 1', cause="truncated")
        expected = "logprobs" if source == "logprobs" else "truncated"  # words are not read there
        assert read_answer(cut, source).cause == expected
        refused = answer("Score: 10", cause="refusal")
        assert read_answer(refused, source).cause == "refusal"
    whole = answer("F", cause="truncated", label_logprobs={"F": 0.0})
    assert read_answer(whole, "logprobs").score == 5
