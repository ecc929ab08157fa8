"""`klippo baselines`: same rows, same start, and folders that everything else loads."""

import json
import math
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from klippo.config.load import load_config
from klippo.hub import load_tokenizer
from klippo.policy.loading import load_policy
from klippo.policy.settings import CriticSettings, PolicySettings
from klippo.supervised.baselines import Preferences
from klippo.supervised.settings import TrainingSettings
from klippo.supervised.sft import Example
from klippo.supervised.training import Training
from klippo.types import Completion, LoggedResponse, Prompt
from tests.tolerance import FLOAT64, float32_approx
from tests.toys import assert_same_tensors

CPU = torch.device("cpu")
GOOD, BAD = "very good and great", "dull"
PROMPTS = [
    f"{subject} {verb}" for subject in ("the movie", "a film", "it") for verb in ("was", "is")
]
ROWS = [
    {"prompt": prompt, "answer": answer, "score": score}
    for prompt in PROMPTS
    for answer, score in ((BAD, -1.0), (GOOD, 2.0))
]
IDS = torch.tensor([[2, 4, 6, 8]])


@pytest.fixture
def baselines(cli, gpt2, tmp_path):
    """Run `klippo baselines` on rows: (exit code, stdout, stderr)."""

    def run(*arguments, rows=ROWS, **sections):
        data = tmp_path / "scored.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "output_dir": str(tmp_path / "ppo"),
            "device": "cpu",
            "policy": {"model": str(gpt2)},
            "data": {"train": str(data), "validation_size": 2},
            "offline": {"response_column": "answer", "num_passes": 2},
            "rollout": {"response_length": 6},
            "kl": {"coef": 0},
            "reward": {"kind": "column", "column": "score"},
            "ppo": {"batch_size": 4, "micro_batch_size": 2},
            "optimizer": {"learning_rate": 1e-2},
        }
        path = tmp_path / "offline.yaml"
        path.write_text(json.dumps(config | sections))
        return cli("baselines", path, *arguments)

    return run


def lora(gpt2, adapter):
    return {"model": str(gpt2), "adapter": str(adapter), "tuning": "lora"}


def response(tokens, reward):
    return LoggedResponse(
        prompt=Prompt(id=0, text="", token_ids=[2, 4, 6]),
        completion=Completion(token_ids=tokens, finished=True),
        reward=reward,
    )


PAIR = [response([9, 0], -1.0), response([17, 8, 0], 1.0)]
TRAINING = {"batch_size": 1, "num_epochs": 3, "schedule": "constant", "warmup_fraction": 0.0}


def dpo(start, **training):
    """Run DPO on one pair from a start; the figures of each step."""
    steps = []
    settings = TrainingSettings(**(TRAINING | {"learning_rate": 1e-2} | training))

    def report(step, num_steps, figures):
        steps.append(dict(figures))

    training = Training(settings=settings, seed=0, device=CPU, report=report)
    Preferences(PAIR, [], "toy", beta=0.5).train(start, training)
    return steps


def logp(model, tokens):
    """log p of a response behind PAIR's prompt, from the model's own logits."""
    ids = [2, 4, 6, *tokens]
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(3, len(ids)))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("tuning", ["full", "last_layers", "fresh lora", "adapter"])
def test_the_reference_of_dpo_is_the_start(tuning, gpt2, adapter):
    policy = {"model": str(gpt2), "tuning": tuning, "num_unfrozen_layers": 1}
    if tuning in ("fresh lora", "adapter"):
        policy = lora(gpt2, adapter) | ({} if tuning == "adapter" else {"adapter": None})
    start = load_policy(PolicySettings(**policy), CriticSettings(), CPU)
    oracle = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    bare = logp(oracle, [17, 8, 0]), logp(oracle, [9, 0])
    if tuning == "adapter":
        oracle = PeftModel.from_pretrained(oracle, adapter)
    at_start = logp(oracle, [17, 8, 0]), logp(oracle, [9, 0])
    steps = dpo(start)
    rounding = float32_approx(4, 10.0)  # the trainer logs float32; log-probs are -10 to 0
    assert steps[0]["loss"] == pytest.approx(math.log(2), **rounding)
    assert steps[0]["rewards/chosen"] == pytest.approx(0, **rounding)
    assert steps[0]["logps/chosen"] == pytest.approx(at_start[0], **rounding)
    assert steps[0]["logps/rejected"] == pytest.approx(at_start[1], **rounding)
    # After updates the implicit reward still counts from the start: beta * (log pi - log start).
    last = steps[-1]
    assert last["logps/chosen"] > at_start[0] + 0.01
    assert last["rewards/chosen"] == pytest.approx(
        0.5 * (last["logps/chosen"] - at_start[0]), **rounding
    )
    if tuning == "adapter":
        assert abs(at_start[0] - bare[0]) > 0.01


@pytest.mark.usefixtures("in_float64")
def test_gradient_checkpointing_changes_no_number_of_dpo(gpt2, adapter):
    settings = PolicySettings(**lora(gpt2, adapter))
    found = []
    for checkpointing in (False, True):
        start = load_policy(settings, CriticSettings(), CPU)
        dpo(start, gradient_checkpointing=checkpointing)
        parameters = start.policy.lm.model.named_parameters()
        found.append({name: p.detach() for name, p in parameters if ".default." in name})
    assert_same_tensors(*found, **FLOAT64)


def test_the_loss_stands_on_the_response_alone():
    one = response([17, 8, 0], 1.0)
    example = Example(one.prompt.token_ids, one.completion.token_ids)
    assert example.input_ids == [2, 4, 6, 17, 8, 0]
    assert example.labels == [-100, -100, -100, 17, 8, 0]


def test_both_are_trained_from_one_config_and_load_as_plain_models(baselines, cli, gpt2, tmp_path):
    code, out, err = baselines("--learning-rate", "0.02")
    assert code == 0, err
    assert "sft-best: 5 of 10 responses, the best of each prompt (mean reward 2, of all 0.5)" in out
    assert "dpo: 5 pairs of 5 prompts, 3 apart in reward on average (0 ties left out)" in out
    tokenizer = load_tokenizer(str(gpt2))
    good, bad = (tokenizer(text)["input_ids"] for text in (GOOD, BAD))
    start = AutoModelForCausalLM.from_pretrained(gpt2)
    for name in ("sft-best", "dpo"):
        folder = tmp_path / f"ppo-{name}"
        model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        gain = (logp(model, good) - logp(model, bad)) - (logp(start, good) - logp(start, bad))
        assert gain > 1
        status = json.loads((folder / "run_status.json").read_text())
        assert status["state"] == "done"
        assert status["method"] == name
        assert (status["num_examples"], status["num_epochs"]) == (5, 2)
        config = load_config(folder / "config.yaml").config
        assert config.optimizer.learning_rate == 0.02
        assert config.data.validation_size == 2
    assert status["held_out_pairs"] == 1
    assert status["held_out_accuracy"] == 1.0
    code, out, err = cli("generate", tmp_path / "ppo-sft-best", "--prompt", "it was")
    assert code == 0, err


def test_compare_takes_the_folders(baselines, cli, reward_file, tmp_path):
    assert baselines("--quiet")[0] == 0
    folders = tmp_path / "ppo-sft-best", tmp_path / "ppo-dpo"
    code, out, err = cli("compare", *folders, "--reward", f"praise={reward_file}:good")
    assert code == 0, err
    assert "praise" in out
    code, out, err = cli("compare", *folders)  # the logged rewards are not those of fresh answers
    assert code == 0, err
    assert "identical" in out
    assert "score" not in out
    assert "reward" not in out


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ["sft-best", "dpo"])
def test_an_sft_adapter_is_continued(name, baselines, gpt2, adapter, tmp_path):
    code, _, err = baselines("--only", name, policy=lora(gpt2, adapter))
    assert code == 0, err
    folder = tmp_path / f"ppo-{name}" / "model"
    assert not (tmp_path / f"ppo-{'dpo' if name == 'sft-best' else 'sft-best'}").exists()
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, folder))
    assert before.keys() == after.keys()
    moved = {key: float((after[key] - before[key]).abs().max()) for key in before}
    assert 0 < max(moved.values()) < 0.2  # from the adapter's weights, not from fresh ones
    plain = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    ours = load_policy(
        PolicySettings(model=str(gpt2), adapter=str(folder), tuning="lora"), CriticSettings(), CPU
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = plain(input_ids=IDS).logits
        torch.testing.assert_close(ours.policy.lm.model(input_ids=IDS).logits, logits, **FLOAT64)
        torch.testing.assert_close(theirs(input_ids=IDS).logits, logits, **FLOAT64)


ALONE = [
    {"prompt": f"{prompt} {word}", "answer": answer, "score": score}
    for prompt in PROMPTS
    for word, answer, score in (("a", BAD, -1.0), ("the", GOOD, 2.0))
]


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        (ALONE, (), "DPO needs pairs.*each prompt has one response.*--only sft-best"),
        (ROWS, ("--dpo-min-margin", "3.5"), "5 lie closer than --dpo-min-margin 3.5"),
        ([dict(r, score=1) for r in ROWS], (), "all 10 rewards in column 'score' are 1"),
        (
            [*ROWS[:3], dict(ROWS[3], score="high")],
            (),
            r"row 3 \(line 4\).*'score' holds str 'high'",
        ),
        (
            [*ROWS[:3], dict(ROWS[3], score=float("nan"))],
            (),
            r"row 3 \(line 4\).*'score' holds float 'nan'",
        ),
        (ROWS, ("reward.column=scoer",), "no column 'scoer'.*did you mean 'score'"),
        (ROWS, ("offline=null",), "add an offline section"),
        (ROWS, ("--dpo-beta", "0"), "--dpo-beta 0: must be above 0"),
    ],
)
def test_bad_input_is_refused_before_anything_trains(rows, arguments, said, baselines, tmp_path):
    code, out, err = baselines(*arguments, rows=rows)
    assert code == 2
    assert re.search(said, err, re.DOTALL), err
    assert "step" not in out
    assert not list(tmp_path.glob("ppo-*"))


def test_one_response_per_prompt_is_enough_for_the_best_share(baselines):
    code, out, err = baselines("--only", "sft-best", "--best-share", "0.3", rows=ALONE)
    assert code == 0, err
    assert "3 of 10 responses, the best 30% (mean reward 2," in out


def test_held_out_rewards_may_all_be_the_same(baselines, tmp_path):
    code, _, err = baselines("--only", "sft-best", "data.validation_size=1", rows=ALONE)
    assert code == 0, err
    status = json.loads((tmp_path / "ppo-sft-best/run_status.json").read_text())
    assert status["held_out_nats_per_token"]["before"]["num"] == 1


def test_a_folder_that_stands_there_is_replaced_only_on_demand(baselines, tmp_path):
    assert baselines("--only", "dpo", "--quiet")[0] == 0
    code, _, err = baselines()
    assert code == 2
    assert "ppo-dpo exists already" in err
    assert not (tmp_path / "ppo-sft-best").exists()
    assert baselines("--only", "dpo", "--quiet", "--overwrite")[0] == 0
