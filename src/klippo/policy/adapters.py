"""LoRA adapters that share one frozen base: which one is active, and putting things back."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from klippo.errors import ConfigError, PreflightError
from klippo.hub import LOADING_ERRORS, resolve

POLICY = "default"
REFERENCE = "reference"
CRITIC = "critic"


def with_adapter(model: Any, adapter: str) -> Any:
    """The model with the layers of a LoRA adapter (folder, hub or demo: name) in it, frozen.

    Raises PreflightError where the adapter does not fit the model.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # peft calls transformers by names that are about to go: no news for users.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = PeftModel.from_pretrained(model, resolve(adapter), adapter_name=POLICY)
    except LOADING_ERRORS as error:
        raise PreflightError(
            f"{adapter}: the adapter cannot be put on {model.config.name_or_path} ({error}); name "
            "the base that it was trained on"
        ) from error
    return adapted.get_base_model()


@contextmanager
def finding_layers(key: str, target_modules: str | list[str]) -> Iterator[None]:
    """Raise ConfigError for names in `key`.target_modules that no layer of the model has."""
    try:
        yield
    except (ValueError, re.error) as error:
        told = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{key}.target_modules={target_modules} cannot be found in the model ({told}); "
            "all-linear takes every linear layer"
        ) from error


@contextmanager
def using_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Run a PeftModel with another adapter (None: with the bare base); restores what was active.

    peft ties "active" to "trainable"; the policy and the critic adapter train at once, so the
    trainable flags are put back too, also after an exception.
    """
    active = model.active_adapter
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if name is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(name)
            yield
    finally:
        model.set_adapter(active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def checkpoint_contexts(
    model: Any,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for forward and recomputation: the latter uses the adapter of the former."""
    return nullcontext(), using_adapter(model, model.active_adapter)
