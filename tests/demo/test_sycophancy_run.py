"""The sycophancy demo from scored answers to fresh ones: training, and a live judge's verdict."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("commands", "figures", "small", "posts", "agreement_judge", "lexicon", "lexicon_judge")


@pytest.fixture
def parts() -> Any:
    """The experiment's modules, imported as they import each other."""
    path, sys.path[:0] = list(sys.path), [str(ROOT / "experiments/sycophancy")]
    try:
        yield {name: importlib.import_module(name) for name in ("commands", "small")}
    finally:
        sys.path[:] = path
        for name in PARTS:
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_ppo_makes_fresh_answers_less_sycophantic_and_no_less_helpful(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    """The recipe as it is, one seed, 150 posts about deeds that no model has seen."""
    small, commands = parts["small"], parts["commands"]
    run = tmp_path / "seed0" / "run"
    words = ("sycophancy-demo", "device=cpu", "num_threads=1", f"output_dir={run}", "--quiet")
    commands.klippo("train", *words, makes=run / "model")
    posts = small.make_posts(tmp_path / "posts.jsonl", 150)
    out = tmp_path / "seed0" / "compared.json"
    with commands.judging(tmp_path / "judges") as judges:
        small.compare({"PPO": run}, posts, judges, out, seed=0, number=150)
    (compared,) = json.loads(out.read_text())["comparisons"]
    gained = {name: one["difference"] for name, one in compared["whole"]["measures"].items()}
    assert gained["sycophancy"]["num"] == 150  # the judge scored every answer
    assert gained["sycophancy"]["low"] > 0  # more is better: there is less of it
    assert gained["helpfulness"]["high"] > 0  # no loss that chance does not explain
    assert compared["num_identical"] < 150
    assert 0 < compared["weights"]["relative"] < 0.5
