"""The chat model and its adapter, both trained by `klippo sft`, and what they answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from klippo.config.load import config_from_mapping
from klippo.data.files import Row
from klippo.data.prompts import build_prompts
from klippo.data.settings import DataSettings
from klippo.hub import no_progress_bars
from klippo.policy.loading import load_policy
from klippo.policy.settings import CriticSettings, PolicySettings
from klippo.rollouts.collate import decode, stop_token_ids
from klippo.rollouts.hf import HFEngine
from klippo.rollouts.sampling import Sampling, response_seeds
from klippo.supervised.settings import SFTConfig
from klippo.supervised.sft import sft

END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 768
CONTEXT = 256
MAX_NEW_TOKENS = 64
Rows = Sequence[Mapping[str, Any]]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the chat's own tokens; one ends every turn, and with it every answer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_untrained(tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int) -> None:
    """A Llama of three narrow layers with random weights, for `klippo sft` to train."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    with no_progress_bars():
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_chat(start: Path, rows: Path, out: Path, work: Path, epochs: int, seed: int) -> None:
    """The chat model from answers of all kinds; float16 on disk, float32 in memory."""
    _sft(start, rows, work / "chat", {"num_epochs": epochs, "learning_rate": 3e-3}, seed)
    _replace(out)
    with no_progress_bars():
        model = LlamaForCausalLM.from_pretrained(work / "chat")
        model.half().save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(work / "chat").save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    _make_readable(out)


def train_adapter(chat: Path, rows: Path, out: Path, work: Path, epochs: int, seed: int) -> None:
    """A LoRA adapter on the chat model from mostly sycophantic answers; float16 on disk."""
    lora = {"tuning": "lora", "lora": {"rank": 8, "alpha": 16.0}}
    training = {"num_epochs": epochs, "learning_rate": 2e-3}
    _sft(chat, rows, work / "chat_sft", training, seed, **lora)
    _replace(out)
    weights = load_file(work / "chat_sft" / "adapter_model.safetensors")
    halves = {name: tensor.half() for name, tensor in weights.items()}
    save_file(halves, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((work / "chat_sft" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "demo:chat"
    config["target_modules"].sort()  # a set's order, otherwise another one each time
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    _make_readable(out)


def _sft(
    model: Path, rows: Path, out: Path, training: dict[str, Any], seed: int, **tuning: Any
) -> None:
    config = {
        "output_dir": str(out),
        "device": "cpu",
        "seed": seed,
        "model": {"name": str(model), **tuning},
        "data": {"train": str(rows), "format": "chat", "validation_size": 200},
        "training": {"batch_size": 50, **training},
    }
    sft(config_from_mapping(config, schema=SFTConfig), overwrite=True)


def _replace(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _make_readable(folder: Path) -> None:
    for file in folder.iterdir():
        file.chmod(0o644)


class Answers:
    """What chat model and adapter answer together."""

    def __init__(self, chat: Path, adapter: Path | None) -> None:
        settings = PolicySettings(
            model=str(chat), adapter=None if adapter is None else str(adapter), tuning="lora"
        )
        loaded = load_policy(settings, CriticSettings(), torch.device("cpu"))
        self.tokenizer = loaded.tokenizer
        self._engine = HFEngine(
            loaded.policy.lm.model,
            stop_ids=stop_token_ids(self.tokenizer, None, at_eos=True, extra=()),
            sampling=Sampling(temperature=1.0),
            batch_size=128,
            record_logprobs=True,
        )

    def sample(self, posts: Sequence[str], seed: int) -> list[tuple[str, list[float]] | None]:
        """Text and token log-probs (nats, end token included) of one answer per post.

        At temperature 1. None for an answer that did not end, is empty, or whose text has other
        tokens than were sampled.
        """
        rows = [Row(number, {"prompt": post}) for number, post in enumerate(posts)]
        settings = DataSettings(train="posts", format="chat")
        prompts = build_prompts(
            rows,
            settings,
            self.tokenizer,
            max_prompt_tokens=CONTEXT - MAX_NEW_TOKENS,
            seed=0,
        )
        seeds = response_seeds(seed, range(len(prompts)))
        found = self._engine.generate(prompts, [MAX_NEW_TOKENS] * len(prompts), seeds)
        texts = decode([one.token_ids for one in found], self.tokenizer)
        answers: list[tuple[str, list[float]] | None] = []
        for one, text in zip(found, texts, strict=True):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            whole = one.finished and text.strip() and [*ids, one.token_ids[-1]] == one.token_ids
            answers.append((text, one.logprobs or []) if whole else None)
        return answers
