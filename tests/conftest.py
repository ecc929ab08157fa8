"""Settings for all tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Tiny tensors: threads cost more than they bring.
torch.set_num_threads(1)

from tests.small_models import (  # noqa: E402, F401
    adapter,
    cli,
    gpt2,
    prompts_file,
    reward_file,
    roberta,
    write_config,
)
