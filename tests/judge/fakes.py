"""Judges for tests: in this process, and behind a socket."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from klippo.judge.messages import Answer, Request
from klippo.judge.settings import JudgeSettings

ROOT = Path(__file__).parent.parent.parent
API = {"provider": "local", "model": "fake", "base_url": "http://127.0.0.1:9/v1"}


def lexicon_judge() -> Any:
    """The module examples/llm-judge/lexicon_judge.py."""
    return script("examples/llm-judge/lexicon_judge.py")


def script(path: str) -> Any:
    """A script of this repository as a module, loaded once."""
    name = "klippo_script_" + path.removesuffix(".py").replace("/", "_").replace("-", "_")
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, ROOT / path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module
        specification.loader.exec_module(module)
    return sys.modules[name]


def settings(**given: Any) -> JudgeSettings:
    """Settings of a fake judge, without probes."""
    return JudgeSettings.model_validate({"kind": "judge", "api": API, "probes": False} | given)


def answer(text: str | None = None, cause: str | None = None, **given: Any) -> Answer:
    """An answer that cost a thousandth of a cent."""
    fields: dict[str, Any] = {
        "text": text,
        "label_logprobs": None,
        "cause": cause,
        "cached": False,
        "prompt_tokens": 100,
        "completion_tokens": 5,
        "cost_usd": 1e-5,
        "num_attempts": 1,
    }
    return Answer(**(fields | given))


def shown(request: Request, name: str = "RESPONSE") -> str:
    """What the judge is shown between the real fences."""
    text = request.messages[-1]["content"]
    found = re.search(
        rf"<<<BEGIN {name} ([0-9a-f]{{16}})>>>\n(.*?)\n<<<END {name} \1>>>", text, re.DOTALL
    )
    assert found is not None, text
    return found[2]


def mode_of(request: Request) -> str:
    """Which form of answer is asked for."""
    if request.labels:
        return "logprobs"
    return "json" if request.schema is not None else "line"


class FakeJudge:
    """A backend that scores what stands in the response's fence; keeps every request."""

    def __init__(
        self,
        score: Callable[[str], float | str | Answer] | None = None,
        *,
        has_logprobs: bool = False,
        has_json: bool = True,
    ) -> None:
        self.requests: list[Request] = []
        self._score = score or (lambda response: 5)
        self._has_logprobs = has_logprobs
        self._has_json = has_json

    async def ask(self, request: Request) -> Answer:
        self.requests.append(request)
        said = self._score(shown(request))
        if isinstance(said, Answer):
            return said
        if isinstance(said, str):
            return answer(said)
        match mode_of(request):
            case "logprobs" if self._has_logprobs:
                return answer("F", label_logprobs={"ABCDEFGHIJK"[int(said)]: 0.0})
            case "json" if self._has_json:
                return answer(f'{{"score": {int(said)}}}')
            case "line":
                return answer(f"Score: {int(said)}")
        return answer("I would rather talk.")

    def count(self, response: str) -> int:
        """How often this response was asked about."""
        return sum(shown(request) == response for request in self.requests)
