"""Checkpoints of a run: complete or absent, and checked before use.

checkpoints/step-00000120/
  state.json             counters, random states, the config and what it was written for
  NAME.safetensors       tensors by name: weights, optimizer
  manifest.json          size and SHA-256 of each of these
checkpoints/suspect-*    set aside: a health check stopped the run at what this policy wrote
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from klippo.errors import ConfigError
from klippo.runs.folder import RunFolder, read_object, sync, writing

CHECKPOINTS_DIR = "checkpoints"
FORMAT = 1
_STATE, _MANIFEST, _PREFIX, _ASIDE = "state.json", "manifest.json", "step-", "suspect-"


class BrokenCheckpointError(ConfigError):
    """A checkpoint that is not as it was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files are as they were written."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """PPO steps that were done when it was written."""
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file by name, on the CPU."""
        from safetensors.torch import load_file

        file = self.path / f"{name}.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise BrokenCheckpointError(f"{file} cannot be read ({error})") from error


class Checkpoints:
    """Those of one run folder."""

    def __init__(self, run: Path) -> None:
        self.path = run / CHECKPOINTS_DIR

    def write(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> Path:
        """Write one beside, synced, then rename it; `state` is JSON. Raises StorageError."""
        from safetensors.torch import save_file

        with writing(self.path):
            self.path.mkdir(exist_ok=True)
        name = f"{_PREFIX}{step:08}"
        with RunFolder(self.path).new_directory(name) as building:
            for part, values in tensors.items():
                whole = {key: value.detach().contiguous() for key, value in values.items()}
                save_file(whole, building / f"{part}.safetensors")
            facts = {"format": FORMAT, "step": step, "files": sorted(tensors)} | dict(state)
            (building / _STATE).write_text(json.dumps(facts) + "\n")
            files = {file.name: _described(file) for file in sorted(building.iterdir())}
            (building / _MANIFEST).write_text(json.dumps(files, indent=2) + "\n")
            for file in building.iterdir():
                sync(file)
            sync(building)
        sync(self.path)
        return self.path / name

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep`."""
        for path in self._paths()[keep:]:
            with writing(path):
                shutil.rmtree(path)

    def set_aside(self, step: int) -> None:
        """Rename those of this step and later, so that no run resumes from them."""
        for path in self._paths():
            if _step_of(path) >= step:
                aside = path.with_name(f"{_ASIDE}{path.name}")
                with writing(aside):
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)

    def newest_step(self) -> int | None:
        """The step of the newest one, intact or not."""
        return next(map(_step_of, self._paths()), None)

    def remove(self) -> None:
        """Remove them all."""
        with writing(self.path):
            shutil.rmtree(self.path, ignore_errors=True)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest intact one, and what is wrong with those that are newer."""
        problems: list[str] = []
        for path in self._paths():
            try:
                return read_checkpoint(path), problems
            except BrokenCheckpointError as error:
                problems.append(str(error))
        return None, problems

    def _paths(self) -> list[Path]:
        """Newest first."""
        names = self.path.glob(f"{_PREFIX}*") if self.path.is_dir() else []
        numbered = [path for path in names if path.name.removeprefix(_PREFIX).isdecimal()]
        return sorted(numbered, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, after every file of it was compared with the manifest.

    Raises BrokenCheckpointError that names the file.
    """
    manifest = _json(path / _MANIFEST)
    for name, expected in manifest.items():
        file = path / Path(name).name
        if not file.is_file():
            raise BrokenCheckpointError(f"{file} is missing")
        found = _described(file)
        if found != expected:
            size = expected.get("bytes") if isinstance(expected, dict) else None
            what = "size" if found["bytes"] != size else "content"
            raise BrokenCheckpointError(f"{file} is damaged: its {what} is not what was written")
    if _STATE not in manifest:
        raise BrokenCheckpointError(f"{path / _MANIFEST} does not name {_STATE}")
    state = _json(path / _STATE)
    if state.get("format") != FORMAT:
        raise BrokenCheckpointError(
            f"{path / _STATE}: format {state.get('format')} is not {FORMAT}, which this version of "
            "Klippo writes and reads"
        )
    if not isinstance(state.get("step"), int) or not isinstance(state.get("files"), list):
        raise BrokenCheckpointError(f"{path / _STATE} does not name its step and its files")
    for name in state["files"]:
        if f"{name}.safetensors" not in manifest:
            raise BrokenCheckpointError(f"{path / name}.safetensors is missing from the manifest")
    return Checkpoint(path=path, state=state)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise BrokenCheckpointError(f"{file} is missing")
    try:
        return read_object(file)
    except ConfigError as error:
        raise BrokenCheckpointError(f"{file} cannot be read ({error})") from error


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
