"""What is known when a run begins, for its report: started.json."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from klippo.report.reading import STARTED_FILE
from klippo.runs.folder import write_text
from klippo.train.resume import Start
from klippo.train.session import Session

PACKAGES = ("klippo", "torch", "transformers", "peft")


def now() -> str:
    """The time, as run files hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_started(
    folder: Path,
    session: Session,
    start: Start,
) -> None:
    """The config as it was given, its name and who set what in it; time, versions and device.

    A resumed run keeps when it began, and lists each time that it was resumed.
    """
    file = folder / STARTED_FILE
    before = json.loads(file.read_bytes()) if start.is_resumed and file.is_file() else {}
    is_gpu = session.device.type == "cuda"
    facts = {
        "name": session.run.name,
        "started": before.get("started", now()),
        "device": torch.cuda.get_device_name(session.device) if is_gpu else session.device.type,
        "num_processes": session.ranks.world_size,
        "versions": {"python": platform.python_version()} | versions(),
        "origins": dict(session.run.origins),
        "config": session.config.model_dump(mode="json"),
    }
    if start.is_resumed:
        resumption = {
            "at": now(),
            "after_steps": session.learner.num_steps_done,
            "changed": start.changed,
        }
        facts["resumed"] = [*before.get("resumed", []), resumption]
    write_text(file, json.dumps(facts, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Of the packages that a run's numbers depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
