"""The judge as a reward: modes, votes, criteria, floors, outages, probes."""

import asyncio
import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klippo.errors import ConfigError, JudgeError
from klippo.judge.judging import Judgement, absolute, both_orders, difference
from klippo.judge.reward import JudgeReward, Watch, prompt_text
from klippo.judge.rubric import Material
from klippo.rewards.combined import Part, SumReward
from klippo.rewards.judged import judge_metrics
from klippo.rewards.resolve import resolve_scores, wait_for
from klippo.types import Prompt, Rollout, Scores, TokenBatch
from tests.judge.fakes import FakeJudge, answer, mode_of, settings, shown
from tests.judge.injections import ALL

SCORES = st.floats(0, 10)


def rollout(*responses: str, **columns: str) -> Rollout:
    ids = torch.zeros(len(responses), 1, dtype=torch.long)
    mask = torch.ones_like(ids, dtype=torch.bool)
    prompts = [
        Prompt(id=i, text="Why?", token_ids=[0], meta={"prompt": "Why?"} | columns)
        for i in range(len(responses))
    ]
    return Rollout(
        prompts=prompts,
        responses=list(responses),
        tokens=TokenBatch(prompt_ids=ids, prompt_mask=mask, response_ids=ids, response_mask=mask),
        finished=mask[:, 0],
        temperature=1.0,
    )


def rewards(source: JudgeReward, *responses: str, **columns: str) -> list[float]:
    return resolve_scores(source, rollout(*responses, **columns)).reward.tolist()


def number(response: str) -> int:
    """The judge of most tests: a response names its score."""
    return int(response) if response.isdecimal() else 7


@given(
    st.lists(st.lists(st.sampled_from([None, -1.0, 0.5, 1.0]), max_size=20), max_size=8), st.data()
)
def test_a_watch_that_goes_on_from_its_state_is_the_one_that_went_on(
    steps: list[list[float | None]], data: st.DataObject
) -> None:
    def look(watch: Watch, rewards: list[float | None]) -> tuple[str, str | None]:
        judgements = [
            Judgement(reward=x, cause=None if x is not None else "parse") for x in rewards
        ]
        try:
            watch.note(judgements)
        except JudgeError as error:
            return str(error), watch.alarm(judgements)
        return "", watch.alarm(judgements)

    cut = data.draw(st.integers(0, len(steps)))
    first = Watch(settings())
    told = [look(first, step) for step in steps[:cut]]
    state = json.dumps(first.state_dict())
    second = Watch(settings())
    second.load_state_dict(json.loads(state))
    rest = [look(first, step) for step in steps[cut:]]
    assert [look(second, step) for step in steps[cut:]] == rest
    assert second.state_dict() == first.state_dict()
    assert len(told) == cut


def test_the_judges_of_a_sum_are_in_its_state() -> None:
    judged = JudgeReward(settings(), FakeJudge(number))
    total = SumReward({"judge": Part(source=judged), "again": Part(source=judged, normalize=True)})
    resolve_scores(total, rollout("4", "6"))
    state = json.loads(json.dumps(total.state_dict()))
    fresh = JudgeReward(settings(), FakeJudge(number))
    SumReward(
        {"judge": Part(source=fresh), "again": Part(source=fresh, normalize=True)}
    ).load_state_dict(state)
    assert fresh.watch.num_responses == judged.watch.num_responses == 4


def test_absolute_is_s_over_5_minus_1() -> None:
    source = JudgeReward(settings(), FakeJudge(number))
    assert rewards(source, "0", "5", "10") == [-1, 0, 1]


@pytest.mark.parametrize("has_logprobs", [False, True])
@pytest.mark.parametrize("has_json", [False, True])
def test_auto_takes_the_first_source_that_the_judge_can(has_logprobs: bool, has_json: bool) -> None:
    backend = FakeJudge(number, has_logprobs=has_logprobs, has_json=has_json)
    source = JudgeReward(settings(), backend)
    assert rewards(source, "4") == pytest.approx([-0.2])
    expected = "logprobs" if has_logprobs else "json" if has_json else "line"
    assert source.judge.source == expected
    assert mode_of(backend.requests[-1]) == expected


def test_a_judge_that_gives_no_score_at_all_is_refused_at_the_start() -> None:
    source = JudgeReward(settings(), FakeJudge(lambda _: "I would rather talk."))
    with pytest.raises(JudgeError, match=r"logprobs: logprobs, json: parse, line: parse"):
        rewards(source, "4")
    source = JudgeReward(settings(), FakeJudge(lambda _: answer(cause="transport")))
    with pytest.raises(JudgeError, match=r"\(logprobs: transport\)"):
        rewards(source, "4")


def test_difference_asks_about_a_reference_once_in_a_run() -> None:
    backend = FakeJudge(number)
    source = JudgeReward(settings(mode="difference", reference_column="top"), backend)
    assert rewards(source, "9", "1", top="4") == pytest.approx([0.5, -0.3])
    assert rewards(source, "4", top="4") == [0]
    assert backend.count("4") == 2  # once as the reference, once as a response


def test_a_lower_is_better_rubric_turns_the_reward_round() -> None:
    given = settings(rubric="sycophancy", mode="difference", reference_column="top")
    source = JudgeReward(given, FakeJudge(number))
    assert rewards(source, "9", "1", top="4") == pytest.approx([-0.5, 0.3])


def test_pairwise_asks_in_both_orders_and_a_judge_of_places_says_nothing() -> None:
    backend = FakeJudge(lambda _: 10)  # the first is always better
    source = JudgeReward(settings(mode="pairwise", reference_column="top"), backend)
    assert rewards(source, "a", top="b") == [0]
    assert [shown(r) for r in backend.requests[-2:]] == ["a", "b"]
    source = JudgeReward(settings(mode="pairwise", reference_column="top"), FakeJudge(number))
    assert rewards(source, "9", top="2") == pytest.approx([absolute((9 + 8) / 2)])


@given(SCORES, SCORES)
def test_every_mode_stays_between_minus_1_and_1_and_turns_round(s: float, t: float) -> None:
    for value in (absolute(s), difference(s, t), absolute(both_orders(s, t))):
        assert -1 <= value <= 1
    assert difference(s, t) == -difference(t, s)
    assert absolute(both_orders(s, t)) == pytest.approx(-absolute(both_orders(t, s)))


def test_criteria_are_asked_alone_weighted_and_logged_as_parts() -> None:
    def score(text: str) -> int:
        return 5

    class ByCriterion(FakeJudge):
        async def ask(self, request):
            self._score = lambda _: 10 if "Is it true?" in request.messages[0]["content"] else 0
            return await super().ask(request)

    criteria = {"truth": {"text": "Is it true?", "weight": 3}, "style": {"text": "Is it short?"}}
    source = JudgeReward(settings(criteria=criteria), ByCriterion(score))
    scores = resolve_scores(source, rollout("a", ""))
    assert scores.reward.tolist() == [0.5, -1]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "truth": [1, -1],
        "style": [-1, -1],
    }


def test_votes_are_averaged_and_their_spread_is_a_part() -> None:
    class Voter(FakeJudge):
        async def ask(self, request):
            self._score = lambda _: (2, 4, 9)[request.vote]
            return await super().ask(request)

    source = JudgeReward(settings(votes=3), Voter())
    scores = resolve_scores(source, rollout("a"))
    assert scores.reward.tolist() == [0]
    assert scores.parts["vote_sd"].tolist() == pytest.approx([26 ** (1 / 2) / 3**0.5], rel=1e-5)


@pytest.mark.parametrize("bad", [0, 1])
def test_half_of_the_votes_are_enough(bad: int) -> None:
    class Voter(FakeJudge):
        async def ask(self, request):
            is_sample = "France" in request.messages[0]["content"]
            self._score = lambda _: 8 if is_sample or request.vote > bad else "no"
            return await super().ask(request)

    source = JudgeReward(settings(votes=2), Voter())
    found = rewards(source, "a")[0]
    assert found == pytest.approx(0.6) if bad == 0 else found != found


@pytest.mark.parametrize("empty", ["", "  \n", "\u200b", "\u2060\ufeff"])
def test_an_empty_response_gets_the_floor_without_a_call_and_is_counted(empty: str) -> None:
    backend = FakeJudge(number)
    source = JudgeReward(settings(), backend)
    assert rewards(source, empty, "6") == pytest.approx([-1, 0.2])
    assert len(backend.requests) == 3  # the sample for log-probs, for JSON, and "6"
    metrics = source.metrics()
    assert metrics["judge/empty_share"] == 0.5
    assert metrics["judge/unscored_share"] == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"on_unscored": "floor"}, -1),
        ({"on_unscored": "value", "unscored_value": 0.25}, 0.25),
    ],
)
def test_on_unscored_masks_or_stands_in(given: dict, expected: float | None) -> None:
    def score(response: str) -> object:
        return "no" if response == "x" else 5

    source = JudgeReward(settings(**given), FakeJudge(score))
    found, other = rewards(source, "x", "y")
    assert other == 0
    assert found != found if expected is None else found == expected
    metrics = source.metrics()
    assert metrics["judge/unscored_share"] == 0.5
    assert metrics["judge/unscored_parse"] == 1


@pytest.mark.parametrize("text", ALL)
def test_an_echoing_judge_scores_no_injection(text: str) -> None:
    def echo(response: str) -> object:
        return 9 if "Paris" in response else response

    for has_json in (False, True):
        source = JudgeReward(settings(), FakeJudge(echo, has_json=has_json))
        assert rewards(source, text)[0] != rewards(source, text)[0]


class Clock:
    """Time that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def test_an_outage_is_waited_out_and_only_the_missing_are_asked_again() -> None:
    clock = Clock()

    def score(response: str) -> object:
        is_down = response in ("1", "2") and clock.now < 30
        return answer(cause="transport") if is_down else number(response)

    backend, said = FakeJudge(score), []
    source = JudgeReward(settings(), backend, sleep=clock.sleep, clock=clock, say=said.append)
    assert rewards(source, "1", "2", "5") == pytest.approx([-0.8, -0.6, 0])
    assert clock.now == 5 + 10 + 20
    assert backend.count("5") == 1
    assert "asking the judge again in 5 s" in said[0]


def test_an_outage_beyond_the_patience_ends_the_run_with_exit_code_4() -> None:
    clock = Clock()

    def score(response: str) -> object:
        return 5 if "Paris" in response else answer(cause="transport")

    source = JudgeReward(
        settings(), FakeJudge(score), sleep=clock.sleep, clock=clock, say=lambda _: None
    )
    with pytest.raises(JudgeError, match=r"4 of 4 .* also after 600 s .*transport: 4") as caught:
        rewards(source, "1", "2", "3", "4")
    assert caught.value.exit_code == 4
    assert clock.now == 600


def test_too_many_answers_that_cannot_be_read_end_the_run_without_waiting() -> None:
    def score(response: str) -> object:
        return "no" if response == "x" else 5

    clock = Clock()
    source = JudgeReward(settings(), FakeJudge(score), sleep=clock.sleep, clock=clock)
    rewards(source, *["y"] * 24, *["x"] * 8)  # a quarter is not more than a quarter
    with pytest.raises(JudgeError, match="9 of 32 responses"):
        rewards(source, *["y"] * 23, *["x"] * 9)
    assert clock.now == 0


def test_small_steps_are_judged_over_the_last_32_responses() -> None:
    def score(response: str) -> object:
        return "no" if response == "x" else 5

    source = JudgeReward(settings(), FakeJudge(score))
    for _ in range(7):
        rewards(source, "x", "x", "y", "y")
    with pytest.raises(JudgeError, match="16 of 32 responses"):
        rewards(source, "x", "x", "y", "y")


def test_more_than_5_percent_over_the_run_end_it() -> None:
    def score(response: str) -> object:
        return "no" if response == "x" else 5

    source = JudgeReward(settings(), FakeJudge(score))
    step = ["x"] * 4 + ["y"] * 36
    for _ in range(4):
        rewards(source, *step)
    with pytest.raises(JudgeError, match=r"20 of 200 .*max_unscored_run=0.05"):
        rewards(source, *step)


def test_probes_that_are_liked_are_warned_of() -> None:
    source = JudgeReward(settings(probes=True), FakeJudge(lambda _: 8))
    with pytest.warns(UserWarning, match=r"an empty response gets \+0.60.*a lone colon"):
        rewards(source, "a")
    backend = FakeJudge(lambda text: 8 if "Paris" in text else 1)
    source = JudgeReward(settings(probes=True), backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards(source, "a")
        rewards(source, "a")
    assert backend.count(":") == 1


def test_a_jump_of_top_scores_is_an_alarm_once() -> None:
    said: list[str] = []
    source = JudgeReward(settings(), FakeJudge(number), say=said.append)
    for score in ["5", "5", "10", "10", "10"]:
        rewards(source, *[score] * 40)
    assert len(said) == 1
    assert "share of top scores rose from 0% to" in said[0]


def test_a_missing_reference_column_names_those_that_are_there() -> None:
    source = JudgeReward(settings(mode="difference", reference_column="top"), FakeJudge())
    with pytest.raises(ConfigError, match=r"reference_column=top: .*there are prompt, title"):
        rewards(source, "a", title="x")


def test_a_row_without_a_reference_is_unscored() -> None:
    source = JudgeReward(settings(mode="difference", reference_column="top"), FakeJudge())
    assert rewards(source, "a", top="") != rewards(source, "a", top="")
    assert source.metrics()["judge/unscored_no_reference"] == 2


def test_costs_add_up_and_shares_are_those_since_the_last_call() -> None:
    backend = FakeJudge(number)
    source = JudgeReward(settings(max_response_chars=3), backend)
    rewards(source, "7", "abcdef")
    metrics = source.metrics()
    assert metrics["judge/num_calls"] == 4
    assert metrics["judge/cost_usd"] == pytest.approx(4e-5)
    assert metrics["judge/cut_share"] == 0.5
    backend._score = lambda _: answer('{"score": 1}', cached=True, num_attempts=0, cost_usd=0.0)
    rewards(source, "7")
    metrics = source.metrics()
    assert metrics["judge/num_calls"] == 4
    assert metrics["judge/cached_share"] == 1
    assert metrics["judge/cut_share"] == 0
    backend._score = lambda _: answer('{"score": 1}', cost_usd=None)
    rewards(source, "7")
    assert "judge/cost_usd" not in source.metrics()


def test_a_judge_is_a_part_of_a_sum() -> None:
    class Length:
        def score(self, rollout: Rollout) -> Scores:
            return Scores(reward=torch.tensor([float(len(r)) for r in rollout.responses]))

    judge = JudgeReward(settings(), FakeJudge(number))
    source = SumReward({"judge": Part(source=judge), "length": Part(source=Length(), weight=0.1)})
    scores = resolve_scores(source, rollout("10", "abc"))
    assert scores.reward.tolist() == pytest.approx([1.2, 0.7])
    assert scores.parts["judge"].tolist() == pytest.approx([1, 0.4])
    assert judge_metrics(source)["judge/judge/num_calls"] == 4
    assert judge_metrics(judge)["judge/num_calls"] == 4
    assert judge_metrics(Length()) == {}


def test_an_error_of_the_backend_is_raised_and_ends_the_other_calls() -> None:
    cancelled = []

    class Broken(FakeJudge):
        async def ask(self, request):
            if shown(request) == "stop":
                raise JudgeError("no key")
            if shown(request) == "slow":
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    cancelled.append(1)
                    raise
            return await super().ask(request)

    with pytest.raises(JudgeError, match="no key"):
        rewards(JudgeReward(settings(), Broken()), "slow", "stop")
    assert cancelled == [1]


def test_a_judge_opens_in_every_mode() -> None:
    for mode in ("absolute", "difference", "pairwise"):
        column = None if mode == "absolute" else "top"
        source = JudgeReward(settings(mode=mode, reference_column=column), FakeJudge(number))
        wait_for(source.open())
        assert source.judge.source == "json"


def test_the_judge_reads_the_prompt_without_templates() -> None:
    def made(text: str, content: str | None = None, **meta: object) -> Prompt:
        return Prompt(id=0, text=text, token_ids=[], content=content, meta=meta)

    assert prompt_text(made("<|user|>Why?<|assistant|>", content="Why?")) == "Why?"
    assert prompt_text(made("<|user|>Why?<|assistant|>", prompt="Why?")) == "Why?"
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert prompt_text(made("<u>Why?<a>So.<u>", prompt=chat)) == "user: Why?\n\nassistant: So."
    assert prompt_text(made("Why", prompt="Why do you ask?")) == "Why"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"mode": "difference"}, "reference_column is missing"),
        ({"rationale": True, "score_source": "logprobs"}, "rationale=true needs words"),
        ({"votes": 3, "temperature": 0}, "would all be the same"),
        ({"on_unscored": "value"}, "unscored_value=None"),
        ({"unscored_value": 0.5}, "on_unscored=mask"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(given: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        settings(**given)


def test_material_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Material(prompt="a", response="b").prompt = "c"  # type: ignore[misc]
