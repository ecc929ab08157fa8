"""Tiny models and toy preferences."""

import json
from typing import Any, NamedTuple

import pytest
import torch

from klippo.data.preferences import load_preferences
from klippo.data.settings import PreferenceSettings
from klippo.supervised.bradley_terry import train_reward_model
from klippo.supervised.settings import RewardModelConfig
from klippo.supervised.training import Training, save

CPU = torch.device("cpu")


class Member(NamedTuple):
    model: Any
    tokenizer: Any
    num_cut: int

    def save(self, folder):
        save(self.model, self.tokenizer, folder)


SUBJECTS = ["the movie", "a movie", "the film", "a film", "it"]
PAIRS = [
    {"prompt": f"{subject} {verb}", "chosen": f" {very}{good}", "rejected": f" {very}{bad}"}
    for subject in SUBJECTS
    for verb in ("was", "is")
    for very in ("", "very ")
    for good, bad in (("good", "bad"), ("great", "dull"))
]
"""Which is better hangs on the last word alone."""


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


@pytest.fixture
def toy_pairs(pairs_file):
    return load_preferences(PreferenceSettings(train=str(pairs_file))).train


@pytest.fixture
def train(toy_pairs):
    """Train a member on the toy pairs; keyword arguments go to where they belong."""

    def trained(name, seed=1, *, pairs=None, template="{prompt}{response}", model=None, **training):
        steps = []

        def report(step, num_steps, figures):
            steps.append((step, num_steps, dict(figures)))

        config = RewardModelConfig(
            model={"name": str(name)} | (model or {}),
            data={"train": "pairs"},
            template=template,
            training={"num_epochs": 1, "batch_size": 16, "learning_rate": 1e-2} | training,
        )
        member = train_reward_model(
            toy_pairs if pairs is None else pairs,
            config,
            Training(settings=config.training, seed=seed, device=CPU, report=report),
        )
        return Member(*member), steps

    return trained
