"""Models to look at rather than to train: run folders, model folders, hub names, LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from klippo.config.load import load_config
from klippo.config.schema import RunConfig
from klippo.data.files import Row
from klippo.data.prompts import build_prompts
from klippo.data.settings import DataSettings
from klippo.errors import ConfigError
from klippo.hub import find_file, load_tokenizer, resolve
from klippo.lengths import context_length, longest, room_for_prompts
from klippo.policy.adapters import with_adapter
from klippo.policy.loading import load_causal_lm, turn_dropout_off
from klippo.policy.settings import PolicySettings
from klippo.rollouts.collate import stop_token_ids
from klippo.rollouts.hf import HFEngine
from klippo.rollouts.sampling import Sampling
from klippo.runs.folder import CONFIG_FILE, MODEL_DIR, STATUS_FILE
from klippo.types import Prompt, Tokenizer

UNNAMED = DataSettings(train="prompts")
MAX_TOKENS = 64
ADAPTER_FILE = "adapter_config.json"
START = "start"
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model and its adapter are, before anything is loaded."""

    name: str
    base: str
    """Folder or hub name."""
    revision: str | None = None
    adapter: str | None = None
    """LoRA adapter of that base."""
    config: RunConfig | None = None
    """The config of its run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel:
    """A model that answers, and how its run read prompts."""

    name: str
    model: Any
    tokenizer: Tokenizer
    data: DataSettings
    data_seed: int
    """Seed of its run, which held out rows by it; 0 for other models."""
    stop_ids: frozenset[int]
    max_tokens: int
    """The longest response of its run; for other models 64, or half the context."""
    device: torch.device

    def prompts(
        self, rows: Sequence[Row], data: DataSettings, max_tokens: int, seed: int = 0
    ) -> list[Prompt]:
        """Rows as this model reads them, with room for `max_tokens` of response."""
        room = room_for_prompts(self.model, max_tokens, data.max_prompt_tokens)
        return build_prompts(rows, data, self.tokenizer, max_prompt_tokens=room, seed=seed)

    def engine(self, sampling: Sampling, batch_size: int | None = None) -> HFEngine:
        return HFEngine(
            self.model, stop_ids=self.stop_ids, sampling=sampling, batch_size=batch_size
        )


def locate_model(source: str) -> ModelSource:
    """The model of a run (its folder), a causal LM by folder or hub name, or one with an adapter.

    An adapter is a folder or hub name of its own, whose config names its base, or stands behind its
    base as in `org/model+adapter`. Raises ConfigError for a run without a model, and for an adapter
    without a base.
    """
    folder = Path(source)
    if (folder / STATUS_FILE).is_file():
        return _run(folder, source)
    base, joined, adapter = source.partition("+")
    if joined and not folder.exists():
        return _joined(base, adapter, source)
    found = find_file(source, ADAPTER_FILE)
    if found is None:
        return ModelSource(name=source, base=source)
    own = json.loads(found.read_text(encoding="utf-8"))
    named = str(own.get("base_model_name_or_path") or "")
    if not named or (Path(named).is_absolute() and not Path(named).exists()):
        raise ConfigError(
            f"{source}: is a LoRA adapter, and its base {named or '(not named)'} is not there; "
            f"name the base as well: BASE+{source}"
        )
    return ModelSource(name=source, base=named, revision=own.get("revision"), adapter=source)


def _run(folder: Path, source: str) -> ModelSource:
    model = folder / MODEL_DIR
    if not model.is_dir():
        raise ConfigError(f"{source}: the run has no {MODEL_DIR}/ (see its {STATUS_FILE})")
    config = load_config(folder / CONFIG_FILE).config
    if not (model / ADAPTER_FILE).is_file():
        return ModelSource(name=source, base=str(model), config=config)
    policy = config.policy
    return ModelSource(
        name=source,
        base=policy.model,
        revision=policy.revision,
        adapter=str(model),
        config=config,
    )


def _joined(base: str, adapter: str, source: str) -> ModelSource:
    if not base or not adapter:
        raise ConfigError(f"{source}: write a model and its adapter as BASE+ADAPTER")
    inner = locate_model(base)
    if inner.adapter is not None:
        raise ConfigError(
            f"{source}: {base} has an adapter already ({inner.adapter}), and only one can be added "
            f"to a model; name its base, {inner.base}"
        )
    folder = Path(resolve(adapter))
    if (folder / STATUS_FILE).is_file():
        folder = folder / MODEL_DIR
        adapter = str(folder)
    if find_file(adapter, ADAPTER_FILE) is None:
        raise ConfigError(f"{source}: {adapter} is no LoRA adapter (it has no {ADAPTER_FILE})")
    return replace(inner, name=source, adapter=adapter)


def start_of(sources: Iterable[ModelSource]) -> ModelSource:
    """What the runs among these trained from: one start for all of them, or a ConfigError."""
    policies = [source.config.policy for source in sources if source.config is not None]
    starts = {
        (one.model, one.revision, one.adapter): ModelSource(
            name=START, base=one.model, revision=one.revision, adapter=one.adapter
        )
        for one in policies
    }
    if len(starts) != 1:
        found = " and ".join(" + ".join(filter(None, (p.base, p.adapter))) for p in starts.values())
        raise ConfigError(
            f"{START}: "
            + (f"the runs started from {found}" if found else "none of the others is a run folder")
            + "; name the model to compare with"
        )
    return next(iter(starts.values()))


def open_model(
    source: str | ModelSource,
    device: torch.device,
    *,
    dtype: Dtype = "float32",
    like: RunConfig | None = None,
) -> OpenModel:
    """Load a model; one without a run stops and reads prompts as in the run `like`.

    Raises ConfigError for a run without a model, PreflightError for what cannot be loaded.
    """
    source = locate_model(source) if isinstance(source, str) else source
    tokenizer = tokenizer_of(source)
    settings = PolicySettings(model=source.base, revision=source.revision, dtype=dtype)
    model = load_causal_lm(settings, device)
    if source.adapter is not None:
        model = with_adapter(model, source.adapter)
    model = model.to(device).eval()
    turn_dropout_off(model)
    data, data_seed, at_eos = UNNAMED, 0, True
    stops: tuple[str | int, ...] = ()
    max_tokens = min(MAX_TOKENS, (context_length(model) or 2 * MAX_TOKENS) // 2)
    if (config := source.config or like) is not None:
        data, data_seed, at_eos = config.data, config.seed, config.rollout.stop_at_eos
        stops = tuple(config.rollout.stop_tokens)
        max_tokens = longest(config.rollout.response_length)
    generation_config = getattr(model, "generation_config", None)
    return OpenModel(
        name=source.name,
        model=model,
        tokenizer=tokenizer,
        data=data,
        data_seed=data_seed,
        stop_ids=stop_token_ids(tokenizer, generation_config, at_eos=at_eos, extra=stops),
        max_tokens=max_tokens,
        device=device,
    )


def tokenizer_of(source: ModelSource) -> Tokenizer:
    """The adapter's own tokenizer if it was saved beside it, else the base's."""
    if source.adapter and find_file(source.adapter, "tokenizer_config.json") is not None:
        return load_tokenizer(source.adapter)
    return load_tokenizer(source.base, source.revision)
