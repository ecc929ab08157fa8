"""Rewards by name, their labels, and what is found wrong without loading weights."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from klippo.errors import ConfigError, PreflightError
from klippo.lab.reward_names import check_reward, reward_label, reward_named, rewards_in
from klippo.rewards import classifier
from klippo.rewards.settings import ClassifierSettings, EnsembleSettings, FunctionSettings


def test_names_are_models_functions_or_yaml_files(tmp_path: Path) -> None:
    assert reward_named("demo:gold") == ClassifierSettings(kind="classifier", model="demo:gold")
    assert reward_named("org/model").model == "org/model"
    assert reward_named("rewards.py:f") == FunctionSettings(
        kind="function", function="rewards.py:f"
    )
    assert reward_named("package.module:f").kind == "function"
    odd = tmp_path / "odd:name"
    odd.mkdir()
    assert reward_named(str(odd)).model == str(odd)
    file = tmp_path / "rewards.yaml"
    file.write_text("a: {kind: length, max_tokens: 3}\nb: {kind: repetition}\n")
    assert list(rewards_in(file)) == ["a", "b"]
    assert reward_named(f"{file}:a").max_tokens == 3
    with pytest.raises(ConfigError, match="there is no reward section 'c'; there are a, b"):
        reward_named(f"{file}:c")


def test_a_runs_config_names_its_reward_and_its_gold(write_config) -> None:
    config = write_config(gold={"kind": "length", "min_tokens": 2})
    assert config.suffix == ".yaml"
    assert reward_named(f"{config}:gold").min_tokens == 2
    assert reward_named(f"{config}:reward").kind == "function"


def test_options_replace_what_a_section_says() -> None:
    settings = reward_named("demo:gold", is_alpacafarm=True, batch_size=5)
    assert (settings.template, settings.batch_size) == ("alpaca", 5)
    with pytest.raises(ConfigError, match=r"AlpacaFarm's template .* is for one reward model"):
        reward_named("rewards.py:f", is_alpacafarm=True)


def test_labels_are_equal_exactly_where_scores_are() -> None:
    def label(**more: object) -> str:
        return reward_label(ClassifierSettings(kind="classifier", model="m", **more))

    assert label() == label(batch_size=3) == "m"
    assert label(template="alpaca", max_tokens=9) == "m (template: alpaca, max_tokens: 9)"
    pair = {"kind": "ensemble", "members": ["a", "b"]}
    mean, lowest = (EnsembleSettings(**pair, objective=name) for name in ("mean", "WCO"))
    assert reward_label(mean).startswith("mean of a, b #")
    assert reward_label(mean) != reward_label(lowest)
    assert reward_label(mean) == reward_label(EnsembleSettings(**pair, batch_size=2))


def problem(settings: object, columns: list[str] | None = None) -> str:
    with pytest.raises((ConfigError, PreflightError)) as raised:
        check_reward(settings, columns)
    return str(raised.value)


def test_what_is_wrong_shows_without_weights(
    roberta: Path, gpt2: Path, reward_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "load_scorer", None)
    good = ClassifierSettings(kind="classifier", model=str(roberta), label="POSITIVE")
    check_reward(good)
    assert "has 2 outputs" in problem(good.model_copy(update={"label": None}))
    assert "is a language model" in problem(good.model_copy(update={"model": str(gpt2)}))
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in roberta.iterdir():
        if file.suffix == ".json":
            (bare / file.name).write_bytes(file.read_bytes())
    assert "no weights" in problem(good.model_copy(update={"model": str(bare)}))
    assert load_file(roberta / "model.safetensors")  # which the fixture has
    assert "template" in problem(good.model_copy(update={"template": "{prompt}"}))
    function = FunctionSettings(kind="function", function=f"{reward_file}:good")
    check_reward(function, ["prompt"])
    reward_file.write_text("def good(colour):\n    return colour\n")
    assert "needs the argument 'colour'" in problem(function, ["prompt"])


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"kind": "ensemble", "members": ["{m}"]}, "has no stored mean and standard deviation"),
        ({"kind": "ensemble", "members": ["{m}"], "standardize": "start"}, "standardize=start"),
        (
            {"kind": "sum", "parts": {"a": {"reward": {"kind": "repetition"}, "normalize": True}}},
            "part a: normalize=true moves the scale",
        ),
    ],
)
def test_scores_that_are_compared_need_one_scale(
    section: dict, told: str, roberta: Path, tmp_path: Path
) -> None:
    file = tmp_path / "gold.yaml"
    if "members" in section:
        section = section | {"members": [str(roberta)], "label": "POSITIVE"}
    file.write_text(json.dumps(section))
    assert told in problem(reward_named(str(file)))
