"""Prompts, preferences and logged responses: from files to rows to what is learnt from."""
