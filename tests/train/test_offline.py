"""klippo train on responses that exist already."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from klippo import PPOTrainer
from klippo.rewards.classifier import ClassifierReward
from klippo.rollouts.hf import HFEngine
from klippo.runs.folder import read_rows
from klippo.train.session import Session
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import disturb

PPO = {"batch_size": 8, "num_epochs": 2}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """24 answers to 6 prompts; the reward counts "good"."""
    texts = ["it was good", "good good film", "bad and dull", "I liked the movie"]
    rows = [
        {
            "prompt": f"the {word} was",
            "response": f"{text} {'very ' * i}".strip(),
            "reward": float(text.count("good")) + 0.1 * i,
        }
        for i, word in enumerate(["movie", "film", "good", "bad", "great", "dull"])
        for text in texts
    ]
    return write(tmp_path / "scored.jsonl", rows)


@pytest.fixture
def config(gpt2: Path, scored: Path, tmp_path: Path):
    def make(**sections: object) -> dict[str, object]:
        return {
            "output_dir": str(tmp_path / "run"),
            "device": "cpu",
            "policy": {"model": str(gpt2)},
            "data": {"train": str(scored)},
            "offline": {"num_passes": 2, "behavior": "unknown"},
            "reward": {"kind": "column", "column": "reward"},
            "kl": {"coef": 0.02, "placement": "exact"},
            "ppo": PPO,
            "optimizer": {"learning_rate": 3e-3},
        } | sections

    return make


@pytest.fixture
def sft_adapter(gpt2: Path, tmp_path: Path) -> Path:
    """A LoRA adapter that moves the base."""
    base = AutoModelForCausalLM.from_pretrained(gpt2)
    torch.manual_seed(3)
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    )
    disturb([p for n, p in model.named_parameters() if "lora_" in n], scale=0.2)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.usefixtures("in_float64")
def test_nothing_is_sampled_and_no_reward_model_is_loaded(
    config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("an offline run samples nothing and loads no reward model")

    monkeypatch.setattr(HFEngine, "__init__", never)
    monkeypatch.setattr(HFEngine, "generate", never)
    monkeypatch.setattr(ClassifierReward, "__init__", never)
    monkeypatch.setattr("transformers.GenerationMixin.generate", never)
    outcome = PPOTrainer(config(), quiet=True).train()
    assert outcome.num_steps == 6  # 24 responses, twice, eight at a time
    run = tmp_path / "run"
    steps = read_rows(run / "metrics.jsonl")
    assert len(steps) == 6
    assert not any(key.startswith("reward/") for step in steps for key in step)
    assert steps[0]["kl/sequence_nats"] == pytest.approx(0, **FLOAT64_APPROX)
    assert steps[-1]["kl/sequence_nats"] > 0.01
    looks = read_rows(run / "diagnostics.jsonl")
    assert [look["step"] for look in looks] == [0, 3, 6]
    assert looks[0]["offline/ratio_max"] == pytest.approx(1, **FLOAT64_APPROX)
    assert looks[0]["offline/ess_responses"] == pytest.approx(1, **FLOAT64_APPROX)
    assert looks[-1]["offline/ess_responses"] < 1
    assert not (run / "eval").exists()
    text = (run / "report.html").read_text()
    assert "klippo compare" in text
    assert "Mean score of each batch" not in text  # a constant is not learning
    assert json.loads((run / "run_status.json").read_text())["state"] == "done"


def test_good_responses_become_likelier_than_bad_ones(config, tmp_path: Path) -> None:
    given = config(offline={"num_passes": 8, "behavior": "unknown"})
    PPOTrainer(given, quiet=True).train()
    looks = read_rows(tmp_path / "run/diagnostics.jsonl")
    first, last = looks[0], looks[-1]

    def gap(look: dict) -> float:
        return look["offline/nll_bad_nats_per_token"] - look["offline/nll_good_nats_per_token"]

    assert gap(last) > gap(first) + 0.1


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("placement", ["exact", "no penalty"])
def test_offline_on_the_policys_own_responses_is_the_first_online_step(
    config, gpt2: Path, reward_file: Path, prompts_file: Path, tmp_path: Path, placement: str
) -> None:
    kl = {"coef": 0.1, "placement": "exact"} if placement == "exact" else {"coef": 0.0}
    common = {
        "policy": {"model": str(gpt2)},
        "device": "cpu",
        "kl": kl,
        "ppo": {"num_steps": 1, "batch_size": 16, "num_epochs": 3},
        "evaluation": {"num_prompts": 0},
        "optimizer": {"learning_rate": 1e-3},
    }
    online = PPOTrainer(
        common
        | {
            "output_dir": str(tmp_path / "online"),
            "data": {"train": str(prompts_file)},
            "rollout": {"response_length": 8, "temperature": 0.9},
            "reward": {"kind": "function", "function": f"{reward_file}:good"},
        },
        quiet=True,
    )
    rollout = online.session.source.next()
    scores = online.session.score(rollout)
    assert scores.reward.unique().numel() > 1
    rows = [
        {
            "prompt": rollout.prompts[i].text,
            "response": rollout.responses[i] or "nothing",
            "ids": ids,
            "reward": float(scores.reward[i]),
        }
        for i, ids in enumerate(rollout.response_token_ids())
    ]
    online.session.learner.learn(online.session.learner.experience(rollout, scores))
    offline = PPOTrainer(
        common
        | {
            "output_dir": str(tmp_path / "offline"),
            "data": {"train": str(write(tmp_path / "rows.jsonl", rows))},
            "offline": {"num_passes": 1, "token_ids_column": "ids", "duplicates": "keep"},
            "rollout": {"temperature": 0.9},
            "reward": {"kind": "column", "column": "reward"},
        },
        quiet=True,
    )
    offline.train()
    for (name, ours), (_, theirs) in zip(
        offline.session.policy.named_parameters(),
        online.session.policy.named_parameters(),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **FLOAT64, msg=name)
    start = load_file(gpt2 / "model.safetensors")
    moved = online.session.policy.lm.model.state_dict()
    assert max(float((moved[name] - x).abs().max()) for name, x in start.items()) > 1e-4


@pytest.mark.usefixtures("in_float64")
def test_an_adapter_trains_further_and_plain_peft_loads_it(
    config, gpt2: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    given = config(
        policy={"model": str(gpt2), "adapter": str(sft_adapter), "tuning": "lora"},
        offline={"num_passes": 2, "behavior": "unknown", "baseline": "leave_one_out"},
    )
    trainer = PPOTrainer(given, quiet=True)
    session: Session = trainer.session
    trainer.train()
    run = tmp_path / "run"
    looks = read_rows(run / "diagnostics.jsonl")
    assert looks[0]["offline/kl_start_nats"] == pytest.approx(0, **FLOAT64_APPROX)
    assert looks[-1]["offline/kl_start_nats"] > 1e-3
    assert "offline/explained_variance" not in looks[0]  # leave one out has no critic
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("the movie was very good", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = loaded.eval()(input_ids=ids).logits
        assert session.policy.peft_model is not None
        ours = session.policy.peft_model(input_ids=ids).logits
        start = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(gpt2), sft_adapter
        ).eval()(input_ids=ids)
    torch.testing.assert_close(ours, theirs, **FLOAT64)
    assert (theirs - start.logits).abs().max() > 1e-3
    wanted = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        loaded.generate(input_ids=ids, **wanted),
        session.policy.peft_model.generate(input_ids=ids, **wanted),
    )


def test_a_run_stops_where_it_was_told_to(config, tmp_path: Path) -> None:
    given = config(
        offline={"num_passes": 6, "behavior": "unknown", "max_kl": 0.001}, kl={"coef": 0.0}
    )
    outcome = PPOTrainer(given, quiet=True).train()
    assert outcome.num_steps == 3  # after the first pass
    status = json.loads((tmp_path / "run/run_status.json").read_text())
    assert "stopped early: the KL from the start is" in status["reason"]


def test_claims_about_who_wrote_the_responses_are_checked(
    config, gpt2: Path, tmp_path: Path, capsys
) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    disturb(model.parameters(), scale=0.4)  # far from uniform: its own responses would show it
    model.save_pretrained(tmp_path / "sure")
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(tmp_path / "sure")
    policy = {"model": str(tmp_path / "sure")}
    PPOTrainer(config(policy=policy, offline={"num_passes": 1})).train()  # claims: this policy
    look = read_rows(tmp_path / "run/diagnostics.jsonl")[0]
    assert "not written by the policy that training starts from" in look["warnings"][0]
    assert "anchored and off-policy" in (tmp_path / "run/report.html").read_text()
    assert "anchored and off-policy" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"offline": None}, "add an offline section"),
        ({"reward": {"kind": "length", "max_tokens": 3}}, "use kind: column"),
        ({"kl": {"coef": 0.1}}, "kl.placement=reward: estimates from sampled tokens are wrong"),
        ({"ppo": {"batch_size": 32}}, "ppo.batch_size=32 is more than the 24 responses"),
        ({"reward": {"kind": "column", "column": "rewrd"}}, "did you mean 'reward'"),
        ({"early_stop": {"max_kl": 3.0}}, "early_stop needs fresh responses"),
        ({"offline": {"logprobs_column": "x"}}, "recorded log-probs need both"),
    ],
)
def test_bad_configs_are_refused(config, cli, tmp_path: Path, sections, told) -> None:
    given = {k: v for k, v in config(**sections).items() if v is not None}
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(given))
    code, _, error = cli("train", path)
    assert code == 2
    assert told in " ".join(error.split())
    assert not (tmp_path / "run").exists()


def test_generate_on_an_offline_trainer_says_what_to_use(config) -> None:
    trainer = PPOTrainer(config(), quiet=True)
    with pytest.raises(Exception, match="klippo generate or klippo compare"):
        trainer.generate(["the movie"])


def test_an_adapter_without_weights_and_one_for_another_base_are_refused(
    config, cli, gpt2: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    def refused(adapter: Path) -> str:
        given = config(policy={"model": str(gpt2), "adapter": str(adapter), "tuning": "lora"})
        path = tmp_path / "bad.yaml"
        path.write_text(json.dumps(given))
        code, _, error = cli("train", path)
        assert code == 3
        return " ".join(error.split())

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no adapter_config.json" in refused(empty)
    (empty / "adapter_config.json").write_text((sft_adapter / "adapter_config.json").read_text())
    assert "has no adapter weights" in refused(empty)
    wide = AutoModelForCausalLM.from_pretrained(gpt2).config
    wide.n_embd = 48
    torch.manual_seed(0)
    other = get_peft_model(
        AutoModelForCausalLM.from_config(wide),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"),
    )
    other.save_pretrained(tmp_path / "other")
    assert "is for another base" in refused(tmp_path / "other")
