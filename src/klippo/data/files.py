"""Reading one file of rows: JSON, JSONL, CSV or Parquet.

JSON is read here rather than by `datasets`, which turns text that looks like a date into a date,
refuses columns of mixed types, and does not say on which line a file is broken.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klippo.errors import ConfigError

ENDINGS = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, with the place where a user finds it again."""

    number: int
    """Position in the data, from 0; it stays the same when rows before it are held out."""
    columns: Mapping[str, Any]
    """Every column; all rows of a source have the same ones, None where a row leaves one out."""
    line: int | None = None
    """Line in the file, from 1, where the format has lines."""
    source: str | None = None
    """Name of its source, where the data has several."""
    first: int = 0
    """Number of its source's first row."""

    def place(self, source: str) -> str:
        """`reviews.jsonl, row 3 (line 4)`, for messages; `source` names the only source."""
        return f"{self.source or source}, row {self.number - self.first}" + (
            "" if self.line is None else f" (line {self.line})"
        )

    def prompt(self, columns: Sequence[str]) -> Any:
        """What one column holds; of several, their texts joined by line breaks, None for nothing.

        Raises ConfigError where one of several holds something other than text.
        """
        if len(columns) == 1:
            return self.columns.get(columns[0])
        texts = [(name, self.columns.get(name)) for name in columns]
        for name, value in texts:
            if not isinstance(value, str | None):
                raise ConfigError(
                    f"{self.place('the data')}: column {name!r} holds {_kind(value)} where text is "
                    "needed, to join it with the other prompt columns; convert it to text"
                )
        return "\n".join(text for _, text in texts if text) or None


def require_column(column: str, columns: Iterable[str], setting: str, source: str) -> None:
    """Raises ConfigError where the data has no such column; `setting` is what names it."""
    names = list(columns)
    if column in names:
        return
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"set {setting} to one of them"
    raise ConfigError(
        f"{source}: there is no column {column!r}; the columns are {', '.join(names)}: {hint}"
    )


def is_file_name(name: str) -> bool:
    """True for what a user means as a file rather than as the name of a hub data set."""
    path = Path(name).expanduser()
    return (
        path.is_file()
        or path.suffix.lower() in {*ENDINGS, ".txt", ".tsv", ".xlsx", ".gz", ".zip"}
        or (not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))))
    )


def read_file(name: str) -> list[Row]:
    """All rows of a file, in its order.

    Raises ConfigError when the file is missing, its ending unknown, its content broken, or when it
    has no rows.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"{name}: there is no such file{_nearest_file(path)}")
    match path.suffix.lower():
        case ".json":
            numbered = _read_json(path)
        case ".jsonl":
            numbered = _read_json_lines(path, _text(path))
        case ".csv":
            numbered = _read_csv(path)
        case ".parquet":
            numbered = [(None, row) for row in _read_with_datasets(path, "parquet")]
        case ending:
            raise ConfigError(
                f"{name}: unknown file ending {ending!r}; rows are read from "
                f"{', '.join(ENDINGS)}: convert or rename the file"
            )
    if not numbered:
        raise ConfigError(f"{name}: the file has no rows; at least one prompt is needed")
    names = list(dict.fromkeys(column for _, columns in numbered for column in columns))
    return [
        Row(number, {name: columns.get(name) for name in names}, line)
        for number, (line, columns) in enumerate(numbered)
    ]


Numbered = list[tuple[int | None, dict[str, Any]]]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from None


def _read_json(path: Path) -> Numbered:
    text = _text(path)
    if not text.strip():
        return []
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line, under the name .json
            return _read_json_lines(path, text)
        raise _broken_json(path, error.lineno, error) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable_json(str(path), error) from None
    if isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds one object with the keys {_listed(content)}; a list of objects is "
            "needed, [{...}, {...}], one per row"
        )
    if not isinstance(content, list):
        raise ConfigError(f"{path}: holds {_kind(content)}; a list of objects is needed")
    return [(None, _object(path, f"row {i}", row)) for i, row in enumerate(content)]


def _read_json_lines(path: Path, text: str) -> Numbered:
    numbered: Numbered = []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise _broken_json(path, line, error) from None
        except (ValueError, RecursionError) as error:
            raise _unreadable_json(f"{path}, line {line}", error) from None
        numbered.append((line, _object(path, f"line {line}", row)))
    return numbered


def _read_csv(path: Path) -> Numbered:
    text = _text(path)
    if not text.strip():
        return []
    # Only an empty cell is missing: pandas would also take the prompts "NA" and "None" away.
    rows = _read_with_datasets(path, "csv", keep_default_na=False, na_values=[""])
    lines: Sequence[int | None] = _csv_lines(text)
    if len(lines) != len(rows):
        lines = [None] * len(rows)
    return list(zip(lines, rows, strict=True))


def _csv_lines(text: str) -> list[int]:
    """The line on which each record after the header starts; a quoted cell can span several."""
    reader = csv.reader(io.StringIO(text, newline=""))
    starts, start = [], 1
    for record in reader:
        if record:
            starts.append(start)
        start = reader.line_num + 1
    return starts[1:]


def _read_with_datasets(path: Path, builder: str, **options: Any) -> list[dict[str, Any]]:
    import datasets

    with tempfile.TemporaryDirectory() as cache, quiet(datasets):
        try:
            table = datasets.load_dataset(
                builder,
                data_files=str(path),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
            return list(table.to_list())
        except Exception as error:
            if "corresponds to no data" in str(error):
                return []
            cause = str(error.__cause__ or error).strip()
            raise ConfigError(f"{path}: cannot be read as {builder}: {cause}; mend the file") from (
                error
            )


class quiet:
    """No progress bars of `datasets` inside; they would come between the run's own lines."""

    def __init__(self, datasets: Any) -> None:
        self._datasets = datasets
        self._shown = not datasets.are_progress_bars_disabled()

    def __enter__(self) -> None:
        self._datasets.disable_progress_bars()

    def __exit__(self, *error: object) -> None:
        if self._shown:
            self._datasets.enable_progress_bars()


def _object(path: Path, where: str, row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(
            f'{path}, {where}: {_kind(row)} where an object is needed, {{"prompt": "..."}}'
        )
    return row


def _broken_json(path: Path, line: int, error: json.JSONDecodeError) -> ConfigError:
    return ConfigError(
        f"{path}, line {line}, column {error.colno}: broken JSON ({error.msg}); mend that line"
    )


def _unreadable_json(where: str, error: Exception) -> ConfigError:
    """A number with thousands of digits, or brackets in thousands of brackets."""
    return ConfigError(f"{where}: JSON that cannot be read ({error}); mend it")


def _kind(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _listed(names: Iterable[object], limit: int = 12) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; nor is there a folder {folder}"
    there = [entry.name for entry in folder.iterdir() if entry.is_file()]
    near = difflib.get_close_matches(path.name, there, n=1)
    return f"; did you mean {folder / near[0]}?" if near else "; check the path"
