"""The text around a prompt and a response: named formats, or templates written out."""

from __future__ import annotations

import re
from collections.abc import Mapping

from klippo.errors import ConfigError, nearest

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{prompt}\n\n### Response:{response}"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:{response}"
)
_OPEN_ASSISTANT = "<|prompter|>{prompt}<|endoftext|><|assistant|>{response}<|endoftext|>"
NAMES = {"alpaca": _ALPACA, "open-assistant": _OPEN_ASSISTANT}
"""`alpaca` is AlpacaFarm's v0_inputs_noinputs.json: nothing between `### Response:` and the
response, and no end token, as its reward models were trained (end_sequence_with_eos off).
`open-assistant` is Open-Assistant's message format, version 2."""

_NAME = re.compile(r"\{(\w[\w .-]*)\}")


def prompt_text(template: str, prompt: str, columns: Mapping[str, object]) -> str:
    """What a policy reads: the template up to {response}, or all of it if it has none.

    `template` is a name or written out with {prompt} and any column. Raises ConfigError for an
    unknown name, and for {something} that is no column.
    """
    before = _written_out(template, columns).partition("{response}")[0]
    return _fill(before, columns, {"prompt": prompt})


def full_text(template: str, prompt: str, response: str, columns: Mapping[str, object]) -> str:
    """What a reward model reads: prompt and response in the template.

    Raises ConfigError as `prompt_text` does, and for a template without {response}.
    """
    text = _written_out(template, columns)
    if "{response}" not in text:
        raise ConfigError(
            f"template={template!r} does not contain {{response}}, so every response would read "
            "the same; add it"
        )
    return _fill(text, columns, {"prompt": prompt, "response": response})


def check_template(template: str) -> None:
    """Raise ConfigError for a name that is none; columns are checked when filled in."""
    if template in NAMES or "{" in template:
        return
    near = nearest(template.lower().replace("_", "-"), NAMES)
    raise ConfigError(
        f"template={template!r} is neither {' nor '.join(NAMES)}, nor written out with {{prompt}}"
        + (f"; did you mean {near}?" if near else "")
    )


def _written_out(template: str, columns: Mapping[str, object]) -> str:
    check_template(template)
    if template == "alpaca" and columns.get("instruction") and columns.get("input"):
        return _WITH_INPUT
    return NAMES.get(template, template)


def _fill(template: str, columns: Mapping[str, object], texts: Mapping[str, str]) -> str:
    """Replace every {name} in one pass: braces inside the texts stay as they are."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name in texts:
            return texts[name]
        if name in columns:
            return "" if columns[name] is None else str(columns[name])
        known = [*texts, *columns]
        near = nearest(name, known)
        raise ConfigError(
            f"template={template!r}: {{{name}}} is no column; there are {', '.join(known)}"
            + (f": did you mean {{{near}}}?" if near else "")
        )

    return _NAME.sub(value, template)
