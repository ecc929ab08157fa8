"""Models to look at rather than to train: a run folder, a model folder, a hub name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from klippo.config.load import load_config
from klippo.data.settings import DataSettings
from klippo.errors import ConfigError
from klippo.hub import load_tokenizer
from klippo.policy.loading import load_causal_lm, turn_dropout_off
from klippo.policy.settings import PolicySettings
from klippo.rollouts.collate import stop_token_ids
from klippo.rollouts.hf import HFEngine
from klippo.rollouts.sampling import Sampling
from klippo.runs.folder import CONFIG_FILE, MODEL_DIR, STATUS_FILE
from klippo.stages.build import context_length, longest

UNNAMED = DataSettings(train="prompts")
MAX_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel:
    """A model that answers, and how its run read prompts."""

    name: str
    model: Any
    tokenizer: Any
    data: DataSettings
    data_seed: int
    """Seed of its run, which held out rows by it; 0 for other models."""
    stop_ids: frozenset[int]
    max_tokens: int
    """The longest response of its run; for other models 64, or half the context."""
    device: torch.device

    def engine(self, sampling: Sampling) -> HFEngine:
        return HFEngine(self.model, stop_ids=self.stop_ids, sampling=sampling)


def open_model(source: str, device: torch.device) -> OpenModel:
    """Load the model of a run (its folder) or any causal LM by folder or hub name.

    Raises ConfigError for a run without a model, PreflightError for what cannot be loaded.
    """
    folder = Path(source)
    data, data_seed, at_eos = UNNAMED, 0, True
    max_tokens: int | None = None
    stops: tuple[str | int, ...] = ()
    path = source
    if (folder / STATUS_FILE).is_file():
        if not (folder / MODEL_DIR).is_dir():
            raise ConfigError(f"{source}: the run has no {MODEL_DIR}/ (see its {STATUS_FILE})")
        path = str(folder / MODEL_DIR)
        config = load_config(folder / CONFIG_FILE).config
        data, data_seed, at_eos = config.data, config.seed, config.rollout.stop_at_eos
        stops = config.rollout.stop_tokens
        max_tokens = longest(config.rollout.response_length)
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(PolicySettings(model=path), device).to(device).eval()
    turn_dropout_off(model)
    if max_tokens is None:
        max_tokens = min(MAX_TOKENS, (context_length(model) or 2 * MAX_TOKENS) // 2)
    generation_config = getattr(model, "generation_config", None)
    return OpenModel(
        name=source,
        model=model,
        tokenizer=tokenizer,
        data=data,
        data_seed=data_seed,
        stop_ids=stop_token_ids(tokenizer, generation_config, at_eos=at_eos, extra=stops),
        max_tokens=max_tokens,
        device=device,
    )
