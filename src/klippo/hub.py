"""Models and tokenizers by the names that users write: folders, hub names, `demo:` names."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from klippo.demo import demo_path
from klippo.errors import ConfigError, PreflightError

if TYPE_CHECKING:
    from klippo.types import Tokenizer  # needs torch, which is slow to import

DEMO_PREFIX = "demo:"
LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError),
    *(SafetensorError, pickle.UnpicklingError),
)
"""What from_pretrained raises for folders and files that are no model, or a broken one."""
_TRUSTED: set[str] = set()
"""Models whose own Python code may run in this process: nobody's, unless config and flag say so."""


def trust_code_of(names: Iterable[str]) -> None:
    """From now on the code of these models may run, and of no others."""
    _TRUSTED.clear()
    _TRUSTED.update(names)


def code_option(name: str) -> dict[str, bool]:
    """An option of `from_pretrained`; without it, transformers asks at the terminal."""
    return {"trust_remote_code": name in _TRUSTED}


def resolve(name: str) -> str:
    """`demo:policy` as the path inside the package; every other name unchanged.

    Raises ConfigError for a `demo:` name that does not exist.
    """
    if not name.startswith(DEMO_PREFIX):
        return name
    try:
        return str(demo_path(name.removeprefix(DEMO_PREFIX)))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def find_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a model's folder or hub repository; None if absent."""
    from transformers.utils import cached_file

    try:
        path = cached_file(resolve(name), file, revision=revision)
    except OSError:  # no such file, or no such repository, or it cannot be reached
        return None
    return None if path is None else Path(path)


def load_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder or hub name. A pad token is not needed.

    Raises PreflightError when there is none.
    """
    from transformers import AutoTokenizer

    folder = resolve(name)
    remedy = "save the model's own tokenizer beside it with tokenizer.save_pretrained(folder)"
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=revision, **code_option(name)
        )
    except Exception as error:  # the tokenizers library raises nothing narrower for broken files
        _refuse_own_code(name, error)
        raise PreflightError(
            f"{name}: the tokenizer cannot be loaded ({_first_line(error)}); {remedy}"
        ) from error
    # Without files, transformers makes an empty tokenizer of the model's kind and says nothing.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise PreflightError(f"{name}: the folder has no tokenizer; {remedy}")
    return tokenizer


def load_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json as it stands, whatever its class.

    Raises PreflightError when there is none.
    """
    from transformers import PretrainedConfig

    try:
        content, _ = PretrainedConfig.get_config_dict(resolve(name), revision=revision)
    except (OSError, ValueError) as error:
        raise not_loaded(name, error) from error
    return dict(content)


def load_model(auto_class: Any, name: str, revision: str | None = None, **options: Any) -> Any:
    """`auto_class.from_pretrained`; every weight must come from the checkpoint.

    Raises PreflightError when the model cannot be loaded or some of its weights would be random.
    """
    _refuse_kernels(name, revision)
    try:
        with no_progress_bars():
            model, report = auto_class.from_pretrained(
                resolve(name),
                revision=revision,
                output_loading_info=True,
                **code_option(name),
                **options,
            )
    except LOADING_ERRORS as error:
        raise not_loaded(name, error) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:4])
        raise PreflightError(
            f"{name}: the checkpoint lacks weights ({missing}), which would be random; "
            f"give a model that was trained as {auto_class.__name__.removeprefix('AutoModelFor')}"
        )
    return with_fused_activations(model)


def with_fused_activations(model: Any) -> Any:
    """The same model with the tanh approximation of GELU in one operation instead of eight.

    GPT-2 and its like spell the formula out (`gelu_new`, `gelu_fast`), and then the backward pass
    needs five tensors as wide as the MLP where one operation needs two. Values differ by rounding;
    the config, and so what is saved, stays as it was.
    """
    from torch.nn import GELU
    from transformers.activations import FastGELUActivation, NewGELUActivation

    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, FastGELUActivation | NewGELUActivation):
                setattr(module, name, GELU(approximate="tanh"))
    return model


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars about weight files; a hub download still shows its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def not_loaded(name: str, error: Exception) -> PreflightError:
    """The error to raise when loading a model raised one of LOADING_ERRORS."""
    _refuse_own_code(name, error)
    if isinstance(error, pickle.UnpicklingError):
        return PreflightError(
            f"{name}: the weights are a pickle that holds more than tensors "
            f"({_first_line(error)}); none of it was run. Ask its maker for safetensors, or "
            "convert it on a machine where nothing is at stake"
        )
    if isinstance(error, SafetensorError):
        return PreflightError(
            f"{name}: the weights are not a complete safetensors file ({_first_line(error)}); "
            "copy or download them again"
        )
    return PreflightError(
        f"{name}: the model cannot be loaded ({_first_line(error)}); give a folder written by "
        "save_pretrained, or a hub name (gated models need the environment variable HF_TOKEN)"
    )


def _refuse_kernels(name: str, revision: str | None) -> None:
    """Raise PreflightError if config.json names compiled code for transformers to fetch."""
    try:
        content = load_config(name, revision)
    except PreflightError:  # an adapter, or nothing: loading will say
        return
    asked = [value for key, value in content.items() if key.endswith("attn_implementation")]
    if "/" in json.dumps(asked) and name not in _TRUSTED:
        raise PreflightError(
            f"{name}: its config.json asks for attention code from elsewhere ({asked[0]}), which "
            "was not fetched; remove attn_implementation there"
        )


def _refuse_own_code(name: str, error: Exception) -> None:
    """Raise PreflightError if it is the model's own code that is missing."""
    if "trust_remote_code" in str(error):
        raise PreflightError(
            f"{name}: needs Python code of its own (auto_map in its config.json), which was not "
            "run: it could do here whatever you can. Take a model of a class that transformers "
            "has; or read that code, and then write trust_remote_code: true beside the model in "
            "the config and pass --trust-remote-code"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
