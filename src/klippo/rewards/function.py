"""A Python function as the reward."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import torch

from klippo.errors import ConfigError, RewardError
from klippo.types import Rollout, Scores

ALWAYS_THERE = ("prompts", "responses", "token_ids")


class FunctionReward:
    """Calls a function, sync or async, that returns one number per response, or None: unscored.

    It is called with keyword arguments: `prompts` (what the policy read, list[str]), `responses`
    (list[str]), `token_ids` (the responses', list[list[int]]), and each column of the data set as a
    list. Without a `**kwargs` of its own it gets only the arguments that it names. A column that is
    called as one of the first three is not passed.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        """`name` is for messages. Raises ConfigError when the function needs unnamed arguments."""
        self._function = function
        self._name = name or str(getattr(function, "__qualname__", repr(function)))
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            type(function).__call__
        )
        self._takes_all, self._takes, self._needs = _parameters(function, self._name)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise ConfigError when the function needs an argument that these columns do not give."""
        there = [*ALWAYS_THERE, *(c for c in columns if c not in ALWAYS_THERE)]
        missing = [name for name in self._needs if name not in there]
        if missing:
            raise ConfigError(
                f"reward function {self._name} needs the argument {missing[0]!r}, and there are "
                f"only {', '.join(there)}; rename it, give it a default, or add the column to the "
                "data"
            )

    def score(self, rollout: Rollout) -> Scores | Awaitable[Scores]:
        """reward: (B,) float32, NaN where the function returned None; awaitable if it is async.

        Where it returned NaN or an infinite number, `not_finite` says so. Raises RewardError when
        the function raises, or returns something else than B numbers (or None); ConfigError when it
        needs an argument that is not there.
        """
        arguments = self._arguments(rollout)
        if self._is_async:  # not called before it is awaited, so that no coroutine is left behind
            return self._score_when_ready(lambda: self._function(**arguments), rollout)
        try:
            returned = self._function(**arguments)
        except Exception as error:
            raise self._raised(error) from error
        if inspect.isawaitable(returned):
            return self._score_when_ready(lambda: returned, rollout)
        return self._scores(returned, rollout)

    async def _score_when_ready(
        self, call: Callable[[], Awaitable[Any]], rollout: Rollout
    ) -> Scores:
        try:
            returned = await call()
        except Exception as error:
            raise self._raised(error) from error
        return self._scores(returned, rollout)

    def _arguments(self, rollout: Rollout) -> dict[str, Any]:
        columns = list(dict.fromkeys(name for prompt in rollout.prompts for name in prompt.meta))
        self.check_columns(columns)
        arguments: dict[str, Any] = {
            name: [prompt.meta.get(name) for prompt in rollout.prompts]
            for name in columns
            if self._takes_all or name in self._takes
        }
        given = {
            "prompts": [prompt.text for prompt in rollout.prompts],
            "responses": list(rollout.responses),
            "token_ids": rollout.response_token_ids(),
        }
        return arguments | {
            name: values for name, values in given.items() if self._takes_all or name in self._takes
        }

    def _scores(self, returned: Any, rollout: Rollout) -> Scores:
        if isinstance(returned, torch.Tensor):
            returned = returned.detach().cpu()
        if hasattr(returned, "tolist"):  # torch, numpy, pandas
            returned = returned.tolist()
        if not isinstance(returned, list | tuple):
            raise self._refused(f"returned {_shown(returned)}; a list of numbers is needed")
        if len(returned) != len(rollout):
            raise self._refused(
                f"returned {len(returned)} scores for {len(rollout)} responses; return one each, "
                "None for a response that cannot be scored"
            )
        values: list[float] = []
        not_finite: dict[int, str] = {}
        for row, value in enumerate(returned):
            number = float("nan") if value is None else self._number(value, row, rollout)
            if value is not None and not abs(number) <= torch.finfo(torch.float32).max:
                not_finite[row] = (
                    f"reward function {self._name} returned {number} {_where(rollout, row)}; "
                    "return None for a response that cannot be scored"
                )
                number = float("nan")
            values.append(number)
        device = rollout.tokens.response_ids.device
        reward = torch.tensor(values, dtype=torch.float32, device=device)
        return Scores(reward=reward, not_finite=not_finite)

    def _number(self, value: Any, row: int, rollout: Rollout) -> float:
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise self._refused(
                f"returned {_shown(value)} {_where(rollout, row)}; a number is needed"
            ) from None

    def _refused(self, what: str) -> RewardError:
        return RewardError(f"reward function {self._name} {what}")

    def _raised(self, error: Exception) -> RewardError:
        code = getattr(inspect.unwrap(self._function), "__code__", None)
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if code is not None and f.filename == code.co_filename]
        site = (own or list(frames))[-1]
        return self._refused(
            f"raised {type(error).__name__}: {error} at {site.filename}:{site.lineno}; mend it "
            "there, or return None for responses that cannot be scored"
        )


def _parameters(function: Callable[..., Any], name: str) -> tuple[bool, set[str], list[str]]:
    """Whether it takes any argument, the names it takes, and the names it cannot do without."""
    try:
        parameters: Sequence[inspect.Parameter] = [*inspect.signature(function).parameters.values()]
    except ValueError:  # some built-ins have no signature
        return True, set(), []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in parameters:
        if (
            parameter.kind is inspect.Parameter.POSITIONAL_ONLY
            and parameter.default is inspect.Parameter.empty
        ):
            raise ConfigError(
                f"reward function {name} takes {parameter.name!r} by position only; it is called "
                "with keyword arguments: prompts, responses, token_ids and the data's columns"
            )
    return (
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
        {p.name for p in parameters if p.kind in named},
        [p.name for p in parameters if p.kind in named and p.default is inspect.Parameter.empty],
    )


def _where(rollout: Rollout, row: int) -> str:
    return f"for row {row} (prompt {_shown(rollout.prompts[row].text)})"


def _shown(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
