"""Logged responses: what rows may hold, and what is refused with its place."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klippo.data.files import Row
from klippo.data.logged import (
    leave_one_out,
    log_responses,
    read_responses,
    refuse_equal_rewards,
)
from klippo.data.settings import OfflineSettings
from klippo.errors import ConfigError
from klippo.types import BASELINE, Prompt

SETTINGS = OfflineSettings()
RECORDED = OfflineSettings(behavior="recorded", logprobs_column="logprobs")


class Letters:
    """Every letter is a token; `.` ends."""

    eos_token_id = 0

    def __len__(self):
        return 27

    def encode(self, text, add_special_tokens):
        return [ord(ch) - 96 for ch in text]


def rows(*columns):
    return [Row(i, one, i + 1, "scored.jsonl") for i, one in enumerate(columns)]


def read(*columns, settings=SETTINGS):
    return read_responses(
        rows(*columns), settings, reward_column="reward", prompt_columns=["prompt"]
    )


def row(response="good", reward=1.0, prompt="q", **more):
    return {"prompt": prompt, "response": response, "reward": reward} | more


def logged(*columns, settings=SETTINGS, context=None):
    answers = read(*columns, settings=settings)
    prompts = [
        Prompt(id=i, text=c["prompt"], token_ids=[1, 2], meta=c) for i, c in enumerate(columns)
    ]
    return log_responses(
        answers,
        prompts,
        Letters(),
        settings,
        reward_column="reward",
        prompt_columns=["prompt"],
        stop_ids=frozenset([0]),
        context=context,
    )


def test_a_row_is_a_response_and_a_list_is_several():
    found = logged(row("ab", 1), {"prompt": "r", "response": ["c", "d"], "reward": [0.5, "2"]})
    assert [one.completion.token_ids for one in found] == [[1, 2, 0], [3, 0], [4, 0]]
    assert [one.reward for one in found] == [1.0, 0.5, 2.0]
    assert [one.prompt.meta["response"] for one in found] == ["ab", "c", "d"]
    assert [one.prompt.meta["reward"] for one in found] == [1.0, 0.5, 2.0]
    assert all(one.completion.finished for one in found)


def test_token_ids_are_taken_as_they_were_sampled():
    settings = OfflineSettings(token_ids_column="ids")
    found = logged(row(ids=[7, 7]), row("x", 0, ids="[5, 0]"), settings=settings)
    assert [one.completion.token_ids for one in found] == [[7, 7], [5, 0]]
    assert [one.completion.finished for one in found] == [False, True]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"reward": None}, "reward' holds nothing where a finite number is needed; score"),
        ({"reward": math.nan}, "reward' holds float 'nan' where a finite number is needed"),
        ({"reward": "eight"}, "'eight' where a finite number is needed"),
        ({"reward": True}, "bool 'True' where a finite number is needed"),
        ({"response": "  "}, "'  ' where text is needed; fill"),
        ({"response": None}, "nothing where text is needed; fill"),
        ({"response": ["a", "b"], "reward": [1.0]}, "'response' 2, 'reward' 1"),
        ({"response": ["a", "b"], "reward": 1.0}, "'response' 2, 'reward' no list"),
    ],
)
def test_a_bad_row_is_named(bad, told):
    with pytest.raises(ConfigError, match="row 1 ") as error:
        read(row(), row("other", 2) | bad)
    assert told in str(error.value)
    assert "scored.jsonl, row 1 (line 2)" in str(error.value)


def test_missing_columns_are_named_with_what_is_meant():
    with pytest.raises(ConfigError, match="did you mean 'respons'"):
        read({"respons": "x", "prompt": "q", "reward": 1})
    with pytest.raises(ConfigError, match="no column 'reward'"):
        read({"response": "x", "score": 1})


def test_equal_rewards_are_refused():
    with pytest.raises(ConfigError, match=r"all 2 rewards in column 'reward' are 0\.5"):
        refuse_equal_rewards(read(row("a", 0.5), row("b", 0.5)), "reward")
    refuse_equal_rewards(read(row("a", 0.5), row("b", 0.6)), "reward")


def test_duplicates_are_refused_kept_or_dropped():
    rows = row("a", 1), row("b", 2), row("a", 3)
    with pytest.raises(ConfigError, match=r"row 2 \(line 3\): the same .* as scored.jsonl, row 0"):
        read(*rows)
    assert len(read(*rows, settings=OfflineSettings(duplicates="keep"))) == 3
    first = read(*rows, settings=OfflineSettings(duplicates="drop"))
    assert [one.reward for one in first] == [1, 2]
    assert len(read(row("a", 1), row("a", 2, prompt="another"))) == 2


def test_log_probs_must_belong_to_the_tokens():
    good = row("ab", 1, logprobs=[-0.1, -0.2, -0.3])
    found = logged(good, row("c", 0, logprobs=[-1, 0]), settings=RECORDED)
    assert found[0].completion.logprobs == [-0.1, -0.2, -0.3]
    for wrong, told in {
        (-0.1, -0.2): "2 log-probs for 3 response tokens",
        (-0.1, 0.2, -0.3): "0.2 is no log-prob",
        (-0.1, -math.inf, -0.3): "-inf is no log-prob",
    }.items():
        with pytest.raises(ConfigError, match=r"row 1 \(line 2\)") as error:
            logged(good, row("de", 0, logprobs=list(wrong)), settings=RECORDED)
        assert told in str(error.value)
    with pytest.raises(ConfigError, match="a list of log-probs"):
        read(row(logprobs="high"), settings=RECORDED)


def test_a_response_that_does_not_fit_is_named():
    with pytest.raises(ConfigError, match=r"2 \+ 5 tokens, and the model's context is 6"):
        logged(row("abcd", 1), row("a", 0), context=6)
    with pytest.raises(ConfigError, match="99 is no token"):
        logged(
            row(ids=[99]),
            row("x", ids=[1], reward=0),
            settings=OfflineSettings(token_ids_column="ids"),
        )


def test_leave_one_out_by_hand():
    answers = read(row("a", 1), row("b", 2), row("c", 6), row("d", 4, "r"), row("e", 8, "r"))
    assert leave_one_out(answers, ["prompt"]) == [4.0, 3.5, 1.5, 8.0, 4.0]
    with pytest.raises(ConfigError, match=r"row 2 .*the only response to its prompt \(1 of 2"):
        leave_one_out(read(row("a", 1), row("b", 2), row("c", 6, "r")), ["prompt"])
    settings = OfflineSettings(baseline="leave_one_out")
    found = logged(row("a", 1), row("b", 2), row("c", 6), settings=settings)
    assert [one.prompt.meta[BASELINE] for one in found] == [4.0, 3.5, 1.5]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8).filter(lambda x: len(set(x)) > 1))
def test_leave_one_out_compares_a_group_with_itself(rewards):
    """Advantages of a prompt add up to zero, and their order is that of the rewards."""
    answers = read(*(row(f"r{i}", reward) for i, reward in enumerate(rewards)))
    baselines = leave_one_out(answers, ["prompt"])
    advantages = [r - b for r, b in zip(rewards, baselines, strict=True)]
    assert sum(advantages) == pytest.approx(0, abs=1e-9 * len(rewards) * 100)
    by_reward = sorted(range(len(rewards)), key=lambda i: rewards[i])
    ordered = [advantages[i] for i in by_reward]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(ordered))


def test_behaviour_and_its_column_belong_together():
    for given_ in ({"behavior": "recorded"}, {"logprobs_column": "logprobs"}):
        with pytest.raises(ValueError, match="recorded log-probs need both"):
            OfflineSettings(**given_)
