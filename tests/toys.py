"""Tiny models and tokenizers that tests share."""

from types import SimpleNamespace

NO_TOKENIZER = SimpleNamespace(eos_token_id=None)
"""For tests that never touch text."""
