"""Prompts: rows from a file or the hub, prompts from rows, batches from prompts."""

from klippo.data.files import Row
from klippo.data.prompts import build_prompts
from klippo.data.rows import load_rows, validation_source
from klippo.data.sampler import PromptSampler

__all__ = ["PromptSampler", "Row", "build_prompts", "load_rows", "validation_source"]
