"""Named entries: how they are found, in which order they count, what is said of wrong ones."""

from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klippo.config.entries import load_entries
from klippo.config.load import config_from_mapping, load_config, merge, to_yaml
from klippo.config.located import locate
from klippo.config.schema import RunConfig, WholeConfig
from klippo.errors import ConfigError
from klippo.rewards.settings import LengthSettings

BASE = """\
base:
  policy: {model: p}
  data: {train: t}
  reward: {kind: classifier, model: r, label: 1}
  rollout: {stop_tokens: [1, 2]}
  ppo:
    num_steps: 5
    num_epochs: 2
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder `configs`, the current folder's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    return Path("configs")


def write(folder: Path, text: str, name: str = "a.yaml") -> None:
    (folder / name).write_text(text, encoding="utf-8")


def problems(*names: str, **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_entries(names, **options)
    return str(caught.value).split("\n")


def test_entries_of_all_files_merge_deeply_in_the_order_given(folder):
    write(folder, BASE)
    write(folder, "mine:\n  ppo:\n    num_steps: 7\n  rollout: {stop_tokens: [3]}\n", "b.yml")
    loaded = load_entries(["base", "mine"], overrides=["kl.coef=0.2"], rng_seed=4)
    config = loaded.config
    assert loaded.name == "mine"
    assert (config.ppo.num_steps, config.ppo.num_epochs) == (7, 2)
    assert config.rollout.stop_tokens == (3,)
    assert (config.kl.coef, config.seed, config.output_dir) == (0.2, 4, "runs/mine")
    assert loaded.origins["ppo.num_steps"] == "configs/b.yml:3"
    assert loaded.origins["ppo.num_epochs"] == "configs/a.yaml:8"
    assert loaded.origins["kl.coef"] == loaded.origins["seed"] == "command line"
    assert load_entries(["mine", "base"]).config.ppo.num_steps == 5


def test_names_joined_by_commas_are_several(folder):
    write(folder, BASE + "one: {seed: 1}\ntwo: {seed: 2}\n")
    assert load_entries(["base,one", "two"]) == load_entries(["base", "one", "two"])


def test_another_kind_replaces_the_section(folder):
    write(folder, BASE + "short: {reward: {kind: length, max_tokens: 3}}\n")
    assert load_entries(["base", "short"]).config.reward == LengthSettings(
        kind="length", max_tokens=3
    )


def test_an_entry_comes_after_those_that_it_extends(folder):
    write(
        folder,
        BASE
        + "faster: {extends: base, ppo: {num_steps: 3}}\n"
        + "fastest: {extends: [faster, warm], ppo: {num_epochs: 1}}\n"
        + "warm: {seed: 9}\n",
    )
    config = load_entries(["fastest"]).config
    assert (config.ppo.num_steps, config.ppo.num_epochs, config.seed) == (3, 1, 9)


def test_what_two_entries_extend_undoes_neither(folder):
    write(
        folder,
        BASE
        + "steps: {extends: base, ppo: {num_steps: 3}}\n"
        + "epochs: {extends: base, ppo: {num_epochs: 1}}\n",
    )
    config = load_entries(["steps", "epochs"]).config
    assert (config.ppo.num_steps, config.ppo.num_epochs) == (3, 1)
    assert load_entries(["steps", "base"]).config.ppo.num_steps == 5  # named, so it comes last


def test_an_empty_entry_changes_nothing(folder):
    write(folder, BASE + "nothing:\n")
    assert load_entries(["base", "nothing"]).config.ppo.num_steps == 5


def test_entries_serve_any_schema(folder):
    class LengthConfig(WholeConfig):
        recipe_folder: ClassVar[str] = "lengths"
        length: LengthSettings

    write(folder, "mine: {length: {kind: length, max_tokens: 9}}\n")
    loaded = load_entries(["mine"], overrides=["length.max_tokens=8"], schema=LengthConfig)
    assert loaded.config.length.max_tokens == 8
    with pytest.raises(ConfigError, match="command line: rm_seed: unknown key"):
        load_entries(["mine"], schema=LengthConfig, rm_seed=3)


def test_settings_that_no_named_entry_uses_may_be_anything(folder):
    write(folder, BASE)
    write(folder, "num_machines: 1\ndowncast: no\n", "accelerate.yaml")
    write(folder, "num_machines: 2\n", "accelerate_more.yaml")
    assert load_entries(["base"]).config.ppo.num_steps == 5


def test_a_missing_entry_is_named_with_those_that_are_near(folder):
    write(folder, BASE + "base2: {seed: 1}\nscalar: 3\n")
    assert problems("bsae", "zzz") == [
        "command line: bsae: no such entry in configs; did you mean base or base2?",
        "command line: zzz: no such entry in configs; there are: base, base2",
    ]


def test_a_missing_folder_and_one_without_yaml_are_named(folder):
    assert problems("a", folder="nowhere") == [
        "nowhere: no such folder of entries; name another with --config-dir"
    ]
    assert problems("a") == [
        "configs: no *.yaml or *.yml file here; name another with --config-dir"
    ]


def test_an_entry_of_two_files_is_refused_with_both_places(folder):
    write(folder, BASE)
    write(folder, "\nbase: {seed: 1}\n", "b.yaml")
    assert problems("base") == [
        "configs/b.yaml:2: base: this entry is given twice, first at configs/a.yaml:1; rename one"
    ]


def test_an_entry_twice_in_one_file_is_refused_with_both_places(folder):
    write(folder, BASE + "base: {seed: 1}\n")
    assert problems("base") == ["configs/a.yaml:9: base: given twice, first at configs/a.yaml:1"]


def test_an_entry_must_be_a_mapping(folder):
    write(folder, BASE + "mine: 3\n")
    assert problems("base", "mine") == [
        "configs/a.yaml:9: mine=3: an entry must be a mapping (key: value)"
    ]


def test_a_file_of_entries_must_be_a_mapping(folder):
    write(folder, BASE)
    write(folder, "- 1\n", "b.yaml")
    assert problems("base") == [
        "configs/b.yaml:1: a file of entries must be a mapping (name: settings), not [1]"
    ]


def test_entries_that_extend_one_another_are_refused_with_the_path(folder):
    write(folder, BASE + "a: {extends: b}\nb: {extends: [base, c]}\nc:\n  extends: a\n")
    assert problems("a") == [
        "configs/a.yaml:12: extends: a -> b -> c -> a is a circle; remove one of its extends"
    ]
    write(folder, BASE + "a: {extends: a}\n")
    assert problems("base", "a") == [
        "configs/a.yaml:9: extends: a -> a is a circle; remove one of its extends"
    ]


def test_a_missing_base_points_at_the_extends(folder):
    write(folder, BASE + "a:\n  extends: bas\n")
    assert problems("base", "a") == [
        "configs/a.yaml:10: bas: no such entry in configs; did you mean base?"
    ]
    write(folder, BASE + "a:\n  extends: 3\n")
    assert problems("base", "a") == [
        "configs/a.yaml:10: extends=3: must be the name of an entry, or a list of names"
    ]


def test_all_problems_come_at_once_file_by_file(folder):
    write(folder, BASE + "x: {kl: {cof: 1}}\n")
    write(folder, "y:\n  seed: a\n  rm_seed: b\n", "b.yaml")
    assert problems("base", "x", "y", overrides=["ppo.num_steps=0"]) == [
        "configs/a.yaml:9: kl.cof: unknown key; did you mean coef?",
        "configs/b.yaml:2: seed=a: must be a whole number",
        "configs/b.yaml:3: rm_seed=b: must be a whole number",
        "command line: ppo.num_steps=0: must be greater than 0",
    ]


def test_what_is_wrong_with_the_entries_is_said_before_what_is_wrong_in_them(folder):
    write(folder, BASE + "x: {kl: {cof: 1}}\n")
    assert problems("x", "z", overrides=["ppo"]) == [
        "command line: z: no such entry in configs; there are: base, x",
        "command line: ppo: needs key=value, as in ppo.num_steps=200",
    ]


def test_no_name_at_all_is_refused(folder):
    assert problems(" ", ",") == [
        "--configs: needs the name of an entry, as in --configs defaults mine"
    ]


SEEDS = """\
policy: {model: "p{seed}"}
data: {train: "rows{seed}.jsonl"}
reward: {kind: classifier, model: "r{seed}", template: "{prompt}{response}"}
gold: {kind: sum, parts: {a: {reward: {kind: classifier, model: "g{seed}"}}}}
critic: {kind: separate, model: "c{seed}"}
"""


def test_rewards_and_critic_are_filled_by_rm_seed_and_all_else_by_seed(tmp_path):
    write(tmp_path, SEEDS)
    config = load_config(tmp_path / "a.yaml", ["seed=1", "rm_seed=3"]).config
    assert (config.policy.model, config.data.train) == ("p1", "rows1.jsonl")
    assert (config.reward.model, config.critic.model) == ("r3", "c3")
    assert config.gold.parts["a"].reward.model == "g3"
    assert config.reward.template == "{prompt}{response}"


def test_a_seed_that_nothing_fills_names_key_value_and_remedy(folder):
    write(folder, SEEDS)
    remedy = "nothing fills {seed}, which is rm_seed here; add --rm_seed 3 or rm_seed: 3"
    with pytest.raises(ConfigError) as caught:
        load_config("configs/a.yaml")
    assert str(caught.value).split("\n") == [
        f"configs/a.yaml:3: reward.model=r{{seed}}: {remedy}",
        f"configs/a.yaml:4: gold.parts.a.reward.model=g{{seed}}: {remedy}",
        f"configs/a.yaml:5: critic.model=c{{seed}}: {remedy}",
    ]


ENSEMBLE = """\
policy: {model: p}
data: {train: t}
reward: {kind: ensemble, members: ["m{seed}", {model: "n{seed}", batch_size: 2}]}
"""


def test_seeds_of_an_ensemble_come_before_rm_seed(tmp_path):
    write(tmp_path, ENSEMBLE)
    path = tmp_path / "a.yaml"

    def models(*overrides: str) -> list[str]:
        reward = load_config(path, overrides).config.reward
        return [one.model for one in reward.classifiers()]

    assert models("reward.seeds=[1, 2]") == ["m1", "m2", "n1", "n2"]
    assert models("reward.seeds=[1, 2]", "rm_seed=3") == ["m1", "m2", "n1", "n2"]
    assert models("rm_seed=3") == ["m3", "n3"]
    with pytest.raises(ConfigError, match=r"a\.yaml:3: reward\.members=m{seed}: nothing fills"):
        load_config(path)


@pytest.mark.parametrize(
    ("written", "filled"),
    [
        ("out", "out/seed3"),
        ("out/", "out/seed3"),
        ("out/{rm_seed}/{seed}", "out/3/1"),
        ("out/{name}", "out/a/seed3"),
        ("out/seed3", "out/seed3"),
    ],
)
def test_a_run_per_reward_model_seed_has_a_folder_of_its_own(tmp_path, written, filled):
    write(tmp_path, ENSEMBLE)
    path = tmp_path / "a.yaml"
    loaded = load_config(path, [f"output_dir={written}", "rm_seed=3", "seed=1"])
    assert loaded.config.output_dir == filled
    write(tmp_path, to_yaml(loaded.config), "again.yaml")
    assert load_config(tmp_path / "again.yaml").config == loaded.config
    assert config_from_mapping(loaded.config).config == loaded.config


def test_output_dir_wants_rm_seed_where_it_names_it(tmp_path):
    write(tmp_path, ENSEMBLE)
    with pytest.raises(ConfigError, match=r"command line: output_dir=x{rm_seed}: nothing fills"):
        load_config(tmp_path / "a.yaml", ["output_dir=x{rm_seed}", "reward.seeds=[1, 2]"])


def test_numbers_may_be_hexadecimal(tmp_path):
    write(tmp_path, ENSEMBLE)
    overrides = ["seed=0xa1221f97", "rm_seed=3", "output_dir='0x1F'"]
    config = load_config(tmp_path / "a.yaml", overrides).config
    assert (config.seed, config.output_dir) == (2703368087, "0x1F/seed3")


values = st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
trees = st.recursive(
    values, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
)
entries = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


@settings(max_examples=200, deadline=None)
@given(base=entries, over=entries)
def test_of_two_entries_the_last_wins_and_counts_once(base, over):
    base, over = locate(base, "base"), locate(over, "over")
    merged = merge(base, over, RunConfig)
    filled = [path for path, node in over.walk() if not isinstance(node.value, dict)]
    assert all(merged.origin_at(path) == "over" for path in filled)
    assert all(at(merged, path) == at(over, path) for path in filled)
    assert merged.value.keys() == base.value.keys() | over.value.keys()
    assert merge(merged, over, RunConfig) == merged


def at(tree, path):
    """The plain value at a path."""
    for key in path:
        tree = tree.value[key]
    return tree.plain()
