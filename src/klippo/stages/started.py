"""What is known when a run begins, for its report: started.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from klippo.report.reading import STARTED_FILE
from klippo.runs.folder import write_text
from klippo.stages.session import Session

PACKAGES = ("klippo", "torch", "transformers", "peft")


def now() -> str:
    """The time, as run files hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_started(folder: Path, session: Session, name: str, origins: Mapping[str, str]) -> None:
    """The config's name and who set what in it; time, versions and device."""
    is_gpu = session.device.type == "cuda"
    facts = {
        "name": name,
        "started": now(),
        "device": torch.cuda.get_device_name(session.device) if is_gpu else session.device.type,
        "num_processes": session.ranks.world_size,
        "versions": {"python": platform.python_version()} | versions(),
        "origins": dict(origins),
    }
    write_text(folder / STARTED_FILE, json.dumps(facts, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Of the packages that a run's numbers depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
