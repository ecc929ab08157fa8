"""A run's folder: what is in it, and writing there so that nothing is ever half there.

config.yaml       the resolved config
metrics.jsonl     one line per PPO step
eval/step-N.jsonl one line per evaluated sample
model/, critic/   the trained policy in Hugging Face format, its value head beside it
run_status.json   why the run ended
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from klippo.errors import ConfigError, StorageError
from klippo.types import Metrics

STATUS_FILE = "run_status.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
MODEL_DIR = "model"
CRITIC_DIR = "critic"


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def check(path: Path, *, overwrite: bool = False) -> bool:
        """True when a run stands there that may be removed.

        Raises ConfigError when something stands there that may not: only a folder that Klippo
        wrote (it has run_status.json), and only with `overwrite`.
        """
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        if taken and not overwrite:
            raise ConfigError(
                f"output_dir={path} exists already; choose another output_dir, "
                "or pass --overwrite to replace that run"
            )
        if taken and not (path / STATUS_FILE).is_file():
            raise ConfigError(
                f"output_dir={path} exists and is not a Klippo run (it has no {STATUS_FILE}), so "
                "--overwrite leaves it alone; choose another output_dir"
            )
        return taken

    @classmethod
    def create(cls, path: Path, *, overwrite: bool = False) -> RunFolder:
        """A fresh folder; a run that stands there already is an error, or removed on demand."""
        taken = cls.check(path, overwrite=overwrite)
        with writing(path):
            if taken:
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder.write_status("running")
        return folder

    def write_status(self, state: str, **details: Any) -> None:
        """state: running, done, failed or interrupted; details say why and what now."""
        write_text(self.path / STATUS_FILE, json.dumps({"state": state} | details, indent=2) + "\n")

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, on disk when this returns."""
        with writing(self.path / METRICS_FILE), (self.path / METRICS_FILE).open("a") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()

    def eval_file(self, step: int) -> Path:
        return self.path / "eval" / f"step-{step}.jsonl"

    def write_rows(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """The evaluation rows of one step."""
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_text(self.eval_file(step), "\n".join(lines) + "\n")

    @contextmanager
    def new_directory(self, name: str) -> Iterator[Path]:
        """A directory to fill, which takes its name only when it is whole."""
        final = self.path / name
        with writing(final):
            building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self.path))
            try:
                yield building
                building.chmod(0o755)
                if final.exists():
                    shutil.rmtree(final)
                building.replace(final)
            finally:
                shutil.rmtree(building, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write beside, sync, rename: a reader sees the old file or the new one, never a part."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into a StorageError that names the file and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise StorageError(
            f"cannot write {path}: {cause}; free some space or choose another output_dir "
            "(everything written before is whole)"
        ) from error


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a run's metrics.jsonl."""
    return read_rows(path / METRICS_FILE)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
