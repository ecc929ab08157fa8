"""The run folder: files are whole or not there, and failures name the file."""

import json
from pathlib import Path

import pytest

from klippo.errors import StorageError
from klippo.runs.folder import (
    RunFolder,
    append_lines,
    complete_lines,
    read_rows,
    write_rows,
    write_text,
)


def test_a_full_disk_stops_the_metrics_with_an_error_that_names_the_file(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    (folder.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl: No space left"):
        folder.append_metrics({"step": 0})


def test_metrics_lines_written_before_a_failure_stay_whole(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.append_metrics({"step": 0})

    def fill() -> None:
        with folder.new_directory("model") as building:
            (building / "part").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError):
        fill()
    assert read_rows(folder.path / "metrics.jsonl") == [{"step": 0}]
    assert sorted(p.name for p in folder.path.iterdir()) == ["metrics.jsonl", "run_status.json"]


def test_a_failed_rewrite_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_takes_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with folder.new_directory("model") as building:
        (building / "weights").write_text("all")
        assert not (folder.path / "model").exists()
    assert (folder.path / "model/weights").read_text() == "all"


def test_the_status_says_how_the_run_stands(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    status = tmp_path / "run/run_status.json"
    assert json.loads(status.read_text())["state"] == "running"
    folder.write_status("failed", reason="why")
    assert json.loads(status.read_text()) == {"state": "failed", "reason": "why"}


def test_rows_are_read_as_they_were_written_whatever_they_hold(tmp_path: Path) -> None:
    rows = [{"response": "line\u2028separator \x85 \x0b\n"}, {"response": ""}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_a_growing_file_loses_only_the_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "new/lines.jsonl"
    assert complete_lines(path) == 0
    append_lines(path, [{"a": 1}, {"a": "é"}])
    append_lines(path, [])
    with path.open("ab") as file:
        file.write('{"a": "é'.encode()[:-1])
    assert complete_lines(path) == 2
    append_lines(path, [{"a": 3}])
    assert [row["a"] for row in read_rows(path)] == [1, "é", 3]
