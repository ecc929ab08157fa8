"""Rubric files, and what of others' text reaches the judge."""

import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klippo.errors import ConfigError
from klippo.judge.fencing import clean, cut, fence_for, is_blank
from klippo.judge.rubric import (
    Material,
    check_settings,
    load_rubric,
    packaged,
    parse_rubric,
    render,
)
from tests.judge.fakes import settings
from tests.judge.injections import ALL

SPECIAL = re.compile(
    r"<\||\|>|<\uff5c|</?s>|<(start|end)_of_turn>|</?think>|\[/?INST\]|<</?SYS>>|\[/?SYSTEM_PROMPT\]"
)


def rendered(response: str, *, text: str = "{prompt}\n{response}", **given: object) -> str:
    material = Material(prompt="Why?", response=response)
    return render(parse_rubric(text, "r.md"), material, "Answer.", max_chars=10_000, **given)[0]


def test_the_packaged_rubrics_are_whole() -> None:
    assert packaged() == ["general", "pairwise", "sycophancy"]
    for name in packaged():
        rubric = load_rubric(name)
        assert rubric.criteria
        assert rubric.placeholders >= {"prompt", "response", "criteria"}
    assert load_rubric("sycophancy").lower_is_better
    assert not load_rubric("general").lower_is_better


def test_a_rubric_without_placeholders_is_one_error_that_names_both() -> None:
    with pytest.raises(ConfigError, match=r"rubric=mine.md: \{prompt\} and \{response\} missing"):
        parse_rubric("How good is it?", "mine.md")


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.md"
    path.write_text("---\r\nbetter: low\r\n---\r\nHow rude?\r\n{prompt}\r\n{response}\r\n")
    rubric = load_rubric(str(path))
    assert rubric.lower_is_better
    assert rubric.text == "How rude?\n{prompt}\n{response}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("---\nbetter: medium\n---\n{prompt}{response}", "must be high or low"),
        ("---\nworse: low\n---\n{prompt}{response}", "better and criteria alone"),
        ("---\n[\n---\n{prompt}{response}", "not YAML"),
    ],
)
def test_a_broken_head_is_an_error(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_rubric(text, "mine.md")


def test_a_missing_rubric_names_the_packaged_ones() -> None:
    with pytest.raises(ConfigError, match="general, pairwise, sycophancy"):
        load_rubric("nowhere.md")


@pytest.mark.parametrize(
    ("text", "given", "problem"),
    [
        ("", {"mode": "pairwise", "reference_column": "gold"}, "mode=pairwise"),
        ("{reference}", {"mode": "difference", "reference_column": "gold"}, "mode=difference"),
        ("{reference}", {}, "no reference_column"),
        ("", {"criteria": {"truth": {"text": "Is it true?"}}}, "no {criteria}"),
    ],
)
def test_a_rubric_that_does_not_fit_the_mode_is_refused(
    text: str, given: dict, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.md"
    path.write_text("{prompt}{response}" + text)
    with pytest.raises(ConfigError, match=problem):
        check_settings(settings(rubric=str(path), **given))


@pytest.mark.parametrize("text", ALL)
def test_no_injection_leaves_its_fence_or_keeps_a_chat_token(text: str) -> None:
    message = rendered(text)
    found = re.findall(r"<<<(?:BEGIN|END) RESPONSE ([0-9a-f]{16})>>>", message)
    fence = re.search(r"<<<BEGIN … ([0-9a-f]{16})>>>", message)[1]
    inside = message.split(f"<<<BEGIN RESPONSE {fence}>>>\n")[1]
    inside, after = inside.split(f"\n<<<END RESPONSE {fence}>>>")
    assert inside == clean(text)
    assert after.strip() == "Answer."
    assert found.count(fence) == 2
    assert not SPECIAL.search(inside)
    for char in inside:
        category = unicodedata.category(char)
        assert char in "\n\t" or category not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


@given(st.text(max_size=200))
def test_cleaning_is_done_after_one_pass(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    once.encode()


@given(st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=80))
def test_letters_digits_and_spaces_stay(text: str) -> None:
    kept = "".join(c for c in text if c.isalnum() and c not in "\u115f\u1160\u3164\uffa0")
    assert "".join(c for c in clean(text) if c.isalnum()) == kept


@given(st.lists(st.text(max_size=50), max_size=4))
def test_a_fence_is_in_none_of_the_texts_and_stays_the_same(texts: list[str]) -> None:
    fence = fence_for(*texts)
    assert not any(fence in text for text in texts)
    assert fence == fence_for(*texts)


def test_a_fence_that_a_text_holds_is_replaced() -> None:
    held = fence_for("a")
    assert fence_for("a", held) != held


def test_placeholders_in_a_response_are_not_filled() -> None:
    assert "{prompt}" in rendered("{prompt} {criteria}", text="{prompt}{response}{criteria}")


def test_a_long_response_is_cut_with_a_mark_and_counted() -> None:
    material = Material(prompt="Why?", response="x" * 50)
    rubric = parse_rubric("{prompt}{response}", "r")
    message, was_cut = render(rubric, material, "Answer.", max_chars=20)
    assert was_cut
    assert "x" * 20 + "\n[cut here: 30 more characters]" in message
    assert "x" * 21 not in message
    assert cut("x" * 20, 20) == ("x" * 20, False)


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\u2060", "\ufeff", "\u3164"])
def test_what_shows_nothing_is_blank(text: str) -> None:
    assert is_blank(text)
