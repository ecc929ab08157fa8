"""Style measures and the shift of word frequencies, counted by hand."""

import numpy as np
import pytest

from klippo.evaluation.statistics import share
from klippo.evaluation.style import (
    distinct_pairs,
    first_person,
    repetition,
    word_shift,
    words,
)


def test_words_keep_inner_apostrophes_and_lose_case_and_marks() -> None:
    assert words("I\N{RIGHT SINGLE QUOTATION MARK}m sure: it's 'Fine', no?") == [
        "i'm",
        "sure",
        "it's",
        "fine",
        "no",
    ]


def test_style_measures_of_a_short_text() -> None:
    text = "I like it. I like it. I do!"  # i like it i like it i do
    # Pairs: il li it-i il li it-i id: 7, of which il, li, ii, id differ.
    assert distinct_pairs(text) == pytest.approx(4 / 7)
    # Triples: ili lii iil ili lii iid: 6, of which the fourth and the fifth were there before.
    assert repetition(text) == pytest.approx(2 / 6)
    assert first_person(text) == pytest.approx(3 / 8)


def test_texts_too_short_for_a_measure_have_none() -> None:
    assert (distinct_pairs("yes"), repetition("yes no"), first_person("...")) == (None,) * 3


def test_word_shift_is_the_total_variation_distance() -> None:
    # Before: good 3/4, bad 1/4; after: good 1/4, bad 3/4.
    shift = word_shift(["good good", "good bad"], ["bad bad", "good bad"])
    assert shift.distance == pytest.approx(0.5)


def test_equal_answers_and_empty_ones_are_no_shift() -> None:
    for texts in (["a b", "c"], ["", ""]):
        shift = word_shift(texts, texts)
        assert (shift.distance, shift.by_chance, shift.p_value) == (0, 0, 1)
    assert word_shift(["a"], [""]).distance == 1


def test_noise_is_not_called_a_shift_and_a_shift_is() -> None:
    dice = np.random.default_rng(3)
    vocabulary = [f"w{i}" for i in range(30)]

    def answers(weights: np.ndarray) -> list[str]:
        p = weights / weights.sum()
        return [" ".join(dice.choice(vocabulary, 12, p=p)) for _ in range(60)]

    flat, tilted = np.ones(30), np.linspace(1, 3, 30)
    noise, real = (
        word_shift(answers(flat), answers(flat)),
        word_shift(answers(flat), answers(tilted)),
    )
    assert noise.distance < noise.chance_limit
    assert noise.p_value > 0.05
    assert real.distance > real.chance_limit
    assert real.p_value < 0.01


def test_a_share_has_wilsons_interval() -> None:
    found = share(8, 10)  # Wilson 1927 at z = 1.96: 0.490 to 0.943
    assert (found.mean, found.num) == (0.8, 10)
    assert (found.low, found.high) == (
        pytest.approx(0.4902, abs=2e-4),
        pytest.approx(0.9433, abs=2e-4),
    )
    assert share(5, 5).low == pytest.approx(0.5655, abs=2e-4)
