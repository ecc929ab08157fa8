"""Supervised fine-tuning of a causal LM, by TRL's SFTTrainer.

loss = -mean over learnt tokens of log p(token | tokens before), in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from klippo.data.files import Row, require_column
from klippo.data.prompts import build_prompts
from klippo.errors import ConfigError, PreflightError
from klippo.hub import load_model, no_progress_bars
from klippo.policy.loading import turn_dropout_off
from klippo.supervised.settings import ExampleSettings, ModelSettings
from klippo.supervised.training import (
    Report,
    Training,
    add_lora,
    load_own_tokenizer,
    quiet_trl,
    refuse_adapter_folder,
    train_causal,
)
from klippo.types import Prompt

NOT_LEARNT = -100
"""Label of tokens without loss, as in torch's cross entropy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One text to learn."""

    input_ids: list[int]
    labels: list[int]
    """The same, NOT_LEARNT on the prompt's tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    model: Any
    tokenizer: Any
    max_tokens: int | None
    """The model's context."""


def load_for_sft(settings: ModelSettings, device: torch.device) -> Loaded:
    """The causal LM that learns, dropout off, and its tokenizer. Raises PreflightError."""
    from transformers import AutoModelForCausalLM

    refuse_adapter_folder(
        settings.name, settings.revision, "merge it into its base model first, or train that"
    )
    with quiet_trl():
        tokenizer = load_own_tokenizer(settings)
        if tokenizer.eos_token_id is None:
            raise PreflightError(
                f"model.name={settings.name}: its tokenizer has no end-of-sequence token, so "
                "nothing could teach the model to stop; set one in the tokenizer"
            )
        dtype = getattr(torch, settings.dtype)
        model = load_model(AutoModelForCausalLM, settings.name, settings.revision, dtype=dtype)
        turn_dropout_off(model)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if settings.tuning == "lora":
            model = add_lora(model, settings.lora, "CAUSAL_LM")
    return Loaded(model=model.to(device), tokenizer=tokenizer, max_tokens=context)


def learn_response(prompt: Prompt, ids: Sequence[int]) -> Example:
    """The example with loss on the response's token ids alone."""
    unlearnt = [NOT_LEARNT] * len(prompt.token_ids)
    return Example(input_ids=[*prompt.token_ids, *ids], labels=[*unlearnt, *ids])


def build_examples(
    rows: Sequence[Row],
    settings: ExampleSettings,
    tokenizer: Any,
    *,
    max_tokens: int | None,
    seed: int,
    source: str,
) -> list[Example]:
    """Rows as token ids; `overlong: drop` leaves out those longer than `max_tokens`.

    The prompt is tokenized as `klippo train` does it, the response behind it on its own, with the
    end-of-sequence token after it. Raises ConfigError for everything that is wrong with the rows.
    """
    rows, responses = _split(rows, settings, source)
    prompts = build_prompts(
        rows, settings, tokenizer, max_prompt_tokens=2**31, seed=seed, source=source
    )
    eos = int(tokenizer.eos_token_id)
    examples, too_long = [], []
    for row, prompt, response in zip(rows, prompts, responses, strict=True):
        ids = tokenizer(response or "", add_special_tokens=False, verbose=False)["input_ids"]
        example = learn_response(prompt, [*ids, eos])
        if response is None:
            example = Example(input_ids=example.input_ids, labels=example.input_ids)
        if max_tokens is not None and len(example.input_ids) > max_tokens:
            too_long.append((row, len(example.input_ids)))
            continue
        examples.append(example)
    if too_long and (settings.overlong == "error" or not examples):
        row, length = too_long[0]
        raise ConfigError(
            f"{row.place(source)}: the example has {length} tokens with its end token, the limit "
            f"is {max_tokens}; {len(too_long)} of {len(rows)} are too long. Shorten them, or set "
            "data.overlong: drop (at least one must be left)"
        )
    return examples


def _split(
    rows: Sequence[Row], settings: ExampleSettings, source: str
) -> tuple[list[Row], list[str | None]]:
    """Rows with their prompts, and their responses (None: all of the prompt column is learnt)."""
    column = settings.response_column
    if column is not None:
        return list(rows), [_text(row, column, source) for row in rows]
    if settings.format != "chat":
        return list(rows), [None] * len(rows)
    name = settings.prompt_columns[0]
    split: list[Row] = []
    responses: list[str | None] = []
    for row in rows:
        messages = row.columns.get(name)
        last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
        if (
            not isinstance(messages, list)
            or not isinstance(last, dict)
            or last.get("role") != "assistant"
        ):
            raise ConfigError(
                f"{row.place(source)}: column {name!r} holds {str(messages)[:60]!r}; with "
                "response_column: null and format: chat it must be a list of messages that ends "
                "with the assistant's"
            )
        columns = dict(row.columns) | {name: messages[:-1], "": last.get("content")}
        split.append(Row(row.number, columns, row.line))
        responses.append(_text(split[-1], "", source))
    return split, responses


def _text(row: Row, column: str, source: str) -> str:
    require_column(column, row.columns, "data.response_column", source)
    value = row.columns[column]
    if isinstance(value, str) and value.strip():
        return value
    what = f"column {column!r}" if column else "the assistant's last message"
    raise ConfigError(
        f"{row.place(source)}: {what} holds {str(value)[:60]!r} where a response is needed; fill "
        "or remove the row"
    )


def fine_tune(
    model: Any, tokenizer: Any, examples: Sequence[Example], training: Training, report: Report
) -> Any:
    """The model (or PeftModel) trained on the examples; raises DivergedError when that fails."""
    from trl import SFTConfig, SFTTrainer

    columns = {
        "input_ids": [example.input_ids for example in examples],
        "labels": [example.labels for example in examples],
    }
    return train_causal(SFTTrainer, SFTConfig, model, tokenizer, columns, training, report)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model (or adapter) and tokenizer, as from_pretrained reads them."""
    with no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's, a form that nobody has filled in


@torch.no_grad()
def nats_per_token(model: Any, examples: Sequence[Example], batch_size: int) -> list[float]:
    """Mean -log p of the learnt tokens of each example, nats."""
    device = model.get_input_embeddings().weight.device
    losses = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        width = max(len(example.input_ids) for example in batch)

        def padded(rows: Sequence[Sequence[int]], filler: int, width: int = width) -> torch.Tensor:
            return torch.tensor([[*r, *[filler] * (width - len(r))] for r in rows], device=device)

        ids = padded([example.input_ids for example in batch], 0)  # (B, S)
        labels = padded([example.labels for example in batch], NOT_LEARNT)  # (B, S)
        mask = padded([[1] * len(example.input_ids) for example in batch], 0)  # (B, S)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        nats = F.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=NOT_LEARNT, reduction="none"
        )  # (B, S-1)
        losses += (nats.sum(1) / (labels[:, 1:] != NOT_LEARNT).sum(1)).tolist()
    return losses
