"""Loading: where values come from, how they merge, and that nothing is lost on the way back."""

from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from klippo.config.load import (
    config_from_mapping,
    load_config,
    recipe_names,
    show,
    to_yaml,
)
from klippo.config.located import read_yaml, write_value
from klippo.config.schema import RunConfig, WholeConfig
from klippo.errors import ConfigError
from klippo.rewards.settings import LengthSettings

BASE = """\
policy:
  model: demo:policy
data:
  train: demo:prompts
reward:
  kind: classifier
  model: demo:proxy
  template: "{prompt}{response}"
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_value_knows_its_line_or_that_it_is_a_default(tmp_path):
    path = write(tmp_path, BASE + "ppo: {num_steps: 7}\n")
    loaded = load_config(path, ["optimizer.betas=[0.8, 0.9]"])
    origins = loaded.origins
    assert origins["policy.model"] == f"{path}:2"
    assert origins["reward.kind"] == f"{path}:6"
    assert origins["ppo.num_steps"] == f"{path}:9"
    assert origins["optimizer.betas"] == "command line"
    assert origins["kl.coef"] == origins["output_dir"] == "default"
    assert [key for key, _, _ in show(loaded)] == list(origins)
    assert ("ppo.num_steps", 7, f"{path}:9") in show(loaded)


def test_yaml_with_origins_has_each_behind_its_value_and_loads_again(tmp_path):
    path = write(tmp_path, BASE + "ppo: {num_steps: 7}\noutput_dir: out\n", "a #b.yaml")
    loaded = load_config(path, ["optimizer.betas=[0.8, 0.9]"])
    text = to_yaml(loaded.config, loaded.origins)
    lines = [line.split(maxsplit=3) for line in text.splitlines()]
    assert ["num_steps:", "7", "#", f"{path}:9"] in lines
    assert ["betas:", "#", "command", "line"] in lines
    assert ["coef:", "0.05", "#", "default"] in lines
    assert text.count("  # ") == len(loaded.origins)
    assert load_config(write(tmp_path, text)).config == loaded.config


def test_an_exponent_without_a_point_is_a_number(tmp_path):
    path = write(tmp_path, BASE + "optimizer: {learning_rate: 1e-5}\n")
    assert load_config(path).config.optimizer.learning_rate == 1e-5
    over = load_config(path, ["optimizer.learning_rate=3e-4"])
    assert over.config.optimizer.learning_rate == 3e-4


@pytest.mark.parametrize("word", ["no", "on", "2024-01-01", "12:30", "=", "y"])
def test_words_that_older_yaml_took_for_other_things_are_text(tmp_path, word):
    path = write(tmp_path, BASE.replace("demo:prompts", word))
    assert load_config(path).config.data.train == word


def test_overrides_merge_mappings_and_replace_lists(tmp_path):
    path = write(
        tmp_path, BASE + "ppo: {num_steps: 7, num_epochs: 2}\nrollout: {stop_tokens: [1]}\n"
    )
    config = load_config(path, ["ppo={num_steps: 9}", "rollout.stop_tokens=[2, 3]"]).config
    assert (config.ppo.num_steps, config.ppo.num_epochs) == (9, 2)
    assert list(config.rollout.stop_tokens) == [2, 3]


def test_the_last_of_two_overrides_of_one_key_counts(tmp_path):
    path = write(tmp_path, BASE)
    assert load_config(path, ["seed=1", "seed=2"]).config.seed == 2


@pytest.mark.parametrize(
    "overrides",
    [["reward.kind=length", "reward.max_tokens=9"], ["reward.max_tokens=9", "reward.kind=length"]],
)
def test_a_changed_kind_replaces_the_section_in_any_order(tmp_path, overrides):
    loaded = load_config(write(tmp_path, BASE), overrides)
    assert loaded.config.reward.model_dump() == {
        "kind": "length",
        "max_tokens": 9,
        "min_tokens": None,
    }
    assert loaded.origins["reward.kind"] == "command line"


def test_a_changed_kind_inside_a_sum_replaces_that_part_alone(tmp_path):
    parts = "reward:\n  kind: sum\n  parts:\n"
    for name in ("a", "b"):
        parts += f"    {name}: {{weight: 2, reward: {{kind: classifier, model: m}}}}\n"
    path = write(tmp_path, BASE[: BASE.index("reward")] + parts)
    section = "reward.parts.a.reward"
    config = load_config(path, [f"{section}.kind=length", f"{section}.max_tokens=9"]).config
    assert config.reward.parts["a"].reward.kind == "length"
    assert config.reward.parts["a"].weight == 2
    assert config.reward.parts["b"].reward.model == "m"


def test_a_kind_that_selects_no_other_settings_class_keeps_its_neighbours(tmp_path):
    path = write(tmp_path, BASE + "critic: {kind: trunk, lora: {rank: 3}}\n")
    assert load_config(path, ["critic.kind=separate"]).config.critic.lora.rank == 3


def test_placeholders_are_filled_and_templates_keep_their_braces(tmp_path):
    path = write(tmp_path, BASE + "output_dir: out/{name}/{seed}\n", "my-run.yaml")
    loaded = load_config(path, ["seed=3", "data.train=rows-{seed}.jsonl"])
    assert loaded.name == "my-run"
    assert loaded.config.output_dir == "out/my-run/3"
    assert loaded.config.data.train == "rows-3.jsonl"
    assert loaded.config.reward.template == "{prompt}{response}"


def test_the_default_folder_is_named_after_the_config(tmp_path):
    assert load_config(write(tmp_path, BASE, "abc.yaml")).config.output_dir == "runs/abc"


def test_a_mapping_and_a_config_load_like_a_file(tmp_path):
    from_file = load_config(write(tmp_path, BASE), ["seed=5"])
    mapping = config_from_mapping(yaml.safe_load(BASE), ["seed=5"])
    assert mapping.config == from_file.config
    assert mapping.origins["seed"] == "command line"
    assert mapping.origins["policy.model"] == "argument"
    again = config_from_mapping(mapping.config)
    assert again.config == mapping.config
    assert again.origins["kl.coef"] == "default"


def test_python_objects_that_are_not_plain_data_are_refused():
    with pytest.raises(ConfigError, match=r"^argument: seed=<object"):
        config_from_mapping(yaml.safe_load(BASE) | {"seed": object()})


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_loads(name):
    loaded = load_config(name, ["rm_seed=1"])  # some want one
    assert loaded.name == name
    assert loaded.origins["policy.model"].startswith(f"{name}.yaml:")


def test_the_schema_describes_every_section():
    assert set(RunConfig.model_json_schema()["properties"]) == set(RunConfig.model_fields)


class LengthConfig(WholeConfig):
    """A stage of its own."""

    recipe_folder: ClassVar[str] = "lengths"
    length: LengthSettings


def test_any_schema_loads_with_its_own_keys_and_messages(tmp_path):
    path = write(tmp_path, "length: {kind: length, max_tokens: 9}\n", "short.yaml")
    loaded = load_config(path, ["seed=2"], schema=LengthConfig)
    assert loaded.config.length.max_tokens == 9
    assert loaded.config.output_dir == "runs/short"
    assert loaded.origins["length.max_tokens"] == f"{path}:1"
    assert config_from_mapping(loaded.config, schema=LengthConfig).config == loaded.config
    keys = {"seed", "output_dir", "device", "num_threads", "length"}
    assert set(LengthConfig.model_json_schema()["properties"]) == keys
    with pytest.raises(ConfigError, match=r"max_token: unknown key; did you mean max_tokens\?$"):
        load_config(path, ["length.max_token=2"], schema=LengthConfig)
    with pytest.raises(ConfigError, match=r"ppo: unknown key; known here: seed, output_dir, dev"):
        load_config(path, ["ppo.num_steps=2"], schema=LengthConfig)


def test_a_schema_sees_its_own_recipes_alone():
    assert recipe_names(LengthConfig) == []
    with pytest.raises(ConfigError, match="quickstart: neither a file nor a recipe"):
        load_config("quickstart", schema=LengthConfig)


texts = st.text(st.characters(codec="utf-8")).filter(lambda text: "{" not in text)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
numbers = st.integers(-(2**63), 2**63 - 1)
rewards = st.recursive(
    st.one_of(
        st.fixed_dictionaries(
            {"kind": st.just("classifier"), "model": texts, "template": texts},
            optional={"label": st.one_of(st.none(), texts, numbers)},
        ),
        st.fixed_dictionaries({"kind": st.just("length"), "max_tokens": st.integers(1, 2**63 - 1)}),
    ),
    lambda inner: st.fixed_dictionaries(
        {
            "kind": st.just("sum"),
            "parts": st.dictionaries(
                texts,
                st.fixed_dictionaries({"reward": inner, "weight": finite}),
                min_size=1,
                max_size=3,
            ),
        }
    ),
    max_leaves=4,
)
configs = st.fixed_dictionaries(
    {
        "policy": st.fixed_dictionaries({"model": texts, "revision": st.none() | texts}),
        "data": st.fixed_dictionaries({"train": texts, "prompt_column": texts}),
        "reward": rewards,
        "seed": st.integers(0, 2**63 - 1),
        "gold": st.none() | rewards,
        "score": st.fixed_dictionaries({"scale": finite, "normalize": st.booleans()}),
        "rollout": st.fixed_dictionaries({"stop_tokens": st.lists(texts | numbers, max_size=3)}),
    }
)


@settings(max_examples=80, deadline=None)
@given(mapping=configs)
def test_a_resolved_config_written_as_yaml_loads_to_an_equal_one(tmp_path_factory, mapping):
    config = config_from_mapping(mapping).config
    path = write(tmp_path_factory.mktemp("round"), to_yaml(config))
    assert load_config(path).config == config


@settings(max_examples=200, deadline=None)
@given(value=st.one_of(texts, finite, st.booleans(), st.none(), st.lists(texts | st.integers())))
def test_a_value_is_written_on_one_line_that_reads_back(value):
    text = write_value(value)
    located, problems = read_yaml(text, str)
    assert "\n" not in text
    assert not problems
    assert located.plain() == value
