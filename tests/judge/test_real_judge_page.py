"""The figures of experiments/real_judge by hand, and its page beside its results."""

import json
import math
from typing import Any

import numpy as np
import pytest

from tests.judge.fakes import ROOT, script

FOLDER = "experiments/real_judge"


@pytest.fixture
def analysis() -> Any:
    return script(f"{FOLDER}/analysis.py")


def test_pairs_count_where_people_clearly_differ_and_ties_count_half(analysis: Any) -> None:
    ratings = np.array([0.0, 0.5, 2.0, 3.0])  # pairs 1 apart: 0-2, 0-3, 1-2, 1-3, 2-3
    scores = np.array([5.0, 9.0, 5.0, 8.0])  # half, right, wrong, wrong, right
    assert analysis.pair_accuracy(scores, ratings) == pytest.approx(2.5 / 5)


def test_spearman_knows_the_order_alone_and_a_constant_has_none(analysis: Any) -> None:
    ratings = np.array([-4.0, -1.0, 0.0, 3.0])
    assert analysis.spearman(np.exp(ratings), ratings) == pytest.approx(1)
    assert analysis.pearson(np.exp(ratings), ratings) < 0.9
    assert analysis.worth([5.0] * 4, ratings)["spearman"] is None
    assert analysis.worth([5.0] * 4, ratings)["pairs"]["value"] == 0.5


def test_texts_without_a_score_are_left_out(analysis: Any) -> None:
    found = analysis.worth([1.0, None, 2.0, 3.0], [1.0, 9.0, 2.0, 3.0])
    assert found["num"] == 3
    assert found["spearman"]["value"] == pytest.approx(1)


def test_votes_that_agree_have_an_icc_of_1_and_chance_has_none(analysis: Any) -> None:
    assert analysis.agreement([1.0, 5.0, 9.0], [0.0, 0.0, 0.0], 2)["icc"] == 1
    # Votes (4, 6) and (5, 7): between 2 * var(5, 6) = 1, within 1 * 2/1 = 2; (1 - 2) / (1 + 2)
    assert analysis.agreement([5.0, 6.0], [1.0, 1.0], 2)["icc"] == pytest.approx(-1 / 3)


def test_labels_with_a_space_are_labels_and_words_are_none(analysis: Any) -> None:
    given = {" A": math.log(0.25), "A": math.log(0.25), "K": math.log(0.125), "As": -0.1}
    found = analysis.label_probabilities(given)
    assert found == pytest.approx([0.5, *[0.0] * 9, 0.125])
    assert analysis.most_likely(found) == 0


def test_the_page_says_what_the_results_say() -> None:
    page = script(f"{FOLDER}/page.py")
    results = json.loads((ROOT / FOLDER / "results.json").read_text())
    written = (ROOT / "docs/real_judge.md").read_text()
    discussion = written.partition("<!-- discussion -->")[2].partition("<!-- end -->")[0]
    assert discussion.strip(), "the figures need a reading"
    assert page.render(results, discussion) == written
