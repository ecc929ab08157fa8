"""What models and functions are by their content: results of others are not taken for theirs."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from klippo import hub
from klippo.lab.reward_names import classifiers_in, digest_of
from klippo.rewards.function import load_function
from klippo.rewards.settings import FunctionSettings, RewardSettings, leaves
from klippo.runs.folder import CONFIG_FILE, MODEL_DIR, STATUS_FILE
from klippo.types import Prompt

_LENGTH = 12  # hex digits
_NUM_WEIGHTS = 64  # of each tensor
_CONTENT = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def of_files(files: Iterable[Path]) -> str:
    """A digest of the names and the content of files."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:_LENGTH]


def of_model(name: str, revision: str | None = None) -> str:
    """Of a run, a model folder, or a hub name with its revision."""
    folder = Path(hub.resolve(name))
    if (folder / STATUS_FILE).is_file():
        return of_files([*folder.glob(CONFIG_FILE), *_files(folder / MODEL_DIR)])
    return of_files(_files(folder)) if folder.is_dir() else f"{name}@{revision}"


def of_reward(settings: RewardSettings) -> str:
    """Of a reward's settings, its models and its functions' files."""
    parts = [digest_of(settings)]
    parts += [of_model(one.model, one.revision) for one in classifiers_in(settings)]
    for one in leaves(settings):
        if isinstance(one, FunctionSettings):
            try:
                source = inspect.getsourcefile(inspect.unwrap(load_function(one.function)))
            except TypeError:  # written in C
                source = None
            parts.append(one.function if source is None else of_files([Path(source)]))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:_LENGTH]


def of_weights(model: Any) -> str:
    """Of a model's frozen weights: their names, shapes, and a few numbers of each."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if not weight.requires_grad:
            flat = weight.detach().flatten()
            few = flat[:: max(len(flat) // _NUM_WEIGHTS, 1)].to("cpu", torch.float32, copy=True)
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(few.numpy().tobytes())  # NumPy must not hold the weight itself
    return digest.hexdigest()[:_LENGTH]


def of_prompts(prompts: Iterable[Prompt]) -> str:
    """Of prompts in their order, as token ids, with their other columns."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.token_ids, sorted(prompt.meta.items()))).encode())
    return digest.hexdigest()[:_LENGTH]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.suffix in _CONTENT and path.is_file()]
