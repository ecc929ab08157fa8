"""PPOTrainer from Python: a whole run, and single steps for loops of one's own."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from klippo import PPOTrainer
from klippo.errors import ConfigError
from klippo.runs.folder import read_rows
from tests.small_models import word_tokenizer
from tests.tolerance import FLOAT64_APPROX

PROMPTS = ["the movie was", "a film is", "I liked the movie"]


def count_good(responses: list[str]) -> list[float]:
    return [float(response.split().count("good")) for response in responses]


def settings(tmp_path: Path) -> dict[str, object]:
    return {
        "output_dir": str(tmp_path / "run"),
        "rollout": {"response_length": 8},
        "ppo": {"num_steps": 2, "batch_size": 8, "num_epochs": 2},
        "optimizer": {"learning_rate": 3e-3},
        "evaluation": {"num_prompts": 3},
    }


@pytest.fixture
def trainer(tmp_path: Path, gpt2: Path) -> PPOTrainer:
    return PPOTrainer(settings(tmp_path), str(gpt2), count_good, PROMPTS, quiet=True)


def test_a_model_a_function_and_a_list_of_prompts_are_enough(tmp_path: Path, gpt2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    tokenizer = word_tokenizer(pad=False)
    trainer = PPOTrainer(
        settings(tmp_path), model, count_good, PROMPTS, tokenizer=tokenizer, quiet=True
    )
    outcome = trainer.train()
    assert outcome.num_steps == 2
    assert outcome.compared["proxy"].before.num == 3
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == 2


def test_bare_prompts_go_under_the_first_of_several_columns(tmp_path: Path, gpt2: Path) -> None:
    data = {"prompt_column": ["instruction", "input"], "template": "it was {prompt} and"}
    trainer = PPOTrainer(
        settings(tmp_path) | {"data": data}, str(gpt2), count_good, PROMPTS, quiet=True
    )
    rollout = trainer.generate(["a film", {"instruction": "the movie", "input": "was"}])
    assert [p.text for p in rollout.prompts] == ["it was a film and", "it was the movie\nwas and"]
    assert [p.content for p in rollout.prompts] == ["a film", "the movie\nwas"]
    assert rollout.prompts[0].meta == {"instruction": "a film", "input": None}


def test_an_async_reward_function_is_awaited(tmp_path: Path, gpt2: Path) -> None:
    async def reward(responses: list[str]) -> list[float]:
        return count_good(responses)

    outcome = PPOTrainer(settings(tmp_path), str(gpt2), reward, PROMPTS, quiet=True).train()
    assert outcome.num_steps == 2


@pytest.mark.usefixtures("in_float64")
def test_a_loop_of_ones_own_learns_from_scores_of_ones_own(trainer: PPOTrainer) -> None:
    means = []
    for step in range(12):
        rollout = trainer.generate([PROMPTS[i % 3] for i in range(8)])
        scores = count_good(rollout.responses)
        metrics = trainer.step(rollout.prompts, rollout.response_token_ids(), scores)
        assert metrics["reward/score_mean"] == pytest.approx(sum(scores) / 8)
        if step == 0:
            assert metrics["kl/sequence_nats"] == pytest.approx(0, **FLOAT64_APPROX)
        means.append(metrics["reward/score_mean"])
    assert sum(means[-3:]) > sum(means[:3])


def test_step_trains_on_the_ids_that_generate_sampled(trainer: PPOTrainer) -> None:
    rollout = trainer.generate(["the movie was"] * 8)
    ids = rollout.response_token_ids()
    rebuilt = trainer._rollout(rollout.prompts, ids, 8)
    assert rebuilt.response_token_ids() == ids
    assert torch.equal(rebuilt.tokens.prompt_ids, rollout.tokens.prompt_ids)
    assert rebuilt.finished.tolist() == rollout.finished.tolist()


@pytest.mark.parametrize(
    ("responses", "scores", "said"),
    [
        ([[2, 3]] * 7, [1.0] * 8, "7 responses"),
        ([[2, 3]] * 8, [1.0] * 9, "9 scores"),
        (["good"] * 8, [1.0] * 8, "token ids"),
        ([[]] + [[2]] * 7, [1.0] * 8, r"responses\[0\] is empty"),
    ],
)
def test_step_says_what_does_not_fit(trainer: PPOTrainer, responses, scores, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer.step(["the movie was"] * 8, responses, scores)


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path, gpt2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        PPOTrainer(settings(tmp_path), model, count_good, PROMPTS)


def test_save_writes_a_folder_that_from_pretrained_reads(
    trainer: PPOTrainer, tmp_path: Path
) -> None:
    trainer.save(tmp_path / "kept")
    AutoModelForCausalLM.from_pretrained(tmp_path / "kept/model")
    assert (tmp_path / "kept/critic/value_head.safetensors").is_file()
