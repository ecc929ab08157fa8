"""Read a run's folder for its report: finished, still growing, or with files missing.

Everything in it may come from a model or from another machine, so every line is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    NonNegativeFloat,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from klippo.config.load import DEFAULT, load_config
from klippo.config.located import read_yaml
from klippo.errors import ConfigError
from klippo.evaluation.samples import SampleRow
from klippo.runs.folder import (
    CONFIG_FILE,
    DIAGNOSTICS_FILE,
    EVAL_DIR,
    METRICS_FILE,
    STATUS_FILE,
    BrokenLineError,
    numbered_rows,
    read_object,
)
from klippo.types import Metrics

STARTED_FILE = "started.json"
"""What is known when a run begins: its name, the time, versions, device, and who set what."""
BEST_OF_N_FILE = "best_of_n.json"
RECORDED = "recorded"
RUNNING = "running"
LARGEST = 1e100
"""Largest number that counts: beyond it squares overflow."""
NUMBERS = ("proxy", "gold", "length", "kl_exact_nats")
NEEDED = ("prompt_id", "prompt", "response", "length", "proxy", "kl_exact_nats")

Object = Mapping[str, Any]
"""A JSON object that nobody has checked."""
Number = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]


class Point(BaseModel):
    """A mean with its interval; NaN if unknown."""

    mean: Number
    low: Number
    high: Number


class Arm(BaseModel):
    """One way of picking the best of n samples."""

    proxy: list[Point] = []
    gold: list[Point] = []


class BestOfN(BaseModel):
    """What the report needs of a best_of_n.json."""

    ns: list[NonNegativeInt]
    kl_bound: list[NonNegativeFloat]
    arms: dict[str, Arm]
    num_samples: int | None = None
    num_prompts: int | None = None
    policy: str | None = None
    gold: str | None = None

    def curves(self, key: str) -> dict[str, dict[int, Point]]:
        """Arm -> n -> `proxy` or `gold`, for the arms that have it."""
        points = {name: getattr(arm, key) for name, arm in self.arms.items()}
        return {name: dict(zip(self.ns, arm, strict=True)) for name, arm in points.items() if arm}

    @model_validator(mode="after")
    def check_lengths(self) -> Self:
        curves = [curve for arm in self.arms.values() for curve in (arm.proxy, arm.gold) if curve]
        if not self.ns or {*map(len, curves), len(self.kl_bound)} != {len(self.ns)}:
            raise ValueError("its lists differ in length, or are empty")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a run's folder holds."""

    path: Path
    label: str
    """The folder's name, or the shortest end of its path that differs from the other runs'."""
    status: Object
    started: Object
    config: Object
    """Dotted key -> value, in the file's order; empty without a config."""
    origins: Mapping[str, str]
    metrics: Sequence[Metrics]
    evaluations: Mapping[int, Sequence[SampleRow]]
    best_of_n: BestOfN | None = None
    diagnostics: Sequence[Metrics] = field(default=())
    """Of an offline run: a line at the start and one after each pass."""
    notes: Sequence[str] = field(default=())
    """What is missing or was left out, in sentences."""

    @property
    def state(self) -> str:
        return str(self.status.get("state", "unknown"))

    @property
    def is_offline(self) -> bool:
        return any(key.startswith("offline.") for key in self.config)

    @property
    def before(self) -> Sequence[SampleRow]:
        """The first evaluation; empty without one."""
        return self.evaluations[min(self.evaluations)] if self.evaluations else ()

    @property
    def after(self) -> Sequence[SampleRow]:
        """The last evaluation; empty if there is only the first."""
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
    labels = [path.name for path in resolved]
    depth = 1
    while len(set(labels)) < len(labels):
        depth += 1
        labels = ["/".join(path.parts[-depth:]) for path in resolved]
    return [read_run(path, label, best_of_n) for path, label in zip(paths, labels, strict=True)]


def read_run(path: Path, label: str | None = None, best_of_n: Path | None = None) -> RunData:
    """One run. Raises ConfigError that names the file and line of what cannot be read."""
    if not (path / STATUS_FILE).is_file():
        raise ConfigError(f"{path}: not a run folder (it has no {STATUS_FILE})")
    status = read_object(path / STATUS_FILE)
    started = read_object(path / STARTED_FILE) if (path / STARTED_FILE).is_file() else {}
    notes: list[str] = []
    config, origins = _read_config(path / CONFIG_FILE, started.get("origins"), notes)
    lines = _LineReader(is_growing=status.get("state") == RUNNING, notes=notes)
    metrics = lines.metrics(path / METRICS_FILE)
    diagnostics = lines.metrics(path / DIAGNOSTICS_FILE)
    evaluations = {step: lines.samples(file) for step, file in _eval_files(path)}
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


def _eval_files(path: Path) -> list[tuple[int, Path]]:
    files = []
    for file in (path / EVAL_DIR).glob("step-*.jsonl"):
        number = file.stem.removeprefix("step-")
        if not number.isdecimal():
            raise ConfigError(f"{file}: a file of evaluated samples is called step-N.jsonl")
        files.append((int(number), file))
    return sorted(files)


@dataclass(frozen=True, slots=True, kw_only=True)
class _LineReader:
    """Reads the JSON-lines files of one run; what it leaves out goes into `notes`."""

    is_growing: bool
    notes: list[str]

    def rows(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """A last line that is still being written is left out."""
        try:
            yield from numbered_rows(path)
        except BrokenLineError as error:
            if not (self.is_growing and error.is_last):
                raise
            self.notes.append(f"The last line of {path.name} is not complete yet; it was left out.")

    def metrics(self, path: Path) -> list[Metrics]:
        """Numbers by name and step; null is NaN, and what is no usable number is left out."""
        found = []
        for line, row in self.rows(path) if path.is_file() else ():
            if not isinstance(row.get("step"), int):
                raise ConfigError(f"{path}, line {line}: no step in this line")
            values = {key: float("nan") if value is None else value for key, value in row.items()}
            found.append({key: value for key, value in values.items() if _is_usable(value)})
            self.notes.extend(map(str, row.get("warnings") or []))
        return found

    def samples(self, path: Path) -> list[SampleRow]:
        """The rows of an eval/step-N.jsonl; a number beyond LARGEST becomes None."""
        rows = []
        num_unusable = 0
        for line, row in self.rows(path):
            if problem := _problem(row):
                raise ConfigError(f"{path}, line {line}: {problem}")
            parts = row.get("parts")
            row["parts"] = {
                name: part
                for name, part in (parts.items() if isinstance(parts, dict) else ())
                if _is_usable(part) and part == part
            }
            for key in NUMBERS:
                if row.get(key) is not None and not -LARGEST < row[key] < LARGEST:
                    row[key] = None
                    num_unusable += 1
            rows.append(row)
        if num_unusable:
            self.notes.append(
                f"{path.name}: {num_unusable} values are not usable numbers and count as missing."
            )
        return rows


def _is_usable(value: object) -> bool:
    """A number below LARGEST, or NaN."""
    return isinstance(value, int | float) and not abs(value) >= LARGEST


def _problem(row: Object) -> str | None:
    """What is wrong with a sample."""
    if missing := [key for key in NEEDED if key not in row]:
        return f"no {', '.join(missing)} in this sample"
    for key in ("prompt", "response"):
        if not isinstance(row[key], str):
            return f"{key} is not text"
    if not isinstance(row["prompt_id"], int):
        return "prompt_id is not a whole number"
    for key in NUMBERS:
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            return f"{key}={str(value)[:40]!r} is not a number"
    return None


def _read_config(
    path: Path, origins: object, notes: list[str]
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
        values = chosen = _flat(tree.plain())
    else:
        values = _flat(config.model_dump(mode="json"))
        chosen = _flat(config.model_dump(mode="json", exclude_defaults=True))
    assumed = {key: RECORDED if key in chosen else DEFAULT for key in values}
    return values, {key: str(known.get(key, origin)) for key, origin in assumed.items()}


def _flat(value: object, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            key: item
            for name, inner in value.items()
            for key, item in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: value} if prefix else {}


def _read_best_of_n(path: Path, is_asked_for: bool) -> BestOfN | None:
    path = path / BEST_OF_N_FILE if path.is_dir() else path
    if not path.is_file():
        if is_asked_for:
            raise ConfigError(f"{path}: no such file; `klippo best-of-n` writes it")
        return None
    try:
        return BestOfN.model_validate(read_object(path))
    except ValidationError as error:
        problem = f"{'.'.join(map(str, error.errors()[0]['loc']))} {error.errors()[0]['msg']}"
        raise ConfigError(f"{path}: not a best-of-n result ({problem.strip()})") from None
