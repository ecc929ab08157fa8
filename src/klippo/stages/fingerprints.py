"""What models and functions are by their content: results of others are not taken for theirs."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path

from klippo import hub
from klippo.rewards.loading import load_function
from klippo.rewards.settings import RewardSettings
from klippo.runs.folder import CONFIG_FILE, MODEL_DIR, STATUS_FILE
from klippo.stages.reward_names import classifiers_in, digest_of, functions_in

_LENGTH = 12  # hex digits
_CONTENT = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def of_files(files: Iterable[Path]) -> str:
    """A digest of the names and the content of files."""
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(path.name.encode())
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:_LENGTH]


def of_model(name: str, revision: str | None = None) -> str:
    """Of a run, a model folder, or a hub name with its revision."""
    folder = Path(hub.resolve(name))
    if (folder / STATUS_FILE).is_file():
        config = [file for file in [folder / CONFIG_FILE] if file.is_file()]
        return of_files([*config, *_files(folder / MODEL_DIR)])
    return of_files(_files(folder)) if folder.is_dir() else f"{name}@{revision}"


def of_reward(settings: RewardSettings) -> str:
    """Of a reward's settings, its models and its functions' files."""
    parts = [digest_of(settings)]
    parts += [of_model(one.model, one.revision) for one in classifiers_in(settings)]
    for name in functions_in(settings):
        try:
            source = inspect.getsourcefile(inspect.unwrap(load_function(name)))
        except TypeError:  # written in C
            source = None
        parts.append(name if source is None else of_files([Path(source)]))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:_LENGTH]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.suffix in _CONTENT and path.is_file()]
