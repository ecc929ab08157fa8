"""A Python function as the reward, and finding it by its name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from klippo.errors import ConfigError, RewardError, nearest
from klippo.types import Rollout, Scores

ALWAYS_GIVEN = ("prompts", "responses", "token_ids")


class FunctionReward:
    """Calls a function, sync or async, that returns one number per response, or None: unscored.

    It is called with keyword arguments: `prompts` (what the policy read, list[str]), `responses`
    (list[str]), `token_ids` (the responses', list[list[int]]), and each column of the data set as a
    list. Without a `**kwargs` of its own it gets only the arguments that it names. A column that is
    called as one of the first three is not passed.
    """

    def __init__(self, function: Callable[..., object], name: str | None = None) -> None:
        """`name` is for messages. Raises ConfigError if the function takes an argument by position.

        Without a signature (some built-ins have none) it gets all arguments.
        """
        self._function = function
        self._name = name or str(getattr(function, "__qualname__", repr(function)))
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            type(function).__call__
        )
        self._takes_all = True
        self._takes: dict[str, bool] = {}
        """Name of an argument -> whether it is required."""
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:
            return
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        for p in parameters:
            if p.kind is p.POSITIONAL_ONLY and p.default is p.empty:
                raise ConfigError(
                    f"reward function {self._name} takes {p.name!r} by position only; it is called "
                    "with keyword arguments: prompts, responses, token_ids and the data's columns"
                )
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                self._takes[p.name] = p.default is p.empty

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise ConfigError when the function needs an argument that these columns do not give."""
        given = [*ALWAYS_GIVEN, *(c for c in columns if c not in ALWAYS_GIVEN)]
        for name, is_required in self._takes.items():
            if is_required and name not in given:
                raise ConfigError(
                    f"reward function {self._name} needs the argument {name!r}, and there are only "
                    f"{', '.join(given)}; rename it, give it a default, or add the column to the "
                    "data"
                )

    def score(self, rollout: Rollout) -> Scores | Awaitable[Scores]:
        """reward: (B,) float32, NaN where the function returned None; awaitable if it is async.

        If it returned NaN or an infinite number, `not_finite` says so. Raises RewardError when
        the function raises, or returns something else than B numbers (or None); ConfigError when it
        needs an argument that is not given.
        """
        arguments = self._arguments(rollout)
        if self._is_async:  # not called before it is awaited, so that no coroutine is left behind
            return self._score_when_ready(lambda: self._function(**arguments), rollout)
        with self._blaming():
            returned = self._function(**arguments)
        if inspect.isawaitable(returned):
            return self._score_when_ready(lambda: returned, rollout)
        return self._scores(returned, rollout)

    async def _score_when_ready(self, call: Callable[[], object], rollout: Rollout) -> Scores:
        with self._blaming():
            returned = call()
            if inspect.isawaitable(returned):
                returned = await returned
        return self._scores(returned, rollout)

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Report an exception with the last line of the function's own file."""
        try:
            yield
        except Exception as error:
            code = getattr(inspect.unwrap(self._function), "__code__", None)
            frames = list(traceback.extract_tb(error.__traceback__))
            inside = [f for f in frames if code is not None and f.filename == code.co_filename]
            site = (inside or frames)[-1]
            raise self._refused(
                f"raised {type(error).__name__}: {error} at {site.filename}:{site.lineno}; fix it "
                "there, or return None for responses that cannot be scored"
            ) from error

    def _arguments(self, rollout: Rollout) -> dict[str, object]:
        columns = list(dict.fromkeys(name for prompt in rollout.prompts for name in prompt.meta))
        self.check_columns(columns)
        given: dict[str, object] = {
            name: [prompt.meta.get(name) for prompt in rollout.prompts] for name in columns
        }
        given["prompts"] = [prompt.text for prompt in rollout.prompts]
        given["responses"] = list(rollout.responses)
        given["token_ids"] = rollout.response_token_ids()
        if self._takes_all:
            return given
        return {name: values for name, values in given.items() if name in self._takes}

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
            where = f"for row {row} (prompt {_shown(rollout.prompts[row].text)})"
            try:
                if isinstance(value, str | bytes):
                    raise TypeError
                number = float("nan") if value is None else float(value)
            except (TypeError, ValueError, OverflowError):
                raise self._refused(
                    f"returned {_shown(value)} {where}; a number is needed"
                ) from None
            if value is not None and not abs(number) <= torch.finfo(torch.float32).max:
                not_finite[row] = (
                    f"reward function {self._name} returned {number} {where}; "
                    "return None for a response that cannot be scored"
                )
                number = float("nan")
            values.append(number)
        device = rollout.tokens.response_ids.device
        reward = torch.tensor(values, dtype=torch.float32, device=device)
        return Scores(reward=reward, not_finite=not_finite)

    def _refused(self, what: str) -> RewardError:
        return RewardError(f"reward function {self._name} {what}")


def _shown(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def load_function(spec: str) -> Callable[..., object]:
    """The callable behind `package.module:name` or `path/to/file.py:name`.

    Modules are looked for in the working directory too; a file may import its neighbours.
    Raises ConfigError when the file, the module or the name is missing, or is not callable.
    """
    home, _, name = spec.rpartition(":")
    if not home or not name:
        raise ConfigError(
            f"function {spec!r} must look like package.module:name or path/to/file.py:name"
        )
    function: object = _load(home)
    for part in name.split("."):
        if not hasattr(function, part):
            public = [key for key in getattr(function, "__dict__", ()) if not key.startswith("_")]
            near = nearest(part, public)
            hint = f"; did you mean {near!r}?" if near else "; check the name"
            raise ConfigError(f"function {spec!r}: {home} has no {name!r}{hint}")
        function = getattr(function, part)
    if not callable(function):
        raise ConfigError(f"function {spec!r}: it is {type(function).__name__}, not a function")
    return function


def _load(home: str) -> ModuleType:
    """The module of this name, or in this file."""
    is_file = home.endswith(".py") or "/" in home
    path = Path(home).expanduser()
    if is_file and not path.is_file():
        raise ConfigError(
            f"function file {path} does not exist (looked in {Path.cwd()}); check the path"
        )
    path = path.resolve()
    folder = str(path.parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        if is_file:
            return _run_file(path)
        importlib.invalidate_caches()
        return importlib.import_module(home)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if not is_file and missing and (home == missing or home.startswith(missing + ".")):
            raise ConfigError(
                f"there is no module {missing!r}, neither installed nor in {Path.cwd()}; "
                "install it, or name a file: path/to/file.py:name"
            ) from None
        frames = traceback.extract_tb(error.__traceback__)
        outside = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
        name = str(path) if is_file else home
        site = f"{outside[-1].filename}:{outside[-1].lineno}" if outside else name
        if isinstance(error, SyntaxError):
            site = f"{error.filename}:{error.lineno}"
        raise ConfigError(
            f"{name} cannot be imported: {type(error).__name__}: {error} at {site}; fix it there"
        ) from error


def _run_file(path: Path) -> ModuleType:
    name = f"klippo_function_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise ImportError("it is not Python; name a file that ends in .py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses and pickle look a function's module up there
    specification.loader.exec_module(module)
    return module
