"""`klippo generate` and `klippo compare` on runs and on plain model folders."""

import io
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def run(cli, write_config, tmp_path: Path) -> Path:
    config = write_config(
        ppo={"num_steps": 12, "batch_size": 32, "num_epochs": 4}, kl={"coef": 0.01}
    )
    assert cli("train", config)[0] == 0
    return tmp_path / "run"


def test_generate_answers_prompts_from_arguments(cli, gpt2: Path) -> None:
    code, out, _ = cli(
        "generate", gpt2, "--prompt", "the movie", "--prompt", "a film", "--max-tokens", "5"
    )
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("the movie → ")
    assert lines[1].startswith("a film → ")
    assert len(lines[0].split("→")[1].split()) <= 5


def test_generate_reads_a_file_and_samples_several_times(cli, gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the movie\n\na film\n")
    code, out, _ = cli("generate", gpt2, "--file", tmp_path / "prompts.txt", "--num-samples", "3")
    assert code == 0
    assert len(out.splitlines()) == 6


def test_generate_reads_standard_input(cli, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the movie was\n"))
    code, out, _ = cli("generate", gpt2)
    assert code == 0
    assert out.startswith("the movie was → ")


def test_generate_puts_the_template_of_the_run_around_a_prompt(cli, write_config, tmp_path) -> None:
    prompts = tmp_path / "two.jsonl"
    prompts.write_text('{"first": "a film", "second": "was"}\n' * 4)
    data = {
        "train": [str(prompts), str(prompts)],
        "prompt_column": ["first", "second"],
        "template": "it was {prompt} and",
    }
    assert cli("train", write_config(data=data, ppo={"num_steps": 1, "batch_size": 4}))[0] == 0
    _, out, _ = cli("generate", tmp_path / "run", "--prompt", "the movie")
    assert out.startswith("it was the movie and → ")
    code, out, _ = cli("compare", tmp_path / "run", tmp_path / "run", "--num-prompts", "2")
    assert code == 0
    assert "2 of 2 answers are identical" in out


def test_generate_is_greedy_at_temperature_zero_and_repeats_under_a_seed(cli, gpt2: Path) -> None:
    def answer(*options: str) -> str:
        return cli("generate", gpt2, "--prompt", "the movie", *options)[1]

    assert answer("--temperature", "0", "--seed", "1") == answer("--temperature", "0")
    assert answer("--seed", "1") == answer("--seed", "1")
    assert answer("--seed", "1") != answer("--seed", "2")


def test_generate_without_any_prompt_says_what_to_give(
    cli, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, err = cli("generate", gpt2)
    assert code == 2
    assert "--prompt" in err


def test_compare_finds_that_training_changed_the_answers_for_the_better(
    cli, run: Path, gpt2: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.json"
    code, out, err = cli("compare", gpt2, run, "--num-prompts", "16", "--output", pairs)
    assert code == 0, err
    written = json.loads(pairs.read_text())
    assert len(written["pairs"]) == 16
    assert written["measures"]["reward"]["low"] > 0
    assert "Before and after, 16 fixed prompts" in out


def test_compare_finds_no_change_between_a_model_and_itself(
    cli, gpt2: Path, prompts_file: Path, reward_file: Path, tmp_path: Path
) -> None:
    code, out, err = cli(
        "compare", gpt2, gpt2, "--prompts", prompts_file, "--reward", f"{reward_file}:good",
        "--output", tmp_path / "same.json",
    )  # fmt: skip
    assert code == 0, err
    assert "16 of 16 answers are identical" in out
    assert json.loads((tmp_path / "same.json").read_text())["measures"]["reward"]["difference"] == 0


def test_compare_without_a_run_asks_for_prompts(cli, gpt2: Path) -> None:
    code, _, err = cli("compare", gpt2, gpt2)
    assert code == 2
    assert "--prompts FILE" in err
