"""Checkpoints are whole or not there; what is damaged is found out, named and passed over."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klippo.errors import ConfigError, StorageError
from klippo.runs.checkpoints import BrokenCheckpointError, Checkpoints, read_checkpoint
from klippo.runs.folder import BrokenLineError
from klippo.runs.lock import RunLock
from klippo.runs.rewind import rewind

TENSORS = {
    "weights": {"a": torch.arange(6.0).view(2, 3).T},
    "optimizer": {"step/a": torch.ones(())},
}


def no_warning(text: str) -> None:
    raise AssertionError(text)


def test_what_is_written_is_read_to_the_bit(tmp_path: Path) -> None:
    written = Checkpoints(tmp_path).write(7, TENSORS, {"coef": 0.1 + 0.2})
    found = read_checkpoint(written)
    assert (found.step, found.state["coef"]) == (7, 0.1 + 0.2)
    for name, expected in TENSORS.items():
        tensors = found.tensors(name)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], value) for key, value in expected.items())


def test_the_newest_is_found_by_number_and_old_ones_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (9, 100_000_000, 10):  # the widest name sorts last as text
        checkpoints.write(step, TENSORS, {})
    newest, problems = checkpoints.newest()
    assert newest is not None
    assert (newest.step, problems) == (100_000_000, [])
    checkpoints.prune(2)
    assert sorted(path.name for path in checkpoints.path.iterdir()) == [
        "step-00000010",
        "step-100000000",
    ]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: (path / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (lambda path: flip_a_bit(path / "weights.safetensors"), "its content is not"),
        (lambda path: os.truncate(path / "optimizer.safetensors", 20), "its size is not"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda path: (path / "state.json").unlink(), "state.json is missing"),
        (lambda path: (path / "manifest.json").write_text("{}"), "does not name state.json"),
        (lambda path: (path / "manifest.json").write_text('{"state.json": 5}'), "its size is not"),
        (lambda path: tamper(path, step=None), "does not name its step and its files"),
        (lambda path: tamper(path, files=5), "does not name its step and its files"),
        (lambda path: tamper(path, files=["../../elsewhere"]), "is missing from the manifest"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(tmp_path, damage, told) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(1, TENSORS, {})
    damage(checkpoints.write(2, TENSORS, {}))
    newest, problems = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    assert len(problems) == 1
    assert "step-00000002" in problems[0]
    assert told in problems[0]


def tamper(path: Path, **changes: object) -> None:
    """Change state.json and mend the manifest, as somebody who knows the format would."""
    state = path / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | changes))
    described = {
        "bytes": state.stat().st_size,
        "sha256": hashlib.sha256(state.read_bytes()).hexdigest(),
    }
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"state.json": described}))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def test_another_format_is_not_read(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).write(1, TENSORS, {"format": 99})
    with pytest.raises(BrokenCheckpointError, match="format 99 is not 1"):
        read_checkpoint(path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(1, TENSORS, {})
    with pytest.raises(TypeError):
        checkpoints.write(2, TENSORS, {"no JSON": object()})
    checkpoints.path.chmod(0o500)
    if os.geteuid() != 0:
        with pytest.raises(StorageError, match="checkpoints"):
            checkpoints.write(3, TENSORS, {})
    assert [path.name for path in checkpoints.path.iterdir()] == ["step-00000001"]


def test_a_file_cannot_be_named_outside_of_the_checkpoint(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).write(1, TENSORS, {})
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"../../secret": {"bytes": 1}}))
    with pytest.raises(BrokenCheckpointError, match="step-00000001/secret is missing"):
        read_checkpoint(path)


@given(cut=st.integers(0, 200), step=st.integers(0, 6))
def test_rewinding_keeps_whole_lines_before_the_step(tmp_path_factory, cut: int, step: int) -> None:
    run = tmp_path_factory.mktemp("run")
    lines = [f'{{"step": {i}, "x": 0.{i}1}}\n'.encode() for i in range(6)]
    whole = b"".join(lines)
    (run / "metrics.jsonl").write_bytes(whole[: max(len(whole) - cut, 0)])
    lost = rewind(run, step)
    kept = (run / "metrics.jsonl").read_bytes()
    assert whole.startswith(kept)
    number = kept.count(b"\n")
    assert kept == b"".join(lines[:number])
    assert number == min(step, (len(whole) - cut) // len(lines[0]) if cut <= len(whole) else 0)
    assert lost == list(range(number, step))


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(BrokenLineError, match=r"metrics\.jsonl, line 2"):
        rewind(tmp_path, 3)


def test_rewinding_removes_evaluations_of_later_steps(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    for step in (0, 4, 8):
        (tmp_path / f"eval/step-{step}.jsonl").write_text("{}\n")
    rewind(tmp_path, 4)
    assert sorted(file.name for file in (tmp_path / "eval").iterdir()) == [
        "step-0.jsonl",
        "step-4.jsonl",
    ]


def test_a_folder_has_one_owner_until_it_lets_go(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, no_warning)
    with pytest.raises(ConfigError, match=f"process {os.getpid()}.*trains there now"):
        RunLock(tmp_path, no_warning)
    lock.release()
    RunLock(tmp_path, no_warning).release()
    assert not list(tmp_path.iterdir())


def test_a_killed_owner_lets_go(tmp_path: Path) -> None:
    owner = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,))
    owner.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="trains there now"):
        RunLock(tmp_path, no_warning)
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    RunLock(tmp_path, no_warning).release()


def hold(folder: Path) -> None:
    lock = RunLock(folder, no_warning)
    (folder / "held").touch()
    time.sleep(60)
    lock.release()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    told: list[str] = []
    RunLock(tmp_path, told.append).release()
    assert len(told) == 1
    assert "has no locks (No locks available)" in told[0]


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> object:
        return (Path.write_text, (self.canary, "a pickle was opened"))


def test_a_pickle_in_the_place_of_tensors_is_never_opened(tmp_path: Path) -> None:
    """Not even where the manifest was mended to fit it."""
    canary = tmp_path / "canary"
    path = Checkpoints(tmp_path).write(1, TENSORS, {})
    torch.save(Trap(canary), path / "weights.safetensors")
    torch.save(Trap(canary), path / "weights.pt")
    content = (path / "weights.safetensors").read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["weights.safetensors"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    found = read_checkpoint(path)
    with pytest.raises(BrokenCheckpointError, match=r"weights\.safetensors cannot be read"):
        found.tensors("weights")
    assert not canary.exists()
    torch.load(path / "weights.pt", weights_only=False)
    assert canary.exists()  # the trap works
