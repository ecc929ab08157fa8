"""`klippo compare`: one model against others, by several measures."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.judge.servers import api, serving
from tests.small_models import WORDS
from tests.tolerance import FLOAT64_APPROX


@pytest.fixture
def run(cli, write_config, tmp_path: Path) -> Path:
    config = write_config(
        ppo={"num_steps": 12, "batch_size": 32, "num_epochs": 4}, kl={"coef": 0.01}
    )
    assert cli("train", config)[0] == 0
    return tmp_path / "run"


@pytest.fixture
def compared(cli, prompts_file: Path, tmp_path: Path):
    """(what `klippo compare` printed, what it wrote), on the prompts of the file unless told."""

    def run(*arguments, prompts: Path | None = prompts_file):
        output = tmp_path / "compared.json"
        where = [] if prompts is None else ["--prompts", prompts]
        code, out, err = cli("compare", *arguments, *where, "--output", output)
        assert code == 0, err
        return out, json.loads(output.read_text())

    return run


@pytest.fixture
def adapter(gpt2: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of gpt2 that moves its weights, with gpt2's tokenizer."""
    folder = tmp_path / "adapter"
    torch.manual_seed(4)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules="all-linear",
        fan_in_fan_out=True, init_lora_weights=False,
    )  # fmt: skip
    get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(folder)
    return folder


def test_training_changed_the_answers_for_the_better(cli, compared, run: Path, gpt2: Path) -> None:
    out, written = compared(gpt2, run, "--num-prompts", "16", prompts=None)
    (found,) = written["comparisons"]
    assert found["name"] == "run"
    assert len(written["answers"]) == 16
    assert found["whole"]["measures"]["reward"]["difference"]["low"] > 0
    assert found["weights"]["relative"] > 0
    assert found["outputs"]["kl"]["low"] > 0
    assert found["words"]["p_value"] < 0.05
    assert "Before and after, 16 prompts" in out
    again, from_start = compared("start", run, "--num-prompts", "16", prompts=None)
    assert from_start["comparisons"] == written["comparisons"]
    assert again == out


@pytest.mark.usefixtures("in_float64")
def test_a_model_and_itself_are_the_same_in_every_figure(
    compared, gpt2: Path, reward_file: Path
) -> None:
    out, written = compared(gpt2, gpt2, "--reward", f"{reward_file}:good")
    (found,) = written["comparisons"]
    assert found["num_identical"] == 16
    assert found["weights"] == {
        "relative": 0, "num_changed": 0,
        "num_tensors": len(list(AutoModelForCausalLM.from_pretrained(gpt2).parameters())),
    }  # fmt: skip
    assert found["outputs"]["kl"]["mean"] == pytest.approx(0, **FLOAT64_APPROX)
    assert found["outputs"]["logprob"]["mean"] == 0
    assert found["words"]["distance"] == 0
    differences = [one["difference"] for one in found["whole"]["measures"].values()]
    assert [(one["mean"], one["low"], one["high"]) for one in differences] == [(0, 0, 0)] * 6
    assert "16 of 16" in out


def test_several_models_stand_beside_each_other(
    cli, compared, run: Path, gpt2: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out, written = compared("start", f"PPO={run}", f"SFT={adapter}", f"none={gpt2}", prompts=None)
    assert [one["name"] for one in written["comparisons"]] == ["PPO", "SFT", "none"]
    alone = [compared("start", one, prompts=None)[1]["comparisons"][0]["whole"] for one in (run,)]
    assert written["comparisons"][0]["whole"] == alone[0]
    assert [one["num_identical"] for one in written["comparisons"]][2] == 16
    assert set(written["answers"][0]["answers"]) == {"before", "PPO", "SFT", "none"}
    head = next(line for line in out.splitlines() if "PPO" in line)
    assert head.index("before") < head.index("PPO") < head.index("SFT") < head.index("none")
    assert max(map(len, out.splitlines())) <= 100
    assert "…" not in out.split("The same prompts")[0]


def test_an_adapter_can_be_named_in_four_ways(
    cli, compared, write_config, gpt2: Path, adapter: Path, tmp_path: Path
) -> None:
    small = {"num_steps": 1, "batch_size": 8, "minibatch_size": 8}
    policy = {"model": str(gpt2), "adapter": str(adapter), "tuning": "lora"}
    config = write_config(policy=policy, ppo=small, optimizer={"learning_rate": 1e-9})
    assert cli("train", config)[0] == 0
    run = tmp_path / "run"
    named = [str(adapter), f"{gpt2}+{adapter}", f"{gpt2}+{run}", str(run)]
    models = [f"m{i}={name}" for i, name in enumerate(named)]
    _, written = compared("start", *models, prompts=None)
    assert [one["num_identical"] for one in written["comparisons"]] == [16] * 4
    moved = [one["weights"]["relative"] for one in written["comparisons"]]
    assert moved[:2] == [0, 0]
    assert 0 < moved[2] == moved[3] < 1e-6
    _, from_base = compared(gpt2, f"{gpt2}+{adapter}")
    (found,) = from_base["comparisons"]
    assert found["weights"]["num_changed"] == 8
    assert found["num_identical"] < 16
    code, out, _ = cli("generate", adapter, "--prompt", "the movie", "--temperature", "0")
    assert code == 0
    assert (
        cli("generate", f"{gpt2}+{adapter}", "--prompt", "the movie", "--temperature", "0")[1]
        == out
    )


def test_judges_score_alone_and_against_each_other(
    compared, run: Path, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with serving() as server:
        judge = {"kind": "judge", "api": api(server), "probes": False}
        (tmp_path / "tone.yaml").write_text(json.dumps(judge))
        duel = judge | {"mode": "pairwise", "reference_column": "top"}
        (tmp_path / "pairs.yaml").write_text(json.dumps(duel))
        arguments = ("--reward", "tone.yaml", "--reward", "better=pairs.yaml")
        out, written = compared(gpt2, run, *arguments, prompts=None)
    (found,) = written["comparisons"]
    assert found["whole"]["measures"]["tone"]["difference"]["low"] > 0  # it learnt to say "good"
    assert "better" not in found["whole"]["measures"]
    fought = found["whole"]["duels"]["better"]
    rows = [row["answers"] for row in written["answers"]]
    better = sum(row["run"]["tone"] > row["before"]["tone"] for row in rows)
    assert fought["num_won"] >= better > fought["num_lost"]
    assert fought["num_won"] + fought["num_drawn"] + fought["num_lost"] == 16
    assert fought["win_rate"]["low"] > 0.5
    assert "better: wins" in out


def test_by_a_column_shows_each_kind_of_prompt(compared, gpt2: Path, reward_file, tmp_path) -> None:
    prompts = tmp_path / "kinds.jsonl"
    rows = [{"prompt": f"the {w} was", "right": i % 4 == 0} for i, w in enumerate(WORDS)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, written = compared(
        gpt2, gpt2, "--reward", f"{reward_file}:good", "--by", "right", prompts=prompts
    )
    (found,) = written["comparisons"]
    assert {name: one["num_prompts"] for name, one in found["groups"].items()} == {
        "right = false": 12,
        "right = true": 4,
    }
    scores = [row["answers"]["before"]["good"] for row in written["answers"]]
    mean = found["groups"]["right = true"]["measures"]["good"]["before"]["mean"]
    assert mean == sum(scores[::4]) / 4
    assert "right = true: 4 prompts" in out


def test_every_prompt_of_logged_data_is_asked_once(compared, gpt2: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "logged.jsonl"
    rows = [{"prompt": f"the {w} was", "response": r} for w in WORDS[:3] for r in "ab"]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, written = compared(gpt2, gpt2, prompts=prompts)
    assert [row["prompt_id"] for row in written["answers"]] == [0, 2, 4]


def test_an_offline_run_is_compared_on_fresh_answers(
    cli, compared, write_config, gpt2: Path, adapter: Path, tmp_path: Path
) -> None:
    logged = tmp_path / "scored.jsonl"
    rows = [
        {"prompt": f"the {w} was", "response": f"it was {r}", "reward": float(r == "good")}
        for w in WORDS
        for r in ("good", "bad")
    ]
    logged.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(
        policy={"model": str(gpt2), "adapter": str(adapter), "tuning": "lora"},
        data={"train": str(logged), "validation_size": 8},
        offline={"num_passes": 1, "behavior": "unknown"},
        reward={"kind": "column", "column": "reward"},
        kl={"coef": 0.0},
        ppo={"batch_size": 8},
    )
    code, _, err = cli("train", config)
    assert code == 0, err
    _, written = compared("start", tmp_path / "run", prompts=None)
    (found,) = written["comparisons"]
    assert len(written["answers"]) == 4  # eight rows of four prompts were held out
    assert written["max_tokens"] == 8
    assert "reward" not in found["whole"]["measures"]
    assert 0 < found["weights"]["num_changed"] <= 8


def test_models_of_other_shapes_are_called_not_comparable(
    compared, gpt2: Path, prompts_file
) -> None:
    out, written = compared(gpt2, "demo:policy", "--num-prompts", "4")
    (found,) = written["comparisons"]
    assert (found["weights"], found["outputs"]) == (
        "the architectures differ",
        "the vocabularies differ",
    )
    assert found["whole"]["measures"]["length"]["after"]["num"] == 4
    assert "not comparable" in out


def test_a_runs_config_lends_its_held_out_prompts(cli, compared, write_config, gpt2, prompts_file):
    config = write_config(data={"train": str(prompts_file), "validation_size": 5})
    _, written = compared(gpt2, gpt2, prompts=config)
    assert len(written["answers"]) == 5
    assert written["max_tokens"] == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{gpt2}", "{gpt2}"], "--prompts FILE"),
        (["{gpt2}", "{gpt2}", "{gpt2}"], "is there twice"),
        (["{gpt2}", "before={gpt2}"], "is what BEFORE is called"),
        (["start", "{gpt2}"], "none of the others is a run folder"),
        (["{gpt2}+", "{gpt2}"], "BASE+ADAPTER"),
        (["{gpt2}+{gpt2}", "{gpt2}"], "is no LoRA adapter"),
        (["{gpt2}", "{gpt2}", "--prompts", "{file}", "--by", "promt"], "did you mean prompt?"),
        (["{gpt2}", "{gpt2}", "--prompts", "{file}", "--by", "prompt"], "16 different values"),
        (
            ["{gpt2}", "{gpt2}", "--prompts", "{file}", "--reward", "a=x.py:f", "--reward", "a=x"],
            "two measures have this name",
        ),
        (
            ["{gpt2}", "{gpt2}", "--prompts", "{file}", "--reward", "length=x.py:f"],
            "is a measure of its own",
        ),
    ],
)
def test_bad_input_is_one_clear_error(cli, gpt2, prompts_file, arguments, said) -> None:
    filled = [one.format(gpt2=gpt2, file=prompts_file) for one in arguments]
    code, _, err = cli("compare", *filled)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_an_adapter_whose_base_has_moved_says_how_to_name_it(cli, gpt2, adapter, prompts_file):
    file = adapter / "adapter_config.json"
    moved = json.loads(file.read_text()) | {"base_model_name_or_path": "/no/such/base"}
    file.write_text(json.dumps(moved))
    code, _, err = cli("compare", gpt2, adapter, "--prompts", prompts_file)
    assert code == 2
    assert f"BASE+{adapter}" in err
