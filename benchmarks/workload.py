"""The workloads, the same for every arm: prompts, sizes and models, whoever runs them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from prepare_smollm import SMOLLM

SUBJECTS = (
    "dog cat king queen robot ship war love murder wedding river mountain city farm school judge"
)
NUM_PROMPTS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model with random weights."""

    kind: Literal["gpt2", "llama"] = "gpt2"
    num_layers: int = 4
    width: int = 256
    num_heads: int = 4
    """Of Llama's, four share keys and values, and its inner width is 3.5 times the width, as in
    Llama 3 8B (arXiv 2407.21783, table 3)."""
    context: int = 256
    vocabulary: int | None = None
    """Words of a tokenizer that is made up; None is SmolLM2's tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every arm does; the reward model, and a separate critic, are of the policy's size."""

    name: str = "W1"
    shape: Shape | None = Shape()
    """None is SmolLM2-135M-Instruct with its own weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    lora_rank: int | None = None
    """LoRA on every linear layer of the policy; None is full fine-tuning."""
    batch_size: int = 64
    prompt_length: int | None = None
    """Tokens of each prompt; None is sentences of about ten tokens."""
    response_length: int = 32
    num_epochs: int = 4
    num_minibatches: int = 1
    micro_batch_size: int | None = None
    """Responses per forward and backward pass; None is a whole minibatch."""
    num_members: int = 1
    """Reward models; Klippo's arm alone knows more than one."""
    learning_rate: float = 1e-5
    kl_coef: float = 0.05
    value_coef: float = 0.1
    clip_range: float = 0.2
    gae_lambda: float = 0.95
    num_threads: int = 2
    seed: int = 0

    @property
    def tokens_per_update(self) -> int:
        return self.batch_size * self.response_length

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


LORA_RANK = 16
LORA_ALPHA = 32
W1 = Workload()
W2 = Workload(name="W2", shape=None, batch_size=16)
W3 = Workload(
    name="W3",
    shape=Shape(
        kind="llama", num_layers=32, width=4096, num_heads=32, context=8192, vocabulary=128_256
    ),
    dtype="bfloat16",
    device="cuda",
    lora_rank=LORA_RANK,
    prompt_length=128,
    response_length=128,
    micro_batch_size=8,
)
WORKLOADS: Mapping[str, Workload] = {
    "w1": W1,
    "w2": W2,
    "w2_lora": replace(W2, name="W2 with LoRA", lora_rank=LORA_RANK),
    "w3": W3,
    "w3_reduced": replace(
        W3,
        name="W3, reduced",
        shape=Shape(kind="llama", num_layers=4, width=256, num_heads=8, vocabulary=8192),
        device="cpu",
        batch_size=16,
        prompt_length=32,
        response_length=32,
    ),
}


def prompts() -> list[str]:
    """512 prompts of about ten tokens."""
    words = SUBJECTS.split() * (NUM_PROMPTS // 16)
    return [f"The movie number {i} about a {word} was" for i, word in enumerate(words)]


def prompts_for(workload: Workload, tokenizer: Any) -> list[str]:
    """Sentences, or `prompt_length` random words of a word tokenizer."""
    if workload.prompt_length is None:
        return prompts()
    draw = random.Random(workload.seed)
    words = [word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens]
    words.sort()
    return [
        "".join(f"{word} " for word in draw.choices(words, k=workload.prompt_length))
        for _ in range(NUM_PROMPTS)
    ]


def tokenizer_for(workload: Workload, folder: Path = SMOLLM) -> Any:
    """SmolLM2's tokenizer, or one of as many words as the shape says."""
    size = None if workload.shape is None else workload.shape.vocabulary
    return load_tokenizer(folder) if size is None else word_tokenizer(size)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, with a pad token that is not the end-of-sequence token.

    TRL finds padding by its token id, so the two must differ there.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def word_tokenizer(vocabulary: int) -> Any:
    """A token for each of the words w4, w5, …: any vocabulary, and text that reads back equal."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>"]
    words = special + [f"w{number}" for number in range(len(special), vocabulary)]
    table = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        pad_token=special[0],
        unk_token=special[1],
        bos_token=special[2],
        eos_token=special[3],
    )


def build_policy(workload: Workload, tokenizer: Any) -> Any:
    """The same weights for every arm."""
    from transformers import AutoModelForCausalLM

    return _build(workload, tokenizer, AutoModelForCausalLM, seed=0)


def build_scorer(workload: Workload, tokenizer: Any, *, seed: int) -> Any:
    """A reward or value model of the policy's size with a random head."""
    from transformers import AutoModelForSequenceClassification

    return _build(workload, tokenizer, AutoModelForSequenceClassification, seed=seed, num_labels=1)


def _build(
    workload: Workload, tokenizer: Any, model_class: Any, *, seed: int, **options: Any
) -> Any:
    from transformers.utils import logging

    torch.manual_seed(workload.seed + seed)
    if workload.shape is None:
        with _quiet(logging):  # the head of a scorer is new, and is meant to be
            model = model_class.from_pretrained(SMOLLM, dtype=workload.torch_dtype, **options)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model
    config = model_config(workload.shape, tokenizer, **options)
    with torch.device(workload.device):
        return model_class.from_config(config, dtype=workload.torch_dtype)


def model_config(shape: Shape, tokenizer: Any, **options: Any) -> Any:
    """The shape as a Hugging Face config."""
    from transformers import GPT2Config, LlamaConfig

    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape.kind == "gpt2":
        return GPT2Config(
            n_positions=shape.context,
            n_embd=shape.width,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            **tokens,
            **options,
        )
    return LlamaConfig(
        max_position_embeddings=shape.context,
        hidden_size=shape.width,
        intermediate_size=shape.width * 7 // 2,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads // 4,
        tie_word_embeddings=False,
        **tokens,
        **options,
    )


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def num_parameters(*modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
