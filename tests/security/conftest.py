"""Small models and configs of the tests, and folders that try to run code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CODE = """
from pathlib import Path
from transformers import {config}, {model}

Path({canary!r}).write_text("code of the model was run")


class OwnConfig({config}):
    model_type = "own"


class OwnModel({model}):
    config_class = OwnConfig
"""


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> object:
        return (Path.write_text, (self.canary, "a pickle was opened"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Is there when foreign code has run."""
    return tmp_path / "canary"


@pytest.fixture
def with_code(tmp_path: Path, canary: Path) -> Callable[..., Path]:
    """A copy of a model folder whose class is in a file of its own."""

    def make(source: Path, config: str, model: str, *, known: bool = False) -> Path:
        folder = tmp_path / f"own-{source.name}"
        shutil.copytree(source, folder)
        text = CODE.format(config=config, model=model, canary=str(canary))
        (folder / "own_model.py").write_text(text)
        auto = "AutoModelForCausalLM" if "LMHead" in model else "AutoModelForSequenceClassification"
        edit(
            folder / "config.json",
            auto_map={"AutoConfig": "own_model.OwnConfig", auto: "own_model.OwnModel"},
            **({} if known else {"model_type": "own", "architectures": ["OwnModel"]}),
        )
        return folder

    return make


@pytest.fixture
def own_policy(with_code: Callable[..., Path], gpt2: Path) -> Path:
    """A language model with code of its own."""
    return with_code(gpt2, "GPT2Config", "GPT2LMHeadModel")


@pytest.fixture
def own_reward(with_code: Callable[..., Path], roberta: Path) -> Path:
    """A classifier with code of its own."""
    return with_code(roberta, "RobertaConfig", "RobertaForSequenceClassification")


@pytest.fixture
def pickled(tmp_path: Path, canary: Path) -> Callable[..., Path]:
    """A copy of a model (or adapter) whose weights are a pickle, with a trap in it or honest."""

    def make(source: Path, *, trap: bool, keep_safe: bool = False) -> Path:
        from safetensors.torch import load_file

        folder = tmp_path / f"pickled-{source.name}"
        shutil.copytree(source, folder)
        (safe,) = folder.glob("*.safetensors")
        name = "adapter_model.bin" if safe.name.startswith("adapter") else "pytorch_model.bin"
        weights: dict[str, Any] = dict(load_file(safe))
        torch.save(weights | ({"trap": Trap(canary)} if trap else {}), folder / name)
        if not keep_safe:
            safe.unlink()
        return folder

    return make


def edit(file: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
