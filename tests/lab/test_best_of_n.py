"""`klippo best-of-n`: by hand, at the published size, after a kill, and never twice."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from klippo.rewards.classifier import ClassifierReward
from klippo.rewards.settings import ClassifierSettings
from klippo.rollouts.hf import HFEngine
from klippo.runs.folder import read_rows
from klippo.types import Prompt
from tests.small_models import word_tokenizer
from tests.tolerance import FLOAT64_APPROX, float32_approx

# Each response of a hand-made sample is its two members' scores, as in "0.3 1.0".
FUNCTIONS = """
from pathlib import Path

def _count(name, responses):
    with Path(__file__).with_name(name).open("a") as file:
        file.write(f"{len(responses)}\\n")

def first(responses):
    _count("first", responses)
    return [float(r.split()[0]) for r in responses]

def second(responses):
    _count("second", responses)
    return [float(r.split()[1]) for r in responses]

def good(responses):
    _count("good", responses)
    return [float(r.split().count("good")) for r in responses]

def longer(token_ids):
    return [float(len(ids)) for ids in token_ids]

def slow(responses):
    import time
    _count("slow", responses)
    if len(Path(__file__).with_name("slow").read_text().split()) == 2:
        time.sleep(60)
    return [float(len(r)) for r in responses]
"""


@pytest.fixture
def functions(tmp_path) -> Path:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def samples(tmp_path) -> Path:
    """Two prompts with three answers each, in the shape of the published data."""
    rows = [
        {
            "instruction": "rate",
            "input": "the film",
            "answers": ["0.3 1.0", "0.1 0.0", "0.9 0.2"],
            "gold_scores": [1.0, 2.0, 6.0],
        },
        {
            "instruction": "rate",
            "input": "",
            "answers": ["3 1", "1 1", "2 2"],
            "gold_scores": [0.0, 3.0, 6.0],
        },
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(functions: Path, name: str) -> list[int]:
    file = functions.with_name(name)
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def result(folder: Path) -> dict:
    return json.loads((folder / "best_of_n.json").read_text())


def test_best_of_two_by_hand(cli, samples, functions, tmp_path):
    code, out, err = cli(
        "best-of-n", "--samples", samples, "--proxy", f"{functions}:first", "--n", "1,2,3",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    found = result(tmp_path / "out")
    assert found["ns"] == [1, 2, 3]
    assert found["num_prompts"] == 2
    assert found["num_samples"] == 3
    assert found["kl_bound"] == pytest.approx([0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])
    arm = found["arms"]["functions.py:first"]
    # The first prompt's pairs pick 1, 6, 6; the second's 0, 0, 6.
    assert [p["mean"] for p in arm["gold"]] == pytest.approx([3, (13 / 3 + 2) / 2, 3])
    # ... by proxies 0.3, 0.9, 0.9 and 3, 3, 2.
    assert [p["mean"] for p in arm["proxy"]] == pytest.approx(
        [(1.3 / 3 + 2) / 2, (0.7 + 8 / 3) / 2, (0.9 + 3) / 2]
    )
    # Two prompts with 6 and 0: mean 3, t(1 degree of freedom) = 12.706 times 6 / 2.
    assert arm["gold"][2]["high"] == pytest.approx(3 + 12.7062 * 3, rel=1e-4)
    assert "Gold scores are those in the file." in out
    for ending in ("png", "svg"):
        assert (tmp_path / f"out/best_of_n.{ending}").stat().st_size > 1000


def test_objectives_combine_members_that_were_scored_once(cli, samples, functions, tmp_path):
    code, _, err = cli(
        "best-of-n", "--samples", samples, "--proxy", f"{functions}:first",
        "--proxy", f"{functions}:second", "--ensemble", "mean", "--ensemble", "WCO",
        "--ensemble", "UWO:2", "--standardize", "none", "--n", "1,3", "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    arms = result(tmp_path / "out")["arms"]
    # By the minimum: 0.3 of (0.3, 0, 0.2) has gold 1; 2 of (1, 1, 2) has gold 6.
    assert arms["WCO"]["gold"][1]["mean"] == pytest.approx(3.5)
    assert arms["WCO"]["proxy"][1]["mean"] == pytest.approx((0.3 + 2) / 2)
    # mean - 2 var: 0.65 - 0.245, 0.05 - 0.005, 0.55 - 0.245; 2 - 2, 1, 2.
    assert arms["UWO:2"]["proxy"][1]["mean"] == pytest.approx((0.405 + 2) / 2)
    # By the mean: 0.65; 2 and 2 tie, with gold 0 and 6.
    assert arms["mean"]["gold"][1]["mean"] == pytest.approx((1 + 3) / 2)
    assert asked(functions, "first") == asked(functions, "second") == [6]


def test_members_are_put_on_one_scale_unless_told_otherwise(cli, samples, functions, tmp_path):
    def arm(*options):
        out = tmp_path / ("out" + "".join(options))
        command = ["best-of-n", "--samples", samples, "--ensemble", "WCO", "--output", out]
        command += [f"--proxy={functions}:{name}" for name in ("first", "second")]
        assert cli(*command, *options)[0] == 0
        return result(out)["arms"]["WCO"]["proxy"][0]["mean"]

    def scaled(values):
        mean = sum(values) / 6
        sd = (sum((v - mean) ** 2 for v in values) / 5) ** 0.5
        return [(v - mean) / sd for v in values]

    first, second = scaled([0.3, 0.1, 0.9, 3, 1, 2]), scaled([1.0, 0.0, 0.2, 1, 1, 2])
    expected = sum(min(a, b) for a, b in zip(first, second, strict=True)) / 6
    assert arm() == pytest.approx(expected, **float32_approx(8, 4.0))  # (v - mean) / sd, up to 4
    assert arm("--standardize=none") == pytest.approx((0.3 + 0 + 0.2 + 1 + 1 + 2) / 6)


@pytest.mark.usefixtures("in_float64")
def test_a_yaml_file_names_proxies_and_ensembles(cli, reward_models, gpt2, prompts_file, tmp_path):
    members = [str(folder) for folder in reward_models]
    sections = {
        "single": {"kind": "classifier", "model": members[0]},
        "lowest": {
            "kind": "ensemble", "members": members, "objective": "WCO", "standardize": "none",
        },
    }  # fmt: skip
    (tmp_path / "proxies.yaml").write_text(json.dumps(sections))
    code, _, err = cli(
        "best-of-n", gpt2, "--prompts", prompts_file, "--num-prompts", 3, "--num-samples", 4,
        "--proxy", tmp_path / "proxies.yaml", "--gold", members[1], "--response-length", 6,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert list(result(tmp_path / "out")["arms"]) == ["single", "lowest"]
    files = sorted((tmp_path / "out/scores").iterdir())
    assert len(files) == 2  # the gold model is a member too, and has its scores once
    rows = read_rows(tmp_path / "out/samples.jsonl")
    prompts = [Prompt(id=0, text=row["prompt"], token_ids=[]) for row in rows]
    for folder, file in zip(reward_models, files, strict=True):
        alone = ClassifierReward(ClassifierSettings(kind="classifier", model=str(folder)))
        expected = alone.score_pairs(prompts, [row["response"] for row in rows]).reward.tolist()
        assert read_rows(file)[0]["scores"] == pytest.approx(expected, **FLOAT64_APPROX)


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory) -> list[Path]:
    """Two reward models of one architecture."""
    folders = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("members") / f"rm{seed}"
        tokenizer = word_tokenizer(pad=True, classifier=True)
        torch.manual_seed(seed)
        GPT2ForSequenceClassification(
            GPT2Config(
                vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2,
                num_labels=1, pad_token_id=1, initializer_range=0.3,
            )
        ).save_pretrained(folder)  # fmt: skip
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders


@pytest.fixture
def sample(gpt2, prompts_file, functions, tmp_path):
    """A small command's arguments, with options behind."""

    def command(*options: object, num_samples: int = 6) -> list[str]:
        words = [
            "best-of-n", gpt2, "--prompts", prompts_file, "--num-prompts", 4, "--num-samples",
            num_samples, "--response-length", 6, "--batch-size", 8, "--proxy", f"{functions}:good",
            "--output", tmp_path / "out", *options,
        ]  # fmt: skip
        return [str(word) for word in words]

    return command


def test_nothing_is_sampled_or_scored_twice(cli, sample, functions, tmp_path, monkeypatch):
    sizes = []

    def generate(self, prompts, *rest, original=HFEngine.generate):
        sizes.append(len(prompts))
        return original(self, prompts, *rest)

    monkeypatch.setattr(HFEngine, "generate", generate)
    assert cli(*sample())[0] == 0
    rows = read_rows(tmp_path / "out/samples.jsonl")
    assert [(r["sample"], r["prompt"]) for r in rows[:5:4]] == [
        (0, rows[0]["prompt"]),
        (1, rows[0]["prompt"]),
    ]
    assert sizes == [8, 8, 8]
    first = result(tmp_path / "out")
    assert cli(*sample())[0] == 0
    assert result(tmp_path / "out") == first
    assert sizes == [8, 8, 8]
    assert asked(functions, "good") == [24]
    # More samples of every prompt are added to those that are there.
    assert cli(*sample(num_samples=8))[0] == 0
    assert sizes == [8, 8, 8, 8]
    assert asked(functions, "good") == [24, 8]
    assert read_rows(tmp_path / "out/samples.jsonl")[:24] == rows
    # Another proxy is scored alone, and fewer samples need nothing.
    assert cli(*sample("--proxy", f"{functions}:longer"))[0] == 0
    assert sizes == [8, 8, 8, 8]
    assert asked(functions, "good") == [24, 8]
    assert (
        result(tmp_path / "out")["arms"]["functions.py:good"] == first["arms"]["functions.py:good"]
    )


def test_samples_follow_from_the_seed_the_prompt_and_their_number(cli, sample, tmp_path):
    assert cli(*sample())[0] == 0
    rows = read_rows(tmp_path / "out/samples.jsonl")
    small = sample("--output", tmp_path / "small", "--batch-size", 3, num_samples=2)
    assert cli(*small)[0] == 0
    assert read_rows(tmp_path / "small/samples.jsonl") == rows[:8]
    assert cli(*sample("--output", tmp_path / "other", "--seed", 1))[0] == 0
    assert [r["response_ids"] for r in read_rows(tmp_path / "other/samples.jsonl")] != [
        r["response_ids"] for r in rows
    ]


def kill_when(command: list[str], ready) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "klippo", *command], stdout=subprocess.DEVNULL, env=os.environ
    )
    deadline = time.monotonic() + 60
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_kill_while_sampling_loses_no_more_than_a_batch(cli, sample, tmp_path):
    file = tmp_path / "out/samples.jsonl"
    command = sample(num_samples=400)
    kill_when(command, lambda: file.exists() and file.read_bytes().count(b"\n") >= 16)
    there = file.read_bytes().count(b"\n")
    assert 16 <= there < 1600
    with file.open("ab") as cut:
        cut.write(b'{"prompt_id": 1, "sam')  # as a kill within a write leaves it
    assert cli(*command)[0] == 0
    assert cli(*sample("--output", tmp_path / "whole", num_samples=400))[0] == 0
    assert read_rows(file) == read_rows(tmp_path / "whole/samples.jsonl")


def test_a_kill_while_scoring_loses_no_more_than_a_chunk(cli, sample, functions, tmp_path):
    command = sample("--proxy", f"{functions}:slow", num_samples=200)
    kill_when(command, lambda: len(asked(functions, "slow")) == 2)
    assert asked(functions, "good") == [512, 288]
    assert asked(functions, "slow") == [512, 288]
    assert cli(*command)[0] == 0
    assert asked(functions, "good") == [512, 288]
    assert asked(functions, "slow") == [512, 288, 288]


def test_the_published_size_streams_through(cli, functions, tmp_path):
    num = 12_600
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for prompt in range(2):
            for i in range(num):
                row = {"prompt": f"p{prompt}", "response": f"{i} {-i}", "gold": i + prompt}
                file.write(json.dumps(row) + "\n")
    code, _, err = cli(
        "best-of-n", "--samples", path, "--proxy", f"{functions}:first", "--proxy",
        f"{functions}:second", "--n", "1,12500,12600", "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    arms = result(tmp_path / "out")["arms"]
    assert [p["mean"] for p in arms["functions.py:first"]["gold"]] == pytest.approx(
        # The largest of n out of 0 … N - 1 is n (N + 1) / (n + 1) - 1 on average.
        [6299.5 + 0.5, 12500 * 12601 / 12501 - 0.5, 12599.5]
    )
    assert arms["functions.py:second"]["gold"][2]["mean"] == 0.5
    assert max(asked(functions, "first")) == 512


def test_a_changed_reward_model_is_scored_again(cli, sample, functions, tmp_path):
    assert cli(*sample())[0] == 0
    functions.write_text(FUNCTIONS.replace('count("good"))', 'count("dull"))'))
    assert cli(*sample())[0] == 0
    assert asked(functions, "good") == [24, 24]


def test_another_request_is_not_mixed_into_the_same_folder(cli, sample, tmp_path):
    assert cli(*sample())[0] == 0
    rows = read_rows(tmp_path / "out/samples.jsonl")
    code, _, err = cli(*sample("--temperature", "0.5"))
    assert code == 2
    assert "temperature is 1.0 there and 0.5 here" in err
    assert read_rows(tmp_path / "out/samples.jsonl") == rows
    assert cli(*sample("--temperature", "0.5", "--overwrite"))[0] == 0
    assert read_rows(tmp_path / "out/samples.jsonl") != rows


def test_unscored_samples_are_left_out_and_counted(cli, functions, tmp_path):
    path = tmp_path / "some.jsonl"
    rows = [{"prompt": "p", "response": f"{i}", "gold": None if i == 3 else i} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = cli(
        "best-of-n", "--samples", path, "--proxy", f"{functions}:first", "--n", "1,3,4",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    arm = result(tmp_path / "out")["arms"]["functions.py:first"]
    assert [p["mean"] for p in arm["gold"]] == [1, 2, None]
    assert arm["gold"][0]["low"] is None  # one prompt says nothing about others
    assert "1 samples without a score are left out" in out


def test_more_choice_than_samples_is_refused_before_sampling(cli, sample, tmp_path):
    code, _, err = cli(*sample("--n", "1,7"))
    assert code == 2
    assert "n=7 is more than the 6 samples per prompt" in err
    assert "--num-samples 7" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--ensemble", "WCO"], "--ensemble WCO combines the single proxies, and there are 1"),
        (["--proxy", "{f}:first", "--ensemble", "UWO"], "UWO needs a weight, as in UWO:0.5"),
        (["--proxy", "{f}:first", "--ensemble", "worst"], "must be one of mean, WCO, UWO"),
        (["--proxy", "{f}:first", "--ensemble", "WCO:1"], "WCO takes no weight"),
        (["--proxy", "{f}:good"], "is there twice"),
        (["--n", "1,two"], "n=1,two: write whole numbers"),
        (["--temperature", "0"], "temperature=0.0 draws the same response every time"),
        (["--samples", "{f}"], "give either POLICY to sample from, or --samples"),
    ],
)
def test_wrong_options_say_what_to_do(cli, sample, functions, options, told, tmp_path):
    code, _, err = cli(*sample(*[word.format(f=functions) for word in options]))
    assert code == 2
    assert told in err
    assert not (tmp_path / "out").exists()


def test_a_run_is_sampled_on_the_prompts_that_it_held_out(
    cli, write_config, prompts_file, functions, tmp_path
):
    data = {"train": str(prompts_file), "validation_size": 4}
    assert (
        cli("train", write_config(data=data, seed=5, ppo={"num_steps": 1, "batch_size": 4}))[0] == 0
    )
    held_out = {row["prompt_id"] for row in read_rows(tmp_path / "run/eval/step-0.jsonl")}
    code, _, err = cli(
        "best-of-n", tmp_path / "run", "--num-samples", 2, "--proxy", f"{functions}:good",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert {row["prompt_id"] for row in read_rows(tmp_path / "out/prompts.jsonl")} == held_out


def test_a_model_that_is_no_run_needs_prompts_and_a_proxy(cli, gpt2, functions, tmp_path):
    out = tmp_path / "out"
    code, _, err = cli("best-of-n", gpt2, "--proxy", f"{functions}:good", "--output", out)
    assert code == 2
    assert "say which prompts: --prompts FILE" in err
    assert not out.exists()
    assert "give --proxy NAME" in cli("best-of-n", gpt2, "--output", out)[2]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"prompt": "p"}', "line 1: needs `response` (text) or `answers`"),
        ('{"text": "p", "response": "r"}', "line 1: needs `prompt`, or `instruction`"),
        ('{"prompt": "p", "answers": ["r"], "gold_scores": [1, 2]}', "1 answers need as many"),
        ('{"prompt": "p", "resp', "line 1: broken JSON"),
        ("", "has no samples"),
    ],
)
def test_a_wrong_samples_file_is_named_with_its_line(cli, functions, tmp_path, row, told):
    path = tmp_path / "wrong.jsonl"
    path.write_text(row + "\n")
    code, _, err = cli(
        "best-of-n", "--samples", path, "--proxy", f"{functions}:good", "--output", tmp_path / "out"
    )
    assert code == 2
    assert told in err
    assert not (tmp_path / "out").exists()


def test_rewards_that_read_tokens_need_samples_with_tokens(cli, samples, functions, tmp_path):
    code, _, err = cli(
        "best-of-n", "--samples", samples, "--proxy", f"{functions}:longer", "--output",
        tmp_path / "out",
    )  # fmt: skip
    assert code == 2
    assert "reads token ids, and the samples have none" in err


def test_a_folder_with_something_else_is_left_alone(cli, sample, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    code, _, err = cli(*sample("--overwrite"))
    assert code == 2
    assert "holds no samples of Klippo" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
