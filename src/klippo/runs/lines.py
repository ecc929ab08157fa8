"""JSON-lines files that only grow: what a killed program wrote stays, but for a cut last line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from klippo.runs.folder import writing

_BLOCK = 2**20  # bytes


def append_lines(path: Path, values: Iterable[Any]) -> None:
    """One JSON line per value, on disk when this returns."""
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def whole_lines(path: Path) -> int:
    """How many whole lines the file has; the rest of a cut one is removed. 0 without a file."""
    if not path.is_file():
        return 0
    number = end = place = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            number += block.count(b"\n")
            last = block.rfind(b"\n")
            end = place + last + 1 if last >= 0 else end
            place += len(block)
    if end < place:
        with writing(path):
            os.truncate(path, end)
    return number
