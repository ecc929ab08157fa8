"""What the same figures are for judges without a language model, and for one person."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from analysis import worth

from klippo.rewards.classifier import ClassifierReward
from klippo.rewards.settings import ClassifierSettings
from klippo.types import Prompt

ROOT = Path(__file__).resolve().parents[2]


def script(path: str, name: str) -> ModuleType:
    """A script of this repository, imported."""
    specification = importlib.util.spec_from_file_location(name, ROOT / path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def measure(rated: Sequence[Any]) -> dict[str, Any]:
    """The figures of a constant, counted words, a packaged reward model, and one of the raters."""
    texts = [sentence.text for sentence in rated]
    ratings = [sentence.mean_rating for sentence in rated]
    count = script("examples/llm-judge/lexicon_judge.py", "lexicon_judge").score
    proxy = ClassifierReward(ClassifierSettings(kind="classifier", model="demo:proxy_seed1"))
    prompts = [Prompt(id=i, text="", token_ids=[]) for i in range(len(texts))]
    one = [float(sentence.ratings[0]) for sentence in rated]
    others = [sum(s.ratings[1:]) / (len(s.ratings) - 1) for s in rated]
    return {
        "the same score for all": worth([5.0] * len(texts), ratings),
        "counted words": worth([count(text) for text in texts], ratings),
        "demo:proxy_seed1": worth(proxy.score_pairs(prompts, texts).reward.tolist(), ratings),
        "one rater, beside the mean of the others": worth(one, others),
    }
