"""The stage behind `klippo sft`: fine-tune, say what it brought, write a plain model folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from klippo.config.load import LoadedConfig, to_yaml
from klippo.data.rows import load_rows, train_source, validation_source
from klippo.errors import ConfigError
from klippo.evaluation.statistics import PairedComparison, compare_paired
from klippo.ranks import choose_device
from klippo.runs.folder import CONFIG_FILE, RunFolder, write_text, writing
from klippo.supervised.progress import TrainingLine
from klippo.supervised.settings import SFTConfig
from klippo.supervised.sft import (
    Example,
    Loaded,
    build_examples,
    fine_tune,
    load_for_sft,
    nats_per_token,
    save,
)
from klippo.supervised.training import Training, check_one_process

SFT_FILE = "klippo_sft.json"
"""Marks the folder as ours and holds the figures."""


def sft(loaded: LoadedConfig[SFTConfig], *, overwrite: bool = False, quiet: bool = False) -> int:
    """Train as the config says; returns the exit code."""
    check_one_process("sft")
    config, folder = loaded.config, Path(loaded.config.output_dir)
    check_folder(folder, overwrite=overwrite)
    console = Console()
    device = choose_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    rows, held_out_rows = load_rows(config.data, config.seed)
    torch.manual_seed(config.seed)
    start = load_for_sft(config.model, device)
    examples = _examples(config, start, rows, train_source(config.data))
    held_out: list[Example] = []
    if held_out_rows:
        held_out = _examples(config, start, held_out_rows, validation_source(config.data))
    if not quiet:
        num_long = len(rows) + len(held_out_rows) - len(examples) - len(held_out)
        too_long = f", {num_long} too long and left out" if num_long else ""
        text = f"{len(examples)} examples, {len(held_out)} held out{too_long}"
        console.print(text, highlight=False)
    before = nats_per_token(start.model, held_out, _batch_size(config))
    with TrainingLine(console, "sft", quiet=quiet) as line:
        training = Training(settings=config.training, seed=config.seed, device=device)
        model = fine_tune(start.model, start.tokenizer, examples, training, line.step)
    after = nats_per_token(model, held_out, _batch_size(config))
    compared = compare_paired(before, after) if held_out else None
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with RunFolder(folder.parent).new_directory(folder.name) as building:
        save(model, start.tokenizer, building)
        figures = _figures(config, examples, compared, line.seconds / 60)
        write_text(building / SFT_FILE, json.dumps(figures, indent=2) + "\n")
        write_text(building / CONFIG_FILE, to_yaml(config))
    for text in (_sentence(compared), _usage(config, folder)):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raises ConfigError where something stands that may not be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / SFT_FILE).is_file():
        raise ConfigError(
            f"output_dir={folder} exists and is not a model that klippo sft trained (it has no "
            f"{SFT_FILE}), so it is left alone, also by --overwrite; choose another output_dir"
        )
    if not overwrite:
        raise ConfigError(
            f"output_dir={folder} exists already; choose another output_dir, or pass --overwrite "
            "to train it again"
        )


def _examples(config: SFTConfig, start: Loaded, rows: Sequence[Any], source: str) -> list[Example]:
    limits = [n for n in (config.data.max_tokens, start.max_tokens) if n is not None]
    return build_examples(
        rows,
        config.data,
        start.tokenizer,
        max_tokens=min(limits, default=None),
        seed=config.seed,
        source=source,
    )


def _batch_size(config: SFTConfig) -> int:
    return config.training.micro_batch_size or config.training.batch_size


def _figures(
    config: SFTConfig,
    examples: Sequence[Example],
    compared: PairedComparison | None,
    minutes: float,
) -> dict[str, Any]:
    return {
        "model": config.model.name,
        "num_examples": len(examples),
        "minutes": minutes,
        "held_out_nats_per_token": None
        if compared is None
        else {side: asdict(getattr(compared, side)) for side in ("before", "after", "difference")},
    }


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


def _usage(config: SFTConfig, folder: Path) -> str:
    if config.model.tuning == "lora":
        return f"As a policy: {{model: {config.model.name}, adapter: {folder}, tuning: lora}}"
    return f"As a policy: {{model: {folder}}}"
