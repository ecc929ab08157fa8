"""Two models' answers compared with each other by a pairwise judge."""

from klippo.evaluation.comparison import duel
from klippo.judge.reward import JudgeReward
from klippo.lab.measures import Measure, matches
from klippo.types import Prompt
from tests.judge.fakes import FakeJudge, settings, shown


def measured(score, **given):
    """A pairwise judge whose 0 to 10 follows from (first answer, second answer)."""

    class Pairwise(FakeJudge):
        async def ask(self, request):
            self._score = lambda first: score(first, shown(request, "REFERENCE"))
            return await super().ask(request)

    asked = settings(mode="pairwise", reference_column="top", **given)
    backend = Pairwise()
    source = JudgeReward(asked, backend)
    return Measure(name="better", settings=asked, source=source, scores_alone=False), backend


PROMPTS = [Prompt(id=i, text=f"post {i}", token_ids=[i]) for i in range(3)]


def test_a_judge_that_always_likes_the_first_gives_no_win() -> None:
    measure, _ = measured(lambda first, second: 9)
    found = duel(matches(measure, PROMPTS, ["a", "b", "c"], ["x", "y", "z"]))
    assert (found.num_won, found.num_drawn, found.num_lost) == (0, 3, 0)
    assert found.win_rate.mean == 0.5
    assert found.turned_share == 1


def test_the_longer_answer_wins_whichever_comes_first() -> None:
    measure, _ = measured(lambda first, second: 8 if len(first) > len(second) else 2)
    found = matches(measure, PROMPTS, ["aaa", "a", "aaa"], ["b", "bbb", "bbbb"])
    assert [round(match.margin, 6) for match in found] == [-0.6, 0.6, 0.6]
    assert duel(found).turned_share == 0


def test_every_criterion_is_asked_in_both_orders() -> None:
    criteria = {name: {"text": f"about {name}"} for name in ("tact", "truth")}
    measure, backend = measured(lambda first, second: 6, criteria=criteria)
    (found,) = matches(measure, PROMPTS[:1], ["a"], ["b"])
    assert (found.num_questions, found.num_turned) == (2, 2)
    assert backend.count("a") == backend.count("b") == 2


def test_equal_and_empty_answers_are_decided_without_a_question() -> None:
    measure, backend = measured(lambda first, second: 9)
    found = matches(measure, PROMPTS, ["same", "said", " "], ["same", "", "said"])
    assert [match.margin for match in found] == [0, -1, 1]
    assert not backend.requests
    assert duel(found).turned_share is None


def test_the_judge_reads_both_answers_and_no_models_name() -> None:
    measure, backend = measured(lambda first, second: 5)
    matches(measure, PROMPTS[:1], ["zebra"], ["quagga"])
    texts = [one.messages[-1]["content"] for one in backend.requests]
    about = [text for text in texts if "quagga" in text]
    assert len(about) == 2
    assert all("zebra" in text and "post 0" in text for text in about)
    assert not any(word in text.lower() for text in about for word in ("before", "after"))


def test_a_lower_score_wins_with_a_rubric_whose_good_end_is_low(tmp_path) -> None:
    rubric = tmp_path / "flattery.md"
    rubric.write_text("---\nbetter: low\n---\n{prompt}\n{response}\n{reference}\nMore flattering?")
    measure, _ = measured(lambda first, second: 9 if first == "kind" else 1, rubric=str(rubric))
    (found,) = matches(measure, PROMPTS[:1], ["kind"], ["plain"])
    assert found.margin > 0
