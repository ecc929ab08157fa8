"""`--configs A B C`, the two seeds, and what they do not go together with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from klippo.cli.source import load, spread_names
from klippo.config.schema import RunConfig
from klippo.errors import ConfigError
from tests.cli.test_command_line import run, stage

ENTRIES = """\
base:
  policy: {model: "demo:policy"}
  data: {train: "demo:prompts"}
  reward: {kind: classifier, model: "rm{seed}"}
longer:
  ppo: {num_steps: 9}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "others"):
        (tmp_path / name).mkdir()
    Path("configs/a.yaml").write_text(ENTRIES)
    Path("others/a.yaml").write_text(ENTRIES.replace("9", "8"))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "spread"),
    [
        (
            ["--configs", "A", "B", "--rm_seed", "3", "k=v"],
            ["--configs=", "--configs=A", "--configs=B", "--rm_seed", "3", "k=v"],
        ),
        (
            ["k=v", "--configs", "A", "l=w", "B"],
            ["k=v", "--configs=", "--configs=A", "l=w", "--configs=B"],
        ),
        (["--configs=A,B", "C"], ["--configs=A,B", "--configs=C"]),
        (["run.yaml", "k=v", "--quiet"], ["run.yaml", "k=v", "--quiet"]),
    ],
)
def test_every_word_up_to_the_next_option_is_a_name_or_an_override(arguments, spread):
    assert spread_names(arguments) == spread


def test_train_reads_entries_seeds_and_overrides():
    body = "c = args[0].config; print(args[0].name, c.reward.model, c.seed, c.rm_seed, c.ppo)"
    arguments = ["--configs", "base", "longer", "--rm_seed", "3", "--rng_seed", "4"]
    done = run("train", *arguments, "ppo.num_epochs=2", code=stage(body, "train", "train.run"))
    assert done.stderr == ""
    assert done.stdout.startswith("longer rm3 4 3 num_steps=9 batch_size=64 num_epochs=2 ")


def test_config_show_prints_where_each_value_comes_from():
    arguments = ["--configs", "base,longer", "--rm-seed", "3", "kl.coef=0.5"]
    done = run("config", "show", *arguments)
    lines = [line.split("  # ") for line in done.stdout.splitlines() if "  # " in line]
    origins = {words.strip(): origin for words, origin in lines}
    assert origins["num_steps: 9"] == "configs/a.yaml:6"
    assert origins["model: rm3"] == "configs/a.yaml:4"
    assert origins["rm_seed: 3"] == origins["coef: 0.5"] == "command line"
    assert origins["output_dir: runs/longer/seed{rm_seed}"] == origins["seed: 0"] == "default"


def test_config_check_reads_another_folder_in_either_spelling():
    for flag in ("--config-dir", "--config_dir"):
        done = run("config", "check", "--configs", "base", "--rm_seed", "1", flag, "others")
        assert (done.returncode, done.stdout) == (0, "base: ok\n")


def test_config_check_and_schema_know_every_stage():
    for stage_name in ("train", "sft", "reward-model"):
        done = run("config", "check", "--configs", "base", "x=1", "--stage", stage_name)
        assert "command line: x: unknown key" in done.stderr
    properties = json.loads(run("config", "schema", "--stage", "sft").stdout)["properties"]
    assert "reward" not in properties
    assert "output_dir" in properties


def test_problems_of_entries_exit_with_2():
    done = run("config", "check", "--configs", "bse", "base")
    assert done.returncode == 2
    assert done.stderr == "command line: bse: no such entry in configs; did you mean base?\n"


def test_the_seeds_go_with_a_run_too():
    loaded = load("quickstart", ["seed=1"], None, None, 3, 4, RunConfig)
    assert (loaded.config.seed, loaded.config.rm_seed) == (4, 3)
    assert loaded.config.output_dir == "runs/quickstart/seed3"
    assert loaded.origins["seed"] == loaded.origins["rm_seed"] == "command line"


@pytest.mark.parametrize(
    ("run", "overrides", "configs", "config_dir", "message"),
    [
        ("x.yaml", [], ["", "A"], None, r"x\.yaml: both RUN and --configs A are given; remove one"),
        ("k=v", ["B"], ["", "A"], None, "B: both RUN and --configs A are given"),
        ("x.yaml", [], None, "others", "--config-dir others: needs --configs"),
        (None, None, None, None, "RUN is missing: name a YAML file or a recipe, or entries with"),
        (None, None, [""], None, "--configs: needs the name of an entry"),
    ],
)
def test_run_and_entries_exclude_each_other(run, overrides, configs, config_dir, message):
    with pytest.raises(ConfigError, match=message):
        load(run, overrides, configs, config_dir, None, None, RunConfig)


def test_help_says_how_entries_are_named():
    text = " ".join(run("train", "--help").stdout.split())
    assert "Instead of RUN: entries (top-level keys) of the YAML files in --config-dir" in text
    assert "--rm_seed, --rm-seed" in text


def test_reading_entries_imports_no_torch():
    code = (
        "from klippo.config.entries import load_entries\n"
        "load_entries(['base', 'longer'], rm_seed=1)\n"
        "import sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"
