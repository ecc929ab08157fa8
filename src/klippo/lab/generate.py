"""`klippo generate`: answers from any model, to any prompts."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

from klippo.data.rows import as_rows
from klippo.errors import ConfigError
from klippo.ranks import choose_device
from klippo.report.text import one_line
from klippo.rollouts.collate import decode
from klippo.rollouts.sampling import Sampling, response_seeds
from klippo.runs.models import open_model


def generate(
    source: str,
    prompts: Sequence[str] | None,
    file: Path | None,
    *,
    num_samples: int = 1,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> int:
    """Print answers to prompts from arguments, a file, standard input, or a prompt line."""
    console = Console(soft_wrap=True)
    texts = list(prompts or []) + (_lines(file) if file is not None else [])
    is_interactive = not texts and sys.stdin.isatty()
    if not texts and not is_interactive:
        texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not texts:
            raise ConfigError("standard input has no prompt; give --prompt TEXT or --file FILE")
    opened = open_model(source, choose_device("auto"))
    limit = opened.max_tokens if max_tokens is None else max_tokens
    uncut = opened.data.model_copy(update={"cut_tokens": None, "max_prompt_tokens": None})
    engine = opened.engine(Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    numbers = itertools.count()
    for batch in _typed(console) if is_interactive else iter([texts]):
        ready = opened.prompts(as_rows(batch, uncut.prompt_columns), uncut, limit)
        for _ in range(num_samples):
            seeds = response_seeds(seed, itertools.islice(numbers, len(ready)))
            completions = engine.generate(ready, [limit] * len(ready), seeds)
            answers = decode([c.token_ids for c in completions], opened.tokenizer)
            for prompt, answer in zip(ready, answers, strict=True):
                console.print(
                    Text(one_line(prompt.text), style="bold") + Text(f" → {one_line(answer)}")
                )
    return 0


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{file} has no prompt; write one per line")
    return lines


def _typed(console: Console) -> Iterator[list[str]]:
    """Prompts from a prompt line, until an empty line or end of input."""
    with suppress(EOFError):
        while (text := console.input("prompt> ")).strip():
            yield [text]
