"""Every problem is reported at once, each with its place, its value, the rule and a remedy."""

from pathlib import Path

import pytest

from klippo.config.load import load_config, recipe_names
from klippo.errors import ConfigError

HEAD = """\
policy: {model: m}
data: {train: t}
reward:
  kind: classifier
  model: r
"""  # the next line is line 6


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """What loading says, without the folder's name."""
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(str(path), "run.yaml").split("\n")


def test_all_problems_come_at_once_in_the_order_of_the_lines(tmp_path):
    text = HEAD + (
        "kl:\n"
        "  coef: high\n"
        "ppo:\n"
        "  clip_rnge: 0.2\n"
        "  num_steps: 5\n"
        "  num_steps: 6\n"
        "output_dir: runs/{step}\n"
    )
    assert problems(tmp_path, text, "seed=-1", "device") == [
        "run.yaml:7: kl.coef=high: must be a number",
        "run.yaml:9: ppo.clip_rnge: unknown key; did you mean clip_range?",
        "run.yaml:11: ppo.num_steps: given twice, first at run.yaml:10",
        "run.yaml:12: output_dir=runs/{step}: nothing fills {step}; use {name}, {seed} or "
        "{rm_seed}",
        "command line: device: needs key=value, as in ppo.num_steps=200",
        "command line: seed=-1: must be greater than or equal to 0",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ppo:\n  clip_rnge: 1\n", ":7: ppo.clip_rnge: unknown key; did you mean clip_range?"),
        ("sed: 1\n", ":6: sed: unknown key; did you mean seed?"),
        (
            "ppo:\n  learning_rate: 1\n",
            ":7: ppo.learning_rate: unknown key; learning_rate belongs to optimizer",
        ),
        ("kl: {seed: 1}\n", ":6: kl.seed: unknown key; seed belongs to the top level"),
        (
            "batch_sze: 1\n",
            ":6: batch_sze: unknown key; did you mean batch_size of ppo?",
        ),
        (
            "evaluation: {zzz: 1}\n",
            ":6: evaluation.zzz: unknown key; known here: every, num_prompts, num_shown",
        ),
        (
            "  ngram: 1\n",
            ":6: reward.ngram: unknown key; ngram belongs to reward (kind: repetition)",
        ),
    ],
)
def test_unknown_key_names_the_nearest_key_or_its_home(tmp_path, text, expected):
    assert problems(tmp_path, HEAD + text) == ["run.yaml" + expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: abc", "seed=abc: must be a whole number"),
        ("seed: 1.5", "seed=1.5: must be a whole number"),
        ("kl: {coef: .inf}", "kl.coef=.inf: must be a finite number"),
        ("kl: {coef: .nan}", "kl.coef=.nan: must be a finite number"),
        ("policy: {model: 3}", "policy.model=3: must be text; put it in quotes"),
        ("output_dir: {name}", "output_dir={name: null}: must be text; put it in quotes"),
        ("ppo: 3", "ppo=3: must be a mapping"),
        (
            "sharding: fsdq",
            "sharding=fsdq: must be none, fsdp, shard_grad_op or auto; did you mean fsdp?",
        ),
        ("ppo:", "ppo: empty; must be a mapping, or leave the key out"),
        ("score: {whiten: maybe}", "score.whiten=maybe: must be true or false"),
        (
            "policy: {model: m, tuning: lorra}",
            "policy.tuning=lorra: must be full, lora or last_layers; did you mean lora?",
        ),
        ("optimizer: {betas: [0.9]}", "optimizer.betas=[0.9]: must have 2 items, not 1"),
        ("optimizer: {betas: [0, 2]}", "optimizer.betas[1]=2: must be less than 1"),
        (
            "rollout: {response_length: abc}",
            "rollout.response_length=abc: must be a whole number or a list",
        ),
        ("rollout: {response_length: 0}", "rollout.response_length=0: must be greater than 0"),
        (
            "rollout: {response_length: [2, x]}",
            "rollout.response_length[1]=x: must be a whole number",
        ),
        (
            "rollout: {stop_tokens: [[]]}",
            "rollout.stop_tokens[0]=[]: must be text or a whole number",
        ),
        (
            "gold: {kind: lenth}",
            "gold.kind=lenth: must be classifier, column, ensemble, function, judge, length, "
            "repetition or sum; did you mean length?",
        ),
        (
            "gold: {model: m}",
            "gold.kind: missing; it must be classifier, column, ensemble, function, judge, length, "
            "repetition or sum",
        ),
        ("gold: length", "gold=length: must be a mapping"),
    ],
)
def test_a_wrong_value_is_named_with_the_rule(tmp_path, text, expected):
    section = text.split(":")[0]
    kept = "".join(line + "\n" for line in HEAD.splitlines() if not line.startswith(section))
    line = kept.count("\n") + 1
    assert problems(tmp_path, kept + text) == [f"run.yaml:{line}: {expected}"]
    if text.endswith("}") and "{name}" not in text:  # the same from the command line
        override = text.replace(": ", "=", 1)
        assert problems(tmp_path, kept, override) == [f"command line: {expected}"]


def test_a_missing_key_points_at_its_parent_and_says_what_it_means(tmp_path):
    text = "data: {train: t}\npolicy:\n  tuning: full\n"
    first, second = problems(tmp_path, text)
    assert first == "run.yaml:1: reward: missing; What scores a response."
    assert second.startswith("run.yaml:2: policy.model: missing; Folder, hub name")


def test_a_missing_key_of_a_kind_chosen_on_the_command_line_points_there(tmp_path):
    (problem,) = problems(tmp_path, HEAD, "reward.kind=function")
    assert problem.startswith("command line: reward.function: missing; `package.module:name`")


def test_a_problem_deep_in_a_sum_has_its_own_line(tmp_path):
    text = HEAD[: HEAD.index("reward")] + (
        "reward:\n"
        "  kind: sum\n"
        "  parts:\n"
        "    length:\n"
        "      reward:\n"
        "        kind: length\n"
        "        max_token: 9\n"
        "    other: 3\n"
    )
    assert problems(tmp_path, text) == [
        "run.yaml:9: reward.parts.length.reward.max_token: unknown key; did you mean max_tokens?",
        "run.yaml:10: reward.parts.other=3: must be a mapping",
    ]


def test_a_rule_between_keys_points_at_the_key_at_fault(tmp_path):
    text = HEAD + "ppo:\n  batch_size: 13\n  minibatch_size: 6\n"
    assert problems(tmp_path, text) == [
        "run.yaml:8: ppo.minibatch_size=6 must divide batch_size=13, or lie near a divisor; "
        "try 1 or 13"
    ]


def test_a_rule_that_names_no_key_first_points_at_its_section(tmp_path):
    (problem,) = problems(tmp_path, HEAD + "gold: {kind: length}\n")
    assert problem.startswith("run.yaml:6: gold: a length reward needs max_tokens")


def test_all_rules_between_sections_are_checked_at_once(tmp_path):
    text = HEAD + "critic:\n  kind: lora\n  model: x\nrollout: {top_k: 5, top_p: 0.9}\n"
    found = problems(tmp_path, text, "policy.quantize_4bit=true")
    assert [line.split(" ")[0:2] for line in found] == [
        ["run.yaml:7:", "critic.kind=lora"],
        ["run.yaml:8:", "critic.model"],
        ["run.yaml:9:", "rollout.top_k=5:"],
        ["run.yaml:9:", "rollout.top_p=0.9:"],
        ["command", "line:"],
    ]
    assert not any("Value error" in line for line in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: c: d\n", "run.yaml:2: not YAML: mapping values are not allowed here"),
        ("a: 1\n\tb: 2\n", "run.yaml:2: not YAML: "),
        ("a: [1\nb: 2\n", "run.yaml:2: not YAML: "),
        ('a: 1\nb: "\x01"\n', "run.yaml:2: not YAML: character #x1 is not allowed"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: not YAML: expected a single document"),
        ("\n- 1\n", "run.yaml:2: a config must be a mapping (key: value), not [1]"),
        ("words\n", "run.yaml:1: a config must be a mapping (key: value), not words"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused_with_its_line(tmp_path, text, expected):
    (problem,) = problems(tmp_path, text)
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: !!python/name:os.system\n", "the tag !!python/name:os.system is not allowed"),
        ("seed: &a [*a]\n", "an alias contains itself"),
        ("? [1]\n: 2\n", "a key must be text"),
        ("seed: !!int abc\n", "invalid literal"),
    ],
)
def test_yaml_that_is_more_than_data_is_refused_with_its_line(tmp_path, text, expected):
    found = problems(tmp_path, HEAD + text)
    assert any(line.startswith("run.yaml:6: ") and expected in line for line in found)


def test_an_override_that_is_no_yaml_says_that_quotes_help(tmp_path):
    (problem,) = problems(tmp_path, HEAD, "reward.template={prompt}{response}")
    assert problem.startswith("command line: reward.template={prompt}{response}: not YAML: ")
    assert problem.endswith("; quotes help")


@pytest.mark.parametrize("override", ["", "seed", "=3", "ppo.=3", ".seed=3"])
def test_an_override_needs_a_key_and_a_value(tmp_path, override):
    assert problems(tmp_path, HEAD, override) == [
        f"command line: {override}: needs key=value, as in ppo.num_steps=200"
    ]


def test_an_override_without_a_value_is_null(tmp_path):
    assert problems(tmp_path, HEAD, "seed=") == [
        "command line: seed: empty; must be a whole number, or leave the key out"
    ]


def test_an_override_through_a_value_is_refused(tmp_path):
    (problem,) = problems(tmp_path, HEAD, "policy.model.x=1")
    assert problem == "command line: policy.model={x: 1}: must be text; put it in quotes"


def test_an_unknown_name_lists_the_recipes():
    with pytest.raises(ConfigError, match="nowhere: neither a file nor a recipe") as caught:
        load_config("nowhere")
    assert all(name in str(caught.value) for name in recipe_names())


def test_a_misspelt_recipe_is_guessed(monkeypatch):
    monkeypatch.setattr("klippo.config.load.recipe_names", lambda _: ["gpt2-imdb", "quickstart"])
    with pytest.raises(ConfigError, match=r"did you mean quickstart\? Recipes: gpt2-imdb, quick"):
        load_config("quikstart")


def test_a_folder_is_not_a_config(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder, not a config; try .*config\.yaml"):
        load_config(tmp_path)


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"seed: 1\noutput_dir: \xff\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2: not UTF-8 text"):
        load_config(path)
