"""`klippo sft`: supervised fine-tuning of a causal LM, by TRL's SFTTrainer.

loss = -mean over learnt tokens of log p(token | tokens before), in nats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from klippo.config.load import LoadedConfig, to_yaml
from klippo.data.files import Row, shown
from klippo.data.prompts import build_prompts
from klippo.data.rows import load_rows
from klippo.errors import ConfigError, PreflightError
from klippo.evaluation.statistics import PairedComparison, compare_paired
from klippo.hub import load_model, load_tokenizer
from klippo.lengths import context_length
from klippo.policy.adapters import add_lora
from klippo.policy.loading import turn_dropout_off
from klippo.runs.folder import CONFIG_FILE, write_text
from klippo.supervised.settings import ExampleSettings, ModelSettings, SFTConfig
from klippo.supervised.training import (
    Training,
    TrainingLine,
    holds_result,
    make_trainer,
    new_folder,
    prepare,
    quiet_trl,
    refuse_adapter_folder,
    run_trainer,
    save,
)
from klippo.types import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_LEARNT = -100
"""Label of tokens without loss, as in torch's cross entropy."""


class Example(NamedTuple):
    """One text to learn: loss falls on the ids of the response alone."""

    prompt: list[int]
    response: list[int]

    @property
    def input_ids(self) -> list[int]:
        return self.prompt + self.response

    @property
    def labels(self) -> list[int]:
        return [NOT_LEARNT] * len(self.prompt) + self.response


SFT_FILE = "klippo_sft.json"
"""Marks the folder as ours and holds the figures."""


def sft(loaded: LoadedConfig[SFTConfig], *, overwrite: bool = False, quiet: bool = False) -> int:
    """Train as the config says; returns the exit code."""
    config, folder = loaded.config, Path(loaded.config.output_dir)
    device = prepare("sft", config)
    if holds_result(folder, [SFT_FILE], "model that klippo sft trained") and not overwrite:
        raise ConfigError(
            f"output_dir={folder} exists already; choose another output_dir, or pass --overwrite "
            "to train it again"
        )
    console = Console(highlight=False, soft_wrap=True)
    rows, held_out_rows = load_rows(config.data, config.seed)
    torch.manual_seed(config.seed)
    model, tokenizer = load_for_sft(config.model, device)
    limits = [n for n in (config.data.max_tokens, context_length(model)) if n is not None]
    examples, held_out = (
        build_examples(
            some, config.data, tokenizer, max_tokens=min(limits, default=None), seed=config.seed
        )
        for some in (rows, held_out_rows)
    )
    num_long = len(rows) + len(held_out_rows) - len(examples) - len(held_out)
    if not quiet:
        too_long = f", {num_long} too long and left out" if num_long else ""
        console.print(f"{len(examples)} examples, {len(held_out)} held out{too_long}")
    batch_size = config.training.micro_batch_size or config.training.batch_size
    before = nats_per_token(model, held_out, batch_size)
    with TrainingLine(console, "sft", quiet=quiet) as line:
        training = Training(config.training, config.seed, device, line.step)
        model = fine_tune(model, tokenizer, examples, training)
    compared = compare_paired(before, nats_per_token(model, held_out, batch_size))
    figures = {
        "model": config.model.name,
        "num_examples": len(examples),
        "minutes": line.seconds / 60,
        "held_out_nats_per_token": None if compared is None else loss_figures(compared),
    }
    with new_folder(folder) as building:
        save(model, tokenizer, building)
        write_text(building / SFT_FILE, json.dumps(figures, indent=2) + "\n")
        write_text(building / CONFIG_FILE, to_yaml(config))
    console.print(_sentence(compared), markup=False)
    policy = f"model: {folder}"
    if config.model.tuning == "lora":
        policy = f"model: {config.model.name}, adapter: {folder}, tuning: lora"
    console.print(f"As a policy: {{{policy}}}", markup=False)
    return 0


def load_for_sft(
    settings: ModelSettings, device: torch.device
) -> tuple[PreTrainedModel, Tokenizer]:
    """The causal LM that learns, dropout off, and its tokenizer. Raises PreflightError."""
    from transformers import AutoModelForCausalLM

    refuse_adapter_folder(
        settings.name, settings.revision, "merge it into its base model first, or train that"
    )
    with quiet_trl():
        tokenizer = load_tokenizer(settings.name, settings.revision)
        if tokenizer.eos_token_id is None:
            raise PreflightError(
                f"model.name={settings.name}: its tokenizer has no end-of-sequence token, so "
                "nothing could teach the model to stop; set one in the tokenizer"
            )
        dtype = getattr(torch, settings.dtype)
        model = load_model(AutoModelForCausalLM, settings.name, settings.revision, dtype=dtype)
        turn_dropout_off(model)
        if settings.tuning == "lora":
            model = add_lora(model, settings.lora, "model.lora")
    return model.to(device), tokenizer


def build_examples(
    rows: Sequence[Row],
    settings: ExampleSettings,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None,
    seed: int,
) -> list[Example]:
    """Rows as token ids; `overlong: drop` leaves out those longer than `max_tokens`.

    The prompt is tokenized as `klippo train` does it, the response behind it on its own, with the
    end-of-sequence token after it. Raises ConfigError for everything that is wrong with the rows.
    """
    if not rows:
        return []
    split = [_split(row, settings) for row in rows]
    prompts = build_prompts(
        [row for row, _ in split], settings, tokenizer, max_prompt_tokens=2**31, seed=seed
    )
    eos = tokenizer.eos_token_id
    assert eos is not None
    examples, too_long = [], []
    for (row, response), prompt in zip(split, prompts, strict=True):
        ids = tokenizer(response or "", add_special_tokens=False, verbose=False)["input_ids"]
        example = Example(prompt.token_ids, [*ids, eos])
        if response is None:
            example = Example([], example.input_ids)
        if max_tokens is not None and len(example.input_ids) > max_tokens:
            too_long.append((row, len(example.input_ids)))
        else:
            examples.append(example)
    if too_long and (settings.overlong == "error" or not examples):
        row, length = too_long[0]
        raise ConfigError(
            f"{row}: the example has {length} tokens with its end token, the limit "
            f"is {max_tokens}; {len(too_long)} of {len(rows)} are too long. Shorten them, or set "
            "data.overlong: drop (at least one must be left)"
        )
    return examples


def _split(row: Row, settings: ExampleSettings) -> tuple[Row, str | None]:
    """The row with its prompt, and its response (None: all of the prompt column is learnt)."""
    column = settings.response_column
    if column is not None:
        row.require(column, "data.response_column")
        return row, _filled(row, row.columns[column], f"column {column!r}")
    if settings.format != "chat":
        return row, None
    name = settings.prompt_columns[0]
    messages = row.columns.get(name)
    chat = messages if isinstance(messages, list) else []
    last = chat[-1] if len(chat) > 1 else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        needed = "a list of messages that ends with the assistant's"
        raise row.unusable(name, needed, "fix the row, or set data.response_column")
    response = _filled(row, last.get("content"), "the assistant's last message")
    return replace(row, columns={**row.columns, name: chat[:-1]}), response


def _filled(row: Row, value: Any, what: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise ConfigError(
        f"{row}: {what} holds {shown(value)} where a response is needed; fill or remove the row"
    )


def fine_tune(
    model: PreTrainedModel, tokenizer: Tokenizer, examples: Sequence[Example], training: Training
) -> PreTrainedModel:
    """Train the model (or PeftModel) in place. Raises DivergedError when the loss is not finite."""
    from trl import SFTConfig, SFTTrainer

    columns = {name: [getattr(of, name) for of in examples] for name in ("input_ids", "labels")}
    return train_causal(SFTTrainer, SFTConfig, model, tokenizer, columns, training)


def train_causal(
    trainer: Any, config: Any, model: PreTrainedModel, *data: Any, **options: Any
) -> PreTrainedModel:
    """Train with the model's padding ids restored; `data` and `options` as in `make_trainer`."""
    text_config = model.config.get_text_config()
    pads = (text_config.pad_token_id, model.generation_config.pad_token_id)
    training: Training = data[-1]
    with quiet_trl():
        made = make_trainer(trainer, config, model, *data, **options)
        trained = run_trainer(made, training.report)
    text_config.pad_token_id, trained.generation_config.pad_token_id = pads
    return trained


@torch.no_grad()
def nats_per_token(
    model: PreTrainedModel, examples: Sequence[Example], batch_size: int
) -> list[float]:
    """Mean -log p of the learnt tokens of each example, nats."""
    device = model.get_input_embeddings().weight.device

    def padded(rows: Sequence[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row, device=device) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value)  # (B, S)

    losses = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        ids = padded([example.input_ids for example in batch], 0)
        mask = padded([[1] * len(example.input_ids) for example in batch], 0)
        labels = padded([example.labels for example in batch], NOT_LEARNT)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        nats = F.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=NOT_LEARNT, reduction="none"
        )  # (B, S-1)
        losses += (nats.sum(1) / (labels[:, 1:] != NOT_LEARNT).sum(1)).tolist()
    return losses


def loss_figures(compared: PairedComparison) -> dict[str, Any]:
    """Held-out loss before and after, as JSON holds it."""
    return {side: asdict(getattr(compared, side)) for side in ("before", "after", "difference")}


def _sentence(compared: PairedComparison | None) -> str:
    """Loss per learnt token, averaged over held-out examples, before and after."""
    if compared is None:
        return (
            "Nothing was held out, so nothing says what it brought; set data.validation_size or "
            "data.validation."
        )
    before, after, change = compared.before, compared.after, compared.difference
    return (
        f"Held-out loss, {before.num} examples: {before.mean:.3f} → {after.mean:.3f} nats/token "
        f"({change.low:+.3f} to {change.high:+.3f}), "
        f"perplexity {math.exp(before.mean):.1f} → {math.exp(after.mean):.1f}"
    )
