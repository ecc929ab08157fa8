"""Settings for all tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Tiny tensors: threads cost more than they bring.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

from tests import float64  # noqa: E402
from tests.small_models import (  # noqa: E402, F401
    adapter,
    cli,
    gpt2,
    prompts_file,
    reward_file,
    roberta,
    write_config,
)


@pytest.fixture
def in_float64():
    """Inside the test, models are loaded and computed in float64."""
    with float64.in_float64():
        yield
