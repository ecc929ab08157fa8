"""Klippo in float64, to compare runs exactly (tolerance.py says why).

python -m tests.float64 COMMAND ...    the `klippo` command, computed in float64
"""

from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from tests.tolerance import NoFloat32


@contextmanager
def in_float64():
    """Models that would be loaded in float32 are float64 inside, and so is what they compute."""
    original = PreTrainedModel.__dict__["from_pretrained"]  # a classmethod, not yet bound

    def load(cls, *arguments, **options):
        if options.get("dtype") is torch.float32:
            options["dtype"] = torch.float64
        loaded = original.__func__(cls, *arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.dtype == torch.float32:
            model.double()
        return loaded

    PreTrainedModel.from_pretrained = classmethod(load)
    try:
        with NoFloat32():
            yield
    finally:
        PreTrainedModel.from_pretrained = original


if __name__ == "__main__":
    from klippo.cli.main import app

    with in_float64():
        app(prog_name="klippo")
