"""PPO against an ensemble, from native configs and from entries of the published system."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from klippo.config.load import load_config
from klippo.runs.folder import read_rows
from tests.rewards.conftest import make_tokenizer
from tests.rewards.test_published import AlpacaFarm, OpenAssistant
from tests.small_models import word_tokenizer
from tests.tolerance import FLOAT64_APPROX

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Three reward models whose scores lie on scales of their own; the name with {seed}."""
    root = tmp_path_factory.mktemp("members")
    tokenizer = word_tokenizer(pad=True, classifier=True)
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        model = GPT2ForSequenceClassification(
            GPT2Config(
                vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2,
                num_labels=1, pad_token_id=1, initializer_range=0.3,
            )
        )  # fmt: skip
        with torch.no_grad():
            model.score.weight *= 10**seed
        model.save_pretrained(root / f"rm_seed{seed}")
        tokenizer.save_pretrained(root / f"rm_seed{seed}")
    return str(root / "rm_seed{seed}")


def test_a_run_against_an_ensemble_logs_and_stores_its_members(
    cli, write_config, members, tmp_path
):
    reward = {
        "kind": "ensemble",
        "members": [members],
        "seeds": [1, 2, 3],
        "objective": "WCO",
        "standardize": "start",
        "reference_size": 64,
    }
    code, _, err = cli("train", write_config(reward=reward))
    assert code == 0, err
    run = tmp_path / "run"
    moments = yaml.safe_load((run / "config.yaml").read_text())["reward"]["moments"]
    assert moments["sd"][0] < moments["sd"][1] / 3 < moments["sd"][2] / 9
    for row in read_rows(run / "metrics.jsonl"):
        shares = [row[f"ensemble/member{k}_lowest_share"] for k in (1, 2, 3)]
        assert sum(shares) == pytest.approx(1)
        assert row["reward/part/variance"] > 0
        assert max(abs(row[f"ensemble/member{k}_mean"]) for k in (1, 2, 3)) < 10
    for row in read_rows(run / "eval/step-3.jsonl"):
        assert row["proxy"] == pytest.approx(min(row["members"]))
    # On one scale no member is the minimum everywhere, whatever the scale that it was born with.
    first = read_rows(run / "metrics.jsonl")[0]
    assert max(first[f"ensemble/member{k}_lowest_share"] for k in (1, 2, 3)) < 0.9


def test_the_moments_in_the_runs_config_are_used_again(cli, write_config, members, tmp_path):
    reward = {
        "kind": "ensemble",
        "members": [members],
        "seeds": [1, 2],
        "standardize": "start",
        "reference_size": 16,
    }
    assert cli("train", write_config(reward=reward))[0] == 0
    written = load_config(tmp_path / "run/config.yaml").config
    code, out, err = cli("compare", written.policy.model, tmp_path / "run", "--num-prompts", "4")
    assert code == 0, err
    assert "reward" in out


def test_without_stored_moments_a_run_ends_before_it_starts(cli, write_config, members, tmp_path):
    reward = {"kind": "ensemble", "members": [members], "seeds": [1, 2]}
    code, _, err = cli("train", write_config(reward=reward))
    assert code == 2
    assert "no stored mean and standard deviation" in err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Small random models of the published system's classes, and a data set in its columns."""
    root = tmp_path_factory.mktemp("published")
    tokenizer = make_tokenizer(
        ["<|endoftext|>", "<|prompter|>", "<|assistant|>"],
        bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    torch.manual_seed(0)
    policy = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=330, max_position_embeddings=512, hidden_size=16, intermediate_size=32,
            num_hidden_layers=3, num_attention_heads=2, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    policy.save_pretrained(root / "sft")
    tokenizer.save_pretrained(root / "sft")
    for seed in (1, 2):
        OpenAssistant(root / f"rm_seed{seed}")
    AlpacaFarm(root / "gold")
    rows = [
        {"instruction": f"Write {n} words.", "input": "" if n % 2 else "A film.", "output": ""}
        for n in range(40)
    ]
    (root / "alpaca.json").write_text(json.dumps(rows))
    return root


def published(cli, stand_ins, out, entry, *arguments):
    """Train from the example's entries with other model paths, other data and fewer steps."""
    return cli(
        "train", "--configs", "defaults_rlhf", entry,
        "--config-dir", ROOT / "examples/rm-ensemble/configs",
        f"sft_config.model_name={stand_ins / 'sft'}",
        f"gold_config.model_name={stand_ins / 'gold/reward-model-human'}",
        f"datasets=[{stand_ins / 'alpaca.json'}]",
        f"output_dir={out}",
        "num_eval_prompts=8", "ppo.num_steps=2", "rollout.response_length=12", *arguments,
    )  # fmt: skip


@pytest.mark.usefixtures("in_float64")
def test_an_ensemble_entry_of_the_published_system_trains_on_stand_ins(cli, stand_ins, tmp_path):
    names = f"[{stand_ins / 'rm_seed1'}, {stand_ins / 'rm_seed2'}]"
    code, _, err = published(
        cli, stand_ins, tmp_path / "ppo", "ensemble", f"rank_config.model_names={names}"
    )
    assert code == 0, err
    run = tmp_path / "ppo/ensemble_UWO-0.1"
    rows = read_rows(run / "eval/step-2.jsonl")
    assert len(rows) == 8
    first = rows[0]
    mean = sum(first["members"]) / 2
    variance = sum((m - mean) ** 2 for m in first["members"])  # divided by K - 1 = 1
    assert first["proxy"] == pytest.approx(mean - 0.1 * variance, **FLOAT64_APPROX)
    assert first["prompt"].startswith("<|prompter|>Write")
    assert first["prompt"].endswith("<|endoftext|><|assistant|>")
    assert all(isinstance(row["gold"], float) for row in rows)


def test_a_single_entry_takes_its_reward_model_from_rm_seed(cli, stand_ins, tmp_path):
    code, _, err = published(
        cli, stand_ins, tmp_path / "ppo", "single",
        f"rank_config.model_names=['{stand_ins / 'rm_seed{seed}'}']", "--rm_seed", "2",
    )  # fmt: skip
    assert code == 0, err
    config = load_config(tmp_path / "ppo/seed2/config.yaml").config
    assert config.reward.model == str(stand_ins / "rm_seed2")
