"""A function gets what it names, and every mistake in it is reported with name and place."""

import asyncio
import functools

import numpy as np
import pytest
import torch

from klippo.errors import ConfigError, RewardError
from klippo.rewards.function import FunctionReward, load_function
from klippo.rewards.resolve import resolve_scores

from .conftest import make_rollout

ROLLOUT = make_rollout(
    ["yes", "no"],
    prompts=["Is it?", "Was it?"],
    token_ids=[[4, 5], [6]],
    metas=[{"label": 1, "prompt": "Is"}, {"label": 0, "prompt": "Was"}],
)


def score(function, rollout=ROLLOUT):
    return resolve_scores(FunctionReward(function), rollout)


def test_a_function_that_takes_anything_gets_everything():
    seen = {}

    def function(**kwargs):
        seen.update(kwargs)
        return [1, 2]

    assert score(function).reward.tolist() == [1.0, 2.0]
    assert seen == {
        "prompts": ["Is it?", "Was it?"],
        "responses": ["yes", "no"],
        "token_ids": [[4, 5], [6]],
        "label": [1, 0],
        "prompt": ["Is", "Was"],
    }


def test_a_function_gets_only_what_it_names():
    def function(responses, label, *, scale=10):
        return [scale * x for x in label]

    assert score(function).reward.tolist() == [10.0, 0.0]


def test_a_column_never_hides_what_was_sampled():
    rollout = make_rollout(["new"], metas=[{"responses": "old"}])
    assert score(lambda responses: [float(responses == ["new"])], rollout).reward.tolist() == [1.0]


class Callable:
    def __call__(self, responses):
        return [1.0, 2.0]


class AsyncCallable:
    async def __call__(self, responses):
        return [1.0, 2.0]


async def coroutine_function(responses, factor=1):
    await asyncio.sleep(0)
    return [1.0 * factor, 2.0 * factor]


@pytest.mark.parametrize(
    "function",
    [
        Callable(),
        AsyncCallable(),
        coroutine_function,
        functools.partial(coroutine_function, factor=1),
        lambda responses: coroutine_function(responses),
    ],
)
def test_sync_and_async_callables_of_every_kind_are_scored(function):
    assert score(function).reward.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5],
        (1, 0.5),
        np.array([1, 0.5]),
        np.array([1, 0.5], dtype=np.float32),
        torch.tensor([1, 0.5], requires_grad=True),
        [True, np.float32(0.5)],
        [torch.tensor(1.0), torch.tensor([0.5])],
    ],
)
def test_numbers_of_every_kind_are_taken(returned):
    reward = score(lambda: returned).reward
    assert reward.tolist() == [1.0, 0.5]
    assert reward.dtype == torch.float32


def test_none_is_unscored():
    reward = score(lambda: [None, 2]).reward
    assert reward.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 scores for 2 responses; return one each"),
        ([1.0, float("nan")], r"returned nan for row 1 \(prompt 'Was it\?'\); return None for"),
        ([float("inf"), 1.0], r"returned inf for row 0 \(prompt 'Is it\?'\); return None for"),
        ([1e300, 1.0], r"returned 1e\+300 for row 0"),
        ([1.0, "2"], r"returned '2' for row 1 .* a number is needed"),
        ([1.0, [2.0]], r"returned \[2.0\] for row 1"),
        (np.ones((2, 1)), r"returned \[1.0\] for row 0"),
        ([1.0, 2j], "returned 2j for row 1"),
        (3.0, "returned 3.0; a list of numbers is needed"),
        (None, "returned None; a list of numbers is needed"),
        ({"a": 1, "b": 2}, "a list of numbers is needed"),
        (torch.tensor(1.0), "returned 1.0; a list of numbers is needed"),
    ],
)
def test_what_is_not_one_number_per_response_is_refused(returned, message):
    def judge():
        return returned

    async def async_judge():
        return returned

    for function in (judge, async_judge):
        with pytest.raises(RewardError, match="reward function .*judge .*" + message):
            score(function)


def test_a_function_that_raises_is_reported_with_name_and_line():
    def helper(x):
        return 1 / x

    def judge(label):
        return [helper(x) for x in label]

    async def async_judge(label):
        return judge(label)

    line = helper.__code__.co_firstlineno + 1
    for function in (judge, async_judge):
        match = rf"judge raised ZeroDivisionError: division by zero at .*test_function\.py:{line};"
        with pytest.raises(RewardError, match=match) as error:
            score(function)
        assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_the_line_reported_is_the_users_and_not_the_librarys():
    def judge(responses):
        return np.concatenate([1])

    line = judge.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"test_function\.py:{line};"):
        score(judge)


def test_a_needed_argument_that_is_not_there_lists_the_columns():
    def judge(responses, answer):
        return [1.0, 2.0]

    message = "needs the argument 'answer', and there are only prompts, responses, token_ids, label"
    with pytest.raises(ConfigError, match=message):
        score(judge)
    with pytest.raises(ConfigError, match="token_ids, prompt; rename it, give it a default"):
        FunctionReward(judge).check_columns(["prompt"])
    FunctionReward(judge).check_columns(["answer"])


def test_arguments_by_position_only_are_refused_before_the_run():
    def judge(responses, /):
        return responses

    with pytest.raises(ConfigError, match="takes 'responses' by position only"):
        FunctionReward(judge)


def test_a_function_is_found_in_a_module():
    assert load_function("tests.rewards.functions:length")(["ab"]) == [2]
    assert load_function("tests.rewards.functions:Scorer.half")(["ab"]) == [0.5]


def test_a_function_is_found_in_a_file_that_imports_its_neighbour(tmp_path, monkeypatch):
    (tmp_path / "klippo_test_neighbour.py").write_text("def two():\n    return 2\n")
    (tmp_path / "mine.py").write_text(
        "from klippo_test_neighbour import two\ndef score(responses):\n    return [two()]\n"
    )
    assert load_function(f"{tmp_path}/mine.py:score")([]) == [2]
    monkeypatch.chdir(tmp_path)
    assert load_function("mine.py:score")([]) == [2]


def test_a_module_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "klippo_test_module.py").write_text("def score(responses):\n    return [1]\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("klippo_test_module:score")([]) == [1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("length", "must look like package.module:name or path/to/file.py:name"),
        (":length", "must look like"),
        ("tests.rewards.functions:", "must look like"),
        ("nowhere/mine.py:score", r"nowhere/mine\.py does not exist \(looked in "),
        ("no_such_module_at_all:score", "no module 'no_such_module_at_all', neither installed"),
        ("tests.rewards.nothing:score", r"no module 'tests\.rewards\.nothing'"),
        ("tests.rewards.functions:lenght", "has no 'lenght'; did you mean 'length'?"),
        ("tests.rewards.functions:xyz", "has no 'xyz'; check the name"),
        ("tests.rewards.functions:NOT_CALLABLE", "it is int, not a function"),
    ],
)
def test_a_function_that_is_not_there_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        load_function(spec)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ny = 1 / 0\n", r"ZeroDivisionError: division by zero at .*broken\.py:2; fix it"),
        ("def f(:\n", r"SyntaxError: .* at .*broken\.py:1; fix it"),
        ("import no_such_thing\n", r"No module named 'no_such_thing' at .*broken\.py:1"),
    ],
)
def test_a_file_that_cannot_be_imported_is_reported_with_the_line(tmp_path, source, message):
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        load_function(f"{tmp_path}/broken.py:score")
