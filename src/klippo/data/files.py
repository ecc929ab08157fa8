"""Reading one file of rows: JSON, JSONL, CSV or Parquet.

JSON is read here rather than by `datasets`, which turns text that looks like a date into a date,
refuses columns of mixed types, and does not say on which line a file is broken.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from klippo.errors import ConfigError, nearest

ENDINGS = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, and how to name it in messages."""

    number: int
    """Position in the data, from 0; it stays the same when rows before it are held out."""
    columns: Mapping[str, Any]
    """Every column; all rows of a source have the same ones, None if a row leaves one out."""
    line: int | None = None
    """Line in the file, from 1, if the format has lines."""
    source: str = "the data"
    """The file or data set that it comes from."""
    first: int = 0
    """Number of its source's first row."""
    index: int | None = None
    """Of one response of a row that has several."""

    def __str__(self) -> str:
        """`reviews.jsonl, row 3 (line 4)`."""
        line = "" if self.line is None else f" (line {self.line})"
        index = "" if self.index is None else f", response {self.index}"
        return f"{self.source}, row {self.number - self.first}{line}{index}"

    def unusable(self, column: str, needed: str, remedy: str) -> ConfigError:
        """The error for what a column holds."""
        value = shown(self.columns.get(column))
        return ConfigError(
            f"{self}: column {column!r} holds {value} where {needed} is needed; {remedy}"
        )

    def require(self, column: str, setting: str) -> None:
        """Raises ConfigError if the data has no such column; `setting` is what names it."""
        names = list(self.columns)
        if column not in names:
            near = nearest(column, names, cutoff=0.5)
            hint = f"did you mean {near!r}?" if near else f"set {setting} to one of them"
            raise ConfigError(
                f"{self.source}: there is no column {column!r}; the columns are "
                f"{', '.join(names)}: {hint}"
            )

    def prompt(self, columns: Sequence[str]) -> Any:
        """What one column holds; of several, their texts joined by line breaks, None for nothing.

        Raises ConfigError if one of several holds something other than text.
        """
        if len(columns) == 1:
            return self.columns.get(columns[0])
        for column in columns:
            if not isinstance(self.columns.get(column), str | None):
                remedy = "convert it to text, to join it with the other prompt columns"
                raise self.unusable(column, "text", remedy)
        return "\n".join(filter(None, map(self.columns.get, columns))) or None

    def prompt_key(self, columns: Sequence[str]) -> str:
        """Equal for rows with equal prompts."""
        return json.dumps(self.prompt(columns), default=str)


def source_of(rows: Sequence[Row]) -> str:
    """What to call the rows' sources in messages."""
    return ", ".join(dict.fromkeys(row.source for row in rows))


def shown(value: object, limit: int = 60) -> str:
    """A value and its type, short enough for a message."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:limit]!r}"


def is_chat(value: object) -> TypeGuard[list[dict[str, Any]]]:
    """Is it a list of chat messages?"""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) for m in value)


def finite_number(value: object) -> float | None:
    """A number, also one written as text; None if it is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def is_file_name(name: str) -> bool:
    """True for what a user means as a file rather than as the name of a hub data set."""
    path = Path(name).expanduser()
    return (
        path.is_file()
        or path.suffix.lower() in {*ENDINGS, ".txt", ".tsv", ".xlsx", ".gz", ".zip"}
        or (not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))))
    )


Numbered = list[tuple[int | None, dict[str, Any]]]
"""Lines and columns."""


def read_file(name: str, source: str | None = None) -> list[Row]:
    """All rows of a file, in its order; `source` is what messages call it.

    Raises ConfigError when the file is missing, its ending unknown, its content broken, or when it
    has no rows.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"{name}: there is no such file{_nearest_file(path)}")
    match path.suffix.lower():
        case ".json" | ".jsonl" as ending:
            numbered = _read_json(path, _text(path), by_line=ending == ".jsonl")
        case ".csv":
            numbered = _read_csv(path)
        case ".parquet":
            numbered = [(None, row) for row in _read_table(path, "parquet")]
        case ending:
            raise ConfigError(
                f"{name}: unknown file ending {ending!r}; rows are read from "
                f"{', '.join(ENDINGS)}: convert or rename the file"
            )
    if not numbered:
        raise ConfigError(f"{name}: the file has no rows; at least one prompt is needed")
    names = list(dict.fromkeys(column for _, columns in numbered for column in columns))
    return [
        Row(number, {name: columns.get(name) for name in names}, line, source or name)
        for number, (line, columns) in enumerate(numbered)
    ]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from None


def _read_json(path: Path, text: str, *, by_line: bool) -> Numbered:
    """Objects, one per line or in one list."""
    numbered: Numbered = []
    documents = list(enumerate(text.split("\n"), start=1)) if by_line else [(None, text)]
    for line, document in documents:
        if not document.strip():
            continue
        position = str(path) if line is None else f"{path}, line {line}"
        try:
            content = json.loads(document)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data" and not by_line:  # one object per line, named .json
                return _read_json(path, text, by_line=True)
            raise ConfigError(
                f"{path}, line {line or error.lineno}, column {error.colno}: broken JSON "
                f"({error.msg}); fix that line"
            ) from None
        except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
            raise ConfigError(f"{position}: JSON that cannot be read ({error}); fix it") from None
        if not by_line and not isinstance(content, list):
            held = shown(content, 40)
            if isinstance(content, dict):
                names = ", ".join(map(str, [*content][:12])) + ", ..." * (len(content) > 12)
                held = f"one object with the keys {names}"
            raise ConfigError(
                f"{path}: holds {held}; a list of objects is needed, [{{...}}, {{...}}], one per "
                "row"
            )
        for number, row in enumerate([content] if by_line else content):
            if not isinstance(row, dict):
                position = position if by_line else f"{path}, row {number}"
                raise ConfigError(
                    f'{position}: {shown(row, 40)} where an object is needed, {{"prompt": "..."}}'
                )
            numbered.append((line, row))
    return numbered


def _read_csv(path: Path) -> Numbered:
    text = _text(path)
    if not text.strip():
        return []
    rows = _read_table(path, "csv")
    reader = csv.reader(io.StringIO(text, newline=""))
    lines: list[int | None] = []  # on which each record starts; a quoted cell can span several
    start = 1
    for record in reader:
        if record:
            lines.append(start)
        start = reader.line_num + 1
    del lines[:1]  # the header
    return list(zip(lines if len(lines) == len(rows) else [None] * len(rows), rows, strict=True))


def _read_table(path: Path, kind: str) -> list[dict[str, Any]]:
    import pandas
    import pyarrow
    from pyarrow import parquet

    try:
        if kind == "parquet":
            table = parquet.ParquetFile(path).read()
        else:
            # Only an empty cell is missing: pandas would also take the texts "NA" and "None" away.
            frame = pandas.read_csv(path, keep_default_na=False, na_values=[""], low_memory=False)
            table = pyarrow.Table.from_pandas(frame, preserve_index=False)
        return list(table.to_pylist())
    except Exception as error:
        raise ConfigError(
            f"{path}: cannot be read as {kind}: {str(error).strip()}; fix the file"
        ) from error


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; nor is there a folder {folder}"
    files = [entry.name for entry in folder.iterdir() if entry.is_file()]
    near = nearest(path.name, files)
    return f"; did you mean {folder / near}?" if near else "; check the path"
