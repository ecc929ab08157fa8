"""What is installed, what the machine has, and which keys are set (never what they are)."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from klippo.rollouts.vllm import vllm_version

REQUIRED = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "accelerate",
    "trl",
    "matplotlib",
)
KEYS = ("HF_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")
GIB = 2**30

Facts = dict[str, dict[str, Any]]


def doctor(*, as_json: bool = False) -> int:
    """Print the facts; 3 where a needed package is missing or torch cannot be imported."""
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else "\n\n".join(map(_section, facts.items())))
    broken = None in facts["packages"].values() or "torch error" in facts["devices"]
    return 3 if broken else 0


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


OPTIONAL: dict[str, Callable[[], str | None]] = {
    "vllm": vllm_version,  # one of two packages
    "bitsandbytes": partial(_version, "bitsandbytes"),
}


def collect() -> Facts:
    """The facts by section; a package that is missing has the version None."""
    return {
        "system": {"platform": platform.platform(), "python": platform.python_version()},
        "packages": {name: _version(name) for name in ("klippo", *REQUIRED)},
        "optional packages": {name: read() or "not installed" for name, read in OPTIONAL.items()},
        "devices": _processor() | _accelerators(),
        "keys": {name: "set" if os.environ.get(name) else "not set" for name in KEYS},
        "storage": _storage(),
    }


def _processor() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {"CPU cores": os.cpu_count(), "CPU cores usable": usable}
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        facts["memory (GiB)"] = round(memory / GIB, 1)
    return facts


def _accelerators() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation is what the doctor is asked about
        return {"torch error": f"{type(error).__name__}: {error}"}
    facts: dict[str, Any] = {
        "CPU threads of torch": torch.get_num_threads(),
        "CUDA devices": torch.cuda.device_count(),
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = "yes" if torch.cuda.is_bf16_supported() else "no"
        memory = round(device.total_memory / GIB, 1)
        facts[f"cuda:{index}"] = f"{device.name}, {memory} GiB, bfloat16: {bf16}"
    facts["MPS"] = "yes" if torch.backends.mps.is_available() else "no"
    return facts


def _storage() -> dict[str, Any]:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        "Hugging Face cache": str(cache),
        "free there (GiB)": round(shutil.disk_usage(existing).free / GIB, 1),
        "free here (GiB)": round(shutil.disk_usage(".").free / GIB, 1),
    }


def _section(section: tuple[str, dict[str, Any]]) -> str:
    name, facts = section
    lines = [f"  {key:<22} {'MISSING' if fact is None else fact}" for key, fact in facts.items()]
    return "\n".join([name, *lines])
