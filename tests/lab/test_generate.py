"""`klippo generate` on runs and on plain model folders."""

import io
import sys
from pathlib import Path

import pytest


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
