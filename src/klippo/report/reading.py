"""A run's folder as the report reads it: whole, still growing, or with parts missing.

Everything in it may come from a model or from another machine, so every line is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klippo.config.load import DEFAULT, load_config
from klippo.config.located import read_yaml
from klippo.errors import ConfigError
from klippo.evaluation.samples import SampleRow
from klippo.runs.folder import (
    CONFIG_FILE,
    DIAGNOSTICS_FILE,
    METRICS_FILE,
    STATUS_FILE,
    BrokenLineError,
)
from klippo.types import Metrics

STARTED_FILE = "started.json"
"""What is known when a run begins: its name, the time, versions, device, and who set what."""
BEST_OF_N_FILE = "best_of_n.json"
RECORDED = "recorded"
RUNNING = "running"
LARGEST = 1e100
"""Of the numbers that count: beyond it squares overflow."""
NUMBERS = ("proxy", "gold", "length", "kl_exact_nats")
NEEDED = ("prompt_id", "prompt", "response", "length", "proxy", "kl_exact_nats")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a run's folder holds."""

    path: Path
    label: str
    """The folder's name, or as much of its path as tells it from the other runs."""
    status: Mapping[str, Any]
    started: Mapping[str, Any]
    config: Mapping[str, Any]
    """Dotted key -> value, in the file's order; empty without a config."""
    origins: Mapping[str, str]
    metrics: Sequence[Metrics]
    evaluations: Mapping[int, Sequence[SampleRow]]
    best_of_n: Mapping[str, Any] | None = None
    diagnostics: Sequence[Metrics] = field(default=())
    """Of an offline run: a line at the start and one after each pass."""
    notes: Sequence[str] = field(default=())
    """What is missing, or was left out, in sentences."""

    @property
    def state(self) -> str:
        return str(self.status.get("state", "unknown"))

    @property
    def is_running(self) -> bool:
        return self.state == RUNNING

    @property
    def before(self) -> Sequence[SampleRow]:
        """The first evaluation; empty without one."""
        return self.evaluations[min(self.evaluations)] if self.evaluations else ()

    @property
    def after(self) -> Sequence[SampleRow]:
        """The last evaluation; empty where there is only the first."""
        return self.evaluations[max(self.evaluations)] if len(self.evaluations) > 1 else ()

    @property
    def has_gold(self) -> bool:
        return any(
            row.get("gold") is not None for rows in self.evaluations.values() for row in rows
        )


def read_runs(paths: Sequence[Path], best_of_n: Path | None = None) -> list[RunData]:
    """Every run, under labels that differ. Raises ConfigError for what cannot be read."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        twice = next(path for path in paths if resolved.count(path.resolve()) > 1)
        raise ConfigError(f"{twice}: given twice; name each run once")
    labels = _labels(resolved)
    return [read_run(path, label, best_of_n) for path, label in zip(paths, labels, strict=True)]


def read_run(path: Path, label: str | None = None, best_of_n: Path | None = None) -> RunData:
    """One run. Raises ConfigError that names the file and line of what cannot be read."""
    if not (path / STATUS_FILE).is_file():
        raise ConfigError(f"{path}: not a run folder (it has no {STATUS_FILE})")
    notes: list[str] = []
    status = _read_object(path / STATUS_FILE)
    still = status.get("state") == RUNNING
    started = _read_object(path / STARTED_FILE) if (path / STARTED_FILE).is_file() else {}
    config, origins = _read_config(path / CONFIG_FILE, started.get("origins"), notes)
    metrics_file = path / METRICS_FILE
    metrics = _read_metrics(metrics_file, still, notes) if metrics_file.is_file() else []
    diagnostics_file = path / DIAGNOSTICS_FILE
    diagnostics: list[Metrics] = []
    if diagnostics_file.is_file():
        diagnostics = _read_metrics(diagnostics_file, still, notes)
        for _, row in read_lines(diagnostics_file, still):
            notes += [str(warning) for warning in row.get("warnings") or []]
    evaluations = {
        step: read_samples(file, still, notes) for step, file in sorted(_eval_files(path).items())
    }
    return RunData(
        path=path,
        label=label or path.resolve().name,
        status=status,
        started=started,
        config=config,
        origins=origins,
        metrics=metrics,
        evaluations={step: rows for step, rows in evaluations.items() if rows},
        diagnostics=diagnostics,
        best_of_n=_read_best_of_n(best_of_n or path / BEST_OF_N_FILE, best_of_n is not None),
        notes=notes,
    )


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _eval_files(path: Path) -> dict[int, Path]:
    files = {}
    for file in (path / "eval").glob("step-*.jsonl"):
        number = file.stem.removeprefix("step-")
        if not number.isdigit():
            raise ConfigError(f"{file}: a file of evaluated samples is called step-N.jsonl")
        files[int(number)] = file
    return files


def read_lines(
    path: Path, still_written: bool = False, notes: list[str] | None = None
) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSON-lines file.

    A last line without its end is left out, with a note, where the file is still being written.
    Raises ConfigError that names the line for anything else that is broken.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    # Not splitlines: a response may hold characters that it takes for the end of a line.
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
            if not isinstance(value, dict):
                raise ValueError(f"it holds {type(value).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            if still_written and number == len(lines):
                if notes is not None:
                    notes.append(f"The last line of {path.name} is not whole yet and was left out.")
                continue
            raise BrokenLineError(
                path, number, f"cut or broken ({_short(error)})", is_last=number == len(lines)
            ) from None
        rows.append((number, value))
    return rows


def read_samples(
    path: Path, still_written: bool = False, notes: list[str] | None = None
) -> list[SampleRow]:
    """The rows of an eval/step-N.jsonl, checked; a number beyond LARGEST becomes None."""
    rows = []
    num_strange = 0
    for number, row in read_lines(path, still_written, notes):
        missing = [key for key in NEEDED if key not in row]
        if missing:
            raise ConfigError(f"{path}, line {number}: no {', '.join(missing)} in this sample")
        for key in ("prompt", "response"):
            if not isinstance(row[key], str):
                raise ConfigError(f"{path}, line {number}: {key} is not text")
        if not isinstance(row["prompt_id"], int):
            raise ConfigError(f"{path}, line {number}: prompt_id is not a whole number")
        parts = row.get("parts")
        row["parts"] = {
            name: part
            for name, part in (parts.items() if isinstance(parts, dict) else ())
            if isinstance(part, int | float) and -LARGEST < part < LARGEST
        }
        for key in NUMBERS:
            value = row.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                told = f"{key}={str(value)[:40]!r}"
                raise ConfigError(f"{path}, line {number}: {told} is not a number")
            if not -LARGEST < value < LARGEST:
                row[key] = None
                num_strange += 1
        rows.append(row)
    if num_strange and notes is not None:
        notes.append(
            f"{path.name}: {num_strange} values that are no usable numbers count as missing."
        )
    return rows


def _read_metrics(path: Path, still: bool, notes: list[str]) -> list[Metrics]:
    rows = []
    for number, row in read_lines(path, still, notes):
        if not isinstance(row.get("step"), int):
            raise ConfigError(f"{path}, line {number}: no step in this line")
        rows.append(
            {
                key: float("nan") if value is None else value
                for key, value in row.items()
                if value is None
                or (isinstance(value, int | float) and (value != value or abs(value) < LARGEST))
            }
        )
    return rows


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({_short(error)})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def _read_config(
    path: Path, origins: Any, notes: list[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and origins; without recorded origins, which values are defaults of this version."""
    if not path.is_file():
        notes.append("There is no config.yaml.")
        return {}, {}
    known = origins if isinstance(origins, dict) else {}
    try:
        config = load_config(path).config
    except ConfigError:
        notes.append("config.yaml is not valid in this version of Klippo; it is shown as it is.")
        tree, _ = read_yaml(path.read_text(encoding="utf-8", errors="replace"), str)
        values = _flat(tree.plain())
        return values, {key: str(known.get(key, RECORDED)) for key in values}
    values = _flat(config.model_dump(mode="json"))
    chosen = _flat(config.model_dump(mode="json", exclude_defaults=True))
    plain = {key: RECORDED if key in chosen else DEFAULT for key in values}
    return values, {key: str(known.get(key, origin)) for key, origin in plain.items()}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            key: item
            for name, part in value.items()
            for key, item in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: value} if prefix else {}


def _read_best_of_n(path: Path, asked: bool) -> dict[str, Any] | None:
    path = path / BEST_OF_N_FILE if path.is_dir() else path
    if not path.is_file():
        if asked:
            raise ConfigError(f"{path}: no such file; `klippo best-of-n` writes it")
        return None
    result = _read_object(path)
    try:
        length = len(result["ns"])
        arms = result["arms"].values()
        curves = [arm[key] for arm in arms for key in ("proxy", "gold") if arm.get(key)]
        right = len(result["kl_bound"]) == length > 0 and all(len(c) == length for c in curves)
        for point in (point for curve in curves for point in curve):
            for part in ("mean", "low", "high"):
                point[part] = float("nan") if point[part] is None else float(point[part])
        for number in (*result["ns"], *result["kl_bound"]):
            right = right and bool(number >= 0)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}: not a best-of-n result ({_short(error)})") from None
    if not right:
        raise ConfigError(f"{path}: not a best-of-n result (its lists differ in length)")
    return result


def _short(error: Exception) -> str:
    text = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return text.splitlines()[0][:120]
