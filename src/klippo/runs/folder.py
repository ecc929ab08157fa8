"""A run's folder: what is in it, and how to write so that no file is ever incomplete.

config.yaml       the resolved config
metrics.jsonl     one line per PPO step
eval/step-N.jsonl one line per evaluated sample
checkpoints/      what an unfinished run resumes from
model/, critic/   the trained policy in Hugging Face format, its value head beside it
run_status.json   why the run ended
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from klippo.errors import ConfigError, StorageError

STATUS_FILE = "run_status.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
DIAGNOSTICS_FILE = "diagnostics.jsonl"
EVAL_DIR = "eval"
MODEL_DIR = "model"
CRITIC_DIR = "critic"


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def check(path: Path, *, overwrite: bool = False) -> bool:
        """Whether a run exists that may be removed.

        Raises ConfigError if something exists that may not: only a folder that Klippo
        wrote (it has run_status.json), and only with `overwrite`.
        """
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        if taken and not overwrite:
            raise ConfigError(
                f"output_dir={path} exists already; choose another output_dir, "
                "or pass --overwrite to replace that run"
            )
        if taken and path.is_symlink():
            raise ConfigError(
                f"output_dir={path} is a link to {path.resolve()}, and --overwrite follows no "
                "link; name that folder itself, or remove the link"
            )
        if taken and not (path / STATUS_FILE).is_file():
            raise ConfigError(
                f"output_dir={path} exists and is not a Klippo run (it has no {STATUS_FILE}), so "
                "--overwrite leaves it alone; choose another output_dir"
            )
        return taken

    @classmethod
    def create(cls, path: Path, *, overwrite: bool = False) -> RunFolder:
        """A fresh folder; an existing run is an error, or removed on demand."""
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
        """One line of metrics.jsonl; `rewind.sync_lines` makes it survive the loss of power."""
        append_lines(self.path / METRICS_FILE, [metrics], synced=False)

    def append_diagnostics(self, diagnostics: Mapping[str, Any]) -> None:
        """One line of diagnostics.jsonl, of an offline run."""
        append_lines(self.path / DIAGNOSTICS_FILE, [diagnostics], synced=False)

    def write_rows(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """The evaluation rows of one step."""
        write_rows(self.path / EVAL_DIR / f"step-{step}.jsonl", rows)

    @contextmanager
    def new_directory(self, name: str) -> Iterator[Path]:
        """A directory to fill, which takes its name only when it is complete."""
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


def append_lines(path: Path, values: Iterable[Any], *, synced: bool = True) -> None:
    """One JSON line per value: all of them, or none if the disk is full. Raises StorageError."""
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                rest = memoryview(text.encode())
                while rest:
                    rest = rest[file.write(rest) :]
                if synced:
                    os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise


def complete_lines(path: Path) -> int:
    """Number of complete lines; the rest of a cut one is removed. 0 without a file."""
    if not path.is_file():
        return 0
    number = end = size = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            number += block.count(b"\n")
            last = block.rfind(b"\n")
            end = size + last + 1 if last >= 0 else end
            size += len(block)
    if end < size:
        with writing(path):
            os.truncate(path, end)
    return number


def sync(path: Path) -> None:
    """A file, or a folder's list of names, survives the loss of power from now on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write beside, sync, rename: a reader sees the old file or the new one, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """`write_text` of bytes."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSON-lines file, whole."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(path, "\n".join(lines) + "\n")


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


def evaluation_files(path: Path) -> dict[int, Path]:
    """The evaluations of a run, given its folder or its eval/, by step.

    Raises ConfigError if there are none.
    """
    folder = path / EVAL_DIR if (path / EVAL_DIR).is_dir() else path
    files = {
        int(file.stem.removeprefix("step-")): file
        for file in folder.glob("step-*.jsonl")
        if file.stem.removeprefix("step-").isdecimal()
    }
    if not files:
        why = "has no evaluations (step-N.jsonl)" if folder.is_dir() else "is not a folder"
        raise ConfigError(
            f"{folder}: {why}; give a run's folder, or its {EVAL_DIR}/ (runs with "
            "evaluation.num_prompts=0 have none)"
        )
    return dict(sorted(files.items()))


class BrokenLineError(ConfigError):
    """A line of a JSON-lines file that is no JSON object."""

    def __init__(self, path: Path, line: int, problem: str, *, is_last: bool = False) -> None:
        remedy = (
            "the file was cut while it was written; remove that line, the rows before it are whole"
            if is_last
            else "fix or remove that line"
        )
        super().__init__(f"{path}, line {line}: {problem}; {remedy}")
        self.line = line
        self.is_last = is_last
        """Whether it is the last line and its end is missing."""


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not empty.

    Raises ConfigError for a file that cannot be read, BrokenLineError for what is no object.
    """
    try:
        file = path.open("rb")  # as text, more characters than \n would end a line
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError):
                is_last = not line.endswith(b"\n")
                raise BrokenLineError(path, number, "broken JSON", is_last=is_last) from None
            if not isinstance(row, dict):
                raise BrokenLineError(path, number, "no JSON object")
            yield number, row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file. Raises what `numbered_rows` does."""
    return [row for _, row in numbered_rows(path)]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError."""
    try:
        value = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({str(error)[:120]})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__}, not an object")
    return value
