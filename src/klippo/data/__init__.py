"""Prompts: rows from a file or the hub, prompts from rows, batches from prompts."""
