"""Entries in the names of the reward-model-ensembles code become Klippo's config."""

from pathlib import Path

import pytest

from klippo.config.entries import load_entries
from klippo.config.load import LoadedConfig, to_yaml
from klippo.config.schema import RunConfig
from klippo.errors import ConfigError

# The fields and example values of its documentation's table, and the defaults they go with.
DEFAULTS = """\
defaults:
  rng_seed: 0xa1221f97
  learning_rate: 1e-5
  dtype: fp16
  eval_size:
  datasets:
    - webgpt
    - soda: {input_max_length: 1024}
  cache_dir: .cache
  use_system_tag: false
  output_dir: saved_model
defaults_rlhf:
  datasets: []
  datasets_extra: []
  cache_dir: .cache
  output_dir: runs/defaults
  eval_size: 500
  num_eval_prompts: 4
  rank_config:
  sft_config:
  debug: false
  dtype: bf16
"""
ENTRY = """\
mine:
  output_dir: runs/ppo
  datasets:
    - alpaca_farm
  gold_config:
    model_name: alpaca_farm_models/reward-model-human
    is_alpacafarm_rm: true
    batch_size: 8
  rank_config:
    model_names:
      - models/rm-pythia-44m_seed1
    objective_name: mean
    uwo_weight: 0.1
    pooling: last
    residual_dropout: 0.01
    batch_size: 128
  sft_config:
    model_name: tlc4418/pythia_1.4b_sft_policy
    freeze_layer:
    num_layers_unfrozen: 2
"""
PPO = """\
train:
  total_steps: 3000
  batch_size: 32
  checkpoint_interval: 1000
  eval_interval: 100
  trainer: Any
model:
  model_path:
  model_arch_type: causal
  num_layers_unfrozen: 3
tokenizer: {padding_side: left}
optimizer:
  name: adamw
  kwargs: {lr: 1.0e-6, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 1.0e-6}
scheduler:
  name: cosine_annealing
  kwargs: {T_max: 10000, eta_min: 1.0e-7}
method:
  name: ppoconfig
  num_rollouts: 4
  chunk_size: 2
  ppo_epochs: 4
  init_kl_coef: 0.1
  target: 6
  horizon: 10000
  gamma: 1
  lam: 0.95
  cliprange: 0.2
  cliprange_value: 0.3
  vf_coef: 1
  scale_reward: False
  ref_mean: null
  cliprange_reward: 10
  gen_kwargs: {max_new_tokens: 256, top_k: 0, top_p: 1.0, do_sample: True, temperature: 0.9}
"""
NAMES = ["defaults", "defaults_rlhf", "mine"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The folder `configs` with the defaults and the entry, without PPO's file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    Path("configs/config.yaml").write_text(DEFAULTS)
    Path("configs/config_rl.yaml").write_text(ENTRY)
    return Path("configs")


def load(*overrides: str, **seeds: int) -> LoadedConfig:
    return load_entries(NAMES, overrides=overrides, **seeds)


def problems(*overrides: str, names: list[str] = NAMES) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_entries(names, overrides=overrides)
    return str(caught.value).split("\n")


def test_the_documented_entry_becomes_klippos_config():
    loaded = load()
    assert loaded.config == RunConfig.model_validate(
        {
            "seed": 2703368087,
            "output_dir": "runs/ppo/models_rm-pythia-44m_seed1",
            "policy": {
                "model": "tlc4418/pythia_1.4b_sft_policy",
                "tuning": "last_layers",
                "num_unfrozen_layers": 2,
                "autocast": True,
            },
            "data": {
                "train": "tatsu-lab/alpaca_farm",
                "subset": "alpaca_instructions",
                "split": "unlabeled",
                "validation": "val",
                "prompt_column": ["instruction", "input"],
                "template": "open-assistant",
            },
            "reward": {
                "kind": "classifier",
                "model": "models/rm-pythia-44m_seed1",
                "template": "open-assistant",
                "batch_size": 128,
            },
            "gold": {
                "kind": "classifier",
                "model": "alpaca_farm_models/reward-model-human",
                "template": "alpaca",
                "batch_size": 8,
            },
            "evaluation": {"num_prompts": 4},
        }
    )
    assert loaded.name == "mine"


def test_every_translated_value_keeps_the_line_of_its_source():
    origins = load("rank_config.batch_size=9").origins
    assert origins["seed"] == "configs/config.yaml:2"
    assert origins["policy.autocast"] == "configs/config.yaml:22"
    assert origins["policy.model"] == "configs/config_rl.yaml:18"
    assert origins["data.split"] == "configs/config_rl.yaml:4"
    assert origins["reward.model"] == "configs/config_rl.yaml:11"
    assert origins["gold.template"] == "configs/config_rl.yaml:7"
    assert origins["reward.batch_size"] == "command line"
    assert origins["ppo.num_steps"] == "default"


def test_the_second_file_gives_ppos_settings(folder):
    (folder / "ppo_config.yaml").write_text(PPO)
    loaded = load()
    config = loaded.config
    expected = {
        "ppo": {
            "num_steps": 3000,
            "batch_size": 32,
            "num_epochs": 4,
            "gamma": 1,
            "gae_lambda": 0.95,
            "clip_range": 0.2,
            "value_clip_range": 0.3,
            "value_coef": 1,
        },
        "kl": {"coef": 0.1, "controller": "adaptive", "target": 6, "horizon": 10000},
        "optimizer": {
            "learning_rate": 1e-6,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 1e-6,
            "schedule": "cosine",
            "num_decay_steps": 10000,
            "final_fraction": 0.1,
        },
        "rollout": {"response_length": 256, "temperature": 0.9, "top_k": 0, "top_p": 1},
        "score": {"clip": 10},
        "evaluation": {"every": 100, "num_prompts": 4},
    }
    for section, values in expected.items():
        assert getattr(config, section).model_dump(exclude_unset=True) == values
    assert config.policy.num_unfrozen_layers == 2  # the entry's, not the file's
    assert loaded.origins["ppo.num_steps"] == "configs/ppo_config.yaml:2"
    assert loaded.origins["optimizer.betas"] == "configs/ppo_config.yaml:14"


def test_the_second_file_counts_for_its_own_entries_alone(folder):
    (folder / "ppo_config.yaml").write_text(PPO)
    (folder / "own.yaml").write_text(
        "own: {policy: {model: p}, data: {train: t}, reward: {kind: length, max_tokens: 3}}\n"
    )
    assert load_entries(["own"]).config.ppo.num_steps == 100
    assert problems(names=["train"])[0].startswith("command line: train: no such entry in configs")


def test_two_such_files_are_refused_with_both_places(folder):
    (folder / "ppo_a.yaml").write_text(PPO)
    (folder / "ppo_b.yaml").write_text("\n" + PPO)
    assert problems() == [
        "configs/ppo_b.yaml:2: a second file of PPO settings, the first is configs/ppo_a.yaml:1; "
        "remove one"
    ]


def test_klippos_own_keys_win_and_both_spellings_are_overrides(folder):
    (folder / "ppo_config.yaml").write_text(PPO)
    overrides = ["method.init_kl_coef=0.3", "optimizer.learning_rate=1e-5", "reward.batch_size=4"]
    config = load(*overrides, "optimizer.kwargs.eps=1e-6", "kl.target=2", rng_seed=3).config
    assert (config.kl.coef, config.kl.target, config.seed) == (0.3, 2, 3)
    assert (config.optimizer.learning_rate, config.optimizer.eps) == (1e-5, 1e-6)
    assert config.optimizer.final_fraction == 0.1
    assert config.reward.batch_size == 4
    assert load("reward.kind=length", "reward.max_tokens=3").config.reward.kind == "length"


MANY = "rank_config.model_names=[models/a, models/b, models/c]"


def test_several_models_are_an_ensemble_with_the_variance_of_its_code():
    reward = load(MANY, "rank_config.objective_name=UWO").config.reward
    assert reward.model_dump(exclude_unset=True) == {
        "kind": "ensemble",
        "members": ["models/a", "models/b", "models/c"],
        "template": "open-assistant",
        "batch_size": 128,
        "objective": "UWO",
        "uwo_weight": 0.1,
        "ddof": 1,
        "standardize": "none",
    }


def test_uwo_weight_means_nothing_to_the_other_objectives():
    assert load(MANY, "rank_config.objective_name=WCO").config.reward.uwo_weight is None


@pytest.mark.parametrize(
    ("overrides", "rm_seed", "expected"),
    [
        ([], None, "runs/ppo/models_rm-pythia-44m_seed1"),
        ([MANY], None, "runs/ppo/ensemble_mean"),
        ([MANY, "rank_config.objective_name=WCO"], None, "runs/ppo/ensemble_WCO"),
        ([MANY, "rank_config.objective_name=UWO"], None, "runs/ppo/ensemble_UWO-0.1"),
        ([MANY], 3, "runs/ppo/seed3"),
        (['rank_config.model_names="rm_seed{seed}"'], 3, "runs/ppo/seed3"),
    ],
)
def test_a_run_has_the_folder_that_its_code_gives_it(overrides, rm_seed, expected):
    loaded = load_entries(NAMES, overrides=overrides, rm_seed=rm_seed)
    assert loaded.config.output_dir == expected


def test_a_translated_config_loads_again_from_its_run_folder(folder):
    config = load(MANY, rm_seed=3).config
    (folder / "again.yaml").write_text("again:\n  " + to_yaml(config).replace("\n", "\n  "))
    assert load_entries(["again"]).config == config


def test_one_name_may_stand_without_a_list_and_take_the_seed():
    loaded = load('rank_config.model_names="models/rm_seed{seed}"', rm_seed=5)
    assert loaded.config.reward.model == "models/rm_seed5"
    (problem,) = problems('rank_config.model_names="models/rm_seed{seed}"')
    assert problem == (
        "command line: reward.model=models/rm_seed{seed}: nothing fills {seed}, which is rm_seed "
        "here; add --rm_seed 3 or rm_seed: 3 (written as rank_config.model_names)"
    )


def test_other_data_sets_are_files_or_hub_names_with_the_same_columns():
    data = load("datasets=[rows.jsonl]").config.data
    assert (data.train, data.subset, data.split) == ("rows.jsonl", None, "train")
    assert data.prompt_column == ["instruction", "input"]
    data = load("datasets=[a.jsonl]", "datasets_extra=[b.jsonl]", "data.prompt_column=prompt")
    assert data.config.data.train == ["a.jsonl", "b.jsonl"]
    assert data.config.data.prompt_column == "prompt"
    assert load("datasets=[]", "data.train=x.jsonl").config.data.train == "x.jsonl"


@pytest.mark.parametrize(
    ("override", "section", "expected"),
    [
        ("dtype=fp32", "policy.autocast", False),
        ("sft_config.dtype=fp32", "policy.autocast", False),
        ("sft_config.num_layers_unfrozen=-1", "policy.tuning", "full"),
        ("gold_config.is_alpacafarm_rm=false", "gold.template", "open-assistant"),
        ("num_eval_prompts=600", "evaluation.num_prompts", 500),
        ("num_eval_prompts=0", "evaluation.num_prompts", 500),
    ],
)
def test_single_fields_are_translated(override, section, expected):
    outer, inner = section.split(".")
    assert getattr(getattr(load(override).config, outer), inner) == expected


def test_without_a_gold_model_there_is_none():
    assert load("gold_config=").config.gold is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "rank_config.objective_name=WC",
            "rank_config.objective_name=WC: must be mean, WCO or UWO; did you mean WCO?",
        ),
        (
            "rank_config.poling=last",
            "rank_config.poling: unknown key; did you mean pooling?",
        ),
        ("rnk_config=1", "rnk_config: unknown key; did you mean rank_config?"),
        ("ppoo.num_steps=1", "ppoo: unknown key; did you mean ppo?"),
        ("xyz=1", "xyz: unknown key; neither these entries nor Klippo's configs have it"),
        ("gold_config=x", "gold_config=x: must be a mapping"),
        ("rank_config.pooling=mean", "rank_config.pooling=mean: must be last; scores are read at"),
        ("debug=true", "debug=true: must be false; Klippo has no such mode; for a short run set"),
        ("learning_rate=1e-5", "learning_rate: unknown key; neither these entries nor Klippo's"),
        ("sft_config.dtype=fp16", "sft_config.dtype=fp16: must be bf16, bfloat16, fp32 or float32"),
        (
            "sft_config.num_layers_unfrozen=0",
            "sft_config.num_layers_unfrozen=0: must be how many layers train, at least 1, or -1",
        ),
        ("rank_config.model_names=[1]", "rank_config.model_names=[1]: must be a list of names"),
        (
            "gold_config.is_alpacafarm_rm=maybe",
            "gold_config.is_alpacafarm_rm=maybe: must be true or false",
        ),
        ("eval_size=all", "eval_size=all: must be a whole number"),
        (
            "datasets=[alpaca_farm, b]",
            "datasets=[alpaca_farm, b]: alpaca_farm has splits of its own and stands alone",
        ),
        ("method.scale_reward=running", "method.scale_reward=running: must be false or ignored; "),
        ("optimizer.name=sgd", "optimizer.name=sgd: must be adamw; Klippo trains with AdamW"),
        ("scheduler.kwargs.eta_min=1", "scheduler.kwargs.eta_min=1: must be a number from 0 to"),
    ],
)
def test_what_cannot_be_translated_names_key_value_and_rule(folder, override, expected):
    (folder / "ppo_config.yaml").write_text(PPO)
    (problem,) = problems(override)
    assert problem.startswith(f"command line: {expected}")


def test_keys_that_change_nothing_are_listed_in_one_note(folder, caplog):
    (folder / "ppo_config.yaml").write_text(PPO)
    load()
    (note,) = caplog.messages
    assert note.startswith("These keys of the config change nothing: train.checkpoint_interval, ")
    for key in ("learning_rate", "cache_dir", "method.chunk_size", "rank_config.residual_dropout"):
        assert key in note
    for key in ("freeze_layer", "model_path", "method.init_kl_coef", "rng_seed"):
        assert key not in note


def test_a_misspelt_key_in_a_file_is_refused_though_unknown_ones_are_not():
    text = ENTRY.replace("num_layers_unfrozen", "num_layer_unfrozen")
    Path("configs/config_rl.yaml").write_text(text)
    assert problems() == [
        "configs/config_rl.yaml:20: sft_config.num_layer_unfrozen: unknown key; did you mean "
        "num_layers_unfrozen?"
    ]


def test_uwo_without_its_weight_names_the_key_to_write(folder):
    Path("configs/config_rl.yaml").write_text(
        ENTRY.replace("    uwo_weight: 0.1\n", "").replace("name: mean", "name: UWO")
    )
    assert problems(MANY) == [
        "configs/config_rl.yaml:12: rank_config.uwo_weight: missing; objective_name=UWO is "
        "mean - uwo_weight * variance; try uwo_weight: 0.1"
    ]


def test_a_value_of_the_wrong_type_names_both_keys_and_the_line():
    text = ENTRY.replace("batch_size: 128", "batch_size: many")
    Path("configs/config_rl.yaml").write_text(text)
    assert problems() == [
        "configs/config_rl.yaml:16: reward.batch_size=many: must be a whole number "
        "(written as rank_config.batch_size)"
    ]


def test_what_the_defaults_leave_open_is_missing_by_its_own_name():
    assert problems(names=["defaults", "defaults_rlhf"]) == [
        "configs/config.yaml:13: datasets: missing; as in datasets: [alpaca_farm]",
        "configs/config.yaml:19: rank_config.model_names: missing; as in model_names: "
        "[models/rm-pythia-44m_seed1]",
        "configs/config.yaml:20: sft_config.model_name: missing; as in model_name: "
        "tlc4418/pythia_1.4b_sft_policy",
    ]
