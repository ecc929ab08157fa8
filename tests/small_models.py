"""Small local models of real architectures, in the folders that save_pretrained writes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

WORDS = [
    "the",
    "a",
    "movie",
    "film",
    "was",
    "is",
    "good",
    "bad",
    "great",
    "dull",
    "I",
    "liked",
    "it",
]
WORDS += ["and", "not", "very"]


def word_tokenizer(*, pad: bool, classifier: bool = False) -> PreTrainedTokenizerFast:
    """Words and an end-of-sequence token; a pad token only where asked for, as with GPT-2."""
    special = ["<s>", "<pad>", "</s>", "<unk>"] if classifier else ["</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": "</s>", "unk_token": "<unk>"} | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 without a pad token, as lvwerra/gpt2-imdb is."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = word_tokenizer(pad=False)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa sentiment model with the labels of siebert/sentiment-roberta-large-english."""
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = word_tokenizer(pad=True, classifier=True)
    torch.manual_seed(1)
    RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=80,
            pad_token_id=1,
            id2label={0: "NEGATIVE", 1: "POSITIVE"},
            label2id={"NEGATIVE": 0, "POSITIVE": 1},
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the gpt2 fixture that is not the identity."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    config = LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2), config).save_pretrained(folder)
    return folder


@pytest.fixture
def reward_file(tmp_path: Path) -> Path:
    """Counts the word "good"."""
    path = tmp_path / "rewards.py"
    path.write_text(
        "def good(responses):\n    return [float(r.split().count('good')) for r in responses]\n"
    )
    return path


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"the {word} was"} for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def write_config(
    tmp_path: Path, gpt2: Path, prompts_file: Path, reward_file: Path
) -> Callable[..., Path]:
    """Write a small run's config; keyword arguments replace whole sections."""

    def write(**sections: object) -> Path:
        config = {
            "output_dir": str(tmp_path / "run"),
            "policy": {"model": str(gpt2)},
            "data": {"train": str(prompts_file)},
            "rollout": {"response_length": 8},
            "reward": {"kind": "function", "function": f"{reward_file}:good"},
            "ppo": {"num_steps": 3, "batch_size": 16, "num_epochs": 2, "minibatch_size": 8},
            "optimizer": {"learning_rate": 3e-3},
            "evaluation": {"num_prompts": 8, "num_shown": 2},
        }
        path = tmp_path / "small.yaml"
        path.write_text(json.dumps(config | sections))
        return path

    return write


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a `klippo` command in this process: (exit code, stdout, stderr)."""
    from klippo.cli.main import app

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments], prog_name="klippo")
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run
