"""From rows to prompts: template, token ids, cuts, and the length limit."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from klippo.data.files import Row, is_chat, source_of
from klippo.data.settings import DataSettings
from klippo.errors import ConfigError
from klippo.templates import prompt_text
from klippo.types import Prompt, Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A row as the policy will read it."""

    row: Row
    text: str  # without a BOS token at its start, unless a chat template wrote it
    bos: list[int]  # the BOS token's id, or nothing
    content: list[int]  # the other ids

    def __len__(self) -> int:
        return len(self.bos) + len(self.content)

    def keep(self, part: slice, tokenizer: Tokenizer) -> _Encoded:
        """The same with a part of its content, and that part's text."""
        content = self.content[part]
        if len(content) == len(self.content):
            return self
        text = tokenizer.decode(content, clean_up_tokenization_spaces=False)
        return _Encoded(self.row, text, self.bos, content)


def build_prompts(
    rows: Sequence[Row],
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    seed: int,
) -> list[Prompt]:
    """The policy's prompts, each at most `max_prompt_tokens` long including a BOS token.

    `tokenizer` is the policy's. `seed` and the row's number decide a cut, so other rows have no
    influence on it. Rows that `overlong: drop` left out are counted in the log. `Prompt.text` is
    what the policy reads: with all of a template's special tokens, and in text format without a BOS
    token at its start.

    Raises ConfigError for a missing column, an empty prompt, a wrong type, a tokenizer without a
    chat template if one is needed, an overlong prompt, and when no prompt is left.
    """
    if not rows:
        return []
    for column in settings.prompt_columns:
        rows[0].require(column, "data.prompt_column")
    _check_format(settings, tokenizer)
    _check_filled(rows, settings, tokenizer)
    render = _render_chat if settings.format == "chat" else _render_text
    encoded = _encode(rows, [render(row, settings, tokenizer) for row in rows], settings, tokenizer)
    if settings.cut_tokens is not None:
        low, high = settings.cut_tokens
        encoded = [
            e.keep(slice(random.Random(f"{seed}:{e.row.number}").randint(low, high)), tokenizer)
            for e in encoded
        ]
    return [
        Prompt(
            id=e.row.number,
            text=e.text,
            token_ids=e.bos + e.content,
            content=None if settings.template is None else _bare(e.row, settings, tokenizer),
            meta=dict(e.row.columns),
        )
        for e in _limit(encoded, settings, tokenizer, max_prompt_tokens)
    ]


def _bare(row: Row, settings: DataSettings, tokenizer: Tokenizer) -> str:
    """A row's prompt without template and without a BOS token at its start."""
    return str(row.prompt(settings.prompt_columns)).removeprefix(tokenizer.bos_token or "")


def _check_format(settings: DataSettings, tokenizer: Tokenizer) -> None:
    if settings.format == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "data.format=chat needs a tokenizer with a chat template, and that of "
            f"{tokenizer.name_or_path or 'this model'} has none; use an instruction-tuned model's "
            "tokenizer, or set data.format: text"
        )
    if settings.format != "chat" and settings.system_prompt is not None:
        raise ConfigError(
            "data.system_prompt needs a chat template; set data.format: chat, or write it into the "
            "prompts"
        )


def _check_filled(rows: Sequence[Row], settings: DataSettings, tokenizer: Tokenizer) -> None:
    def is_empty(value: Any) -> bool:
        if isinstance(value, list) and all(isinstance(m, dict) for m in value):
            return not any(str(m.get("content") or "").strip() for m in value)
        text = value.removeprefix(tokenizer.bos_token or "") if isinstance(value, str) else value
        return text is None or (isinstance(text, str) and not text.strip())

    if empty := [row for row in rows if is_empty(row.prompt(settings.prompt_columns))]:
        others = f"; {len(empty)} of {len(rows)} rows are so" if len(empty) > 1 else ""
        raise ConfigError(
            f"{empty[0]}: the prompt in {_columns(settings)} is empty "
            f"({empty[0].prompt(settings.prompt_columns)!r}){others}; a prompt needs text: fill or "
            "remove these rows"
        )


def _columns(settings: DataSettings) -> str:
    names = settings.prompt_columns
    return f"column {names[0]!r}" if len(names) == 1 else f"columns {', '.join(names)}"


def _render_text(row: Row, settings: DataSettings, tokenizer: Tokenizer) -> str:
    """The prompt as text, inside the template."""
    value = row.prompt(settings.prompt_columns)
    if not isinstance(value, str):
        remedy = "choose another data.prompt_column, or convert it to text"
        if is_chat(value):
            remedy = "for chat messages set data.format: chat"
        raise row.unusable(settings.prompt_columns[0], "text", remedy)
    if settings.template is None:
        return value
    return prompt_text(settings.template, _bare(row, settings, tokenizer), row.columns)


def _render_chat(row: Row, settings: DataSettings, tokenizer: Tokenizer) -> str:
    """The prompt inside the tokenizer's chat template."""
    messages = _messages(row, settings)
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise ConfigError(
            f"{row}: the tokenizer's chat template refuses these messages: {error}; change the "
            "messages (or data.system_prompt)"
        ) from error
    return str(text)


def _messages(row: Row, settings: DataSettings) -> list[dict[str, str]]:
    value = row.prompt(settings.prompt_columns)
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not is_chat(messages) or not all(
        isinstance(m.get(key), str) for m in messages for key in ("role", "content")
    ):
        needed = 'text or a list of {"role": ..., "content": text}'
        raise row.unusable(settings.prompt_columns[0], needed, "convert it")
    if messages[-1]["role"] == "assistant":
        raise ConfigError(
            f"{row}: {_columns(settings)} ends with an assistant message, but the policy is to "
            "write that; keep the messages up to the user's last"
        )
    if settings.system_prompt is None:
        return list(messages)
    if messages[0]["role"] == "system":
        raise ConfigError(
            f"{row}: {_columns(settings)} begins with a system message of its own; remove it, or "
            "data.system_prompt"
        )
    return [{"role": "system", "content": settings.system_prompt}, *messages]


def _encode(
    rows: Sequence[Row], texts: list[str], settings: DataSettings, tokenizer: Tokenizer
) -> list[_Encoded]:
    """Token ids with at most one BOS token of ours, and no EOS token that the tokenizer adds."""
    all_ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    bos_token, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    added: list[int] = []
    if settings.format == "text" and bos_id is not None:
        added = [bos_id] if tokenizer("a")["input_ids"][:1] == [bos_id] else []
    encoded = []
    for row, text, ids in zip(rows, texts, all_ids, strict=True):
        if bos_token and text.startswith(bos_token) and ids[:1] == [bos_id]:
            # A chat template's first token is part of its text (SmolLM2's <|im_start|> is its BOS).
            read = text if settings.format == "chat" else text.removeprefix(bos_token)
            entry = _Encoded(row, read, ids[:1], ids[1:])
        else:
            entry = _Encoded(row, text, added, ids)
        if not entry.content:
            raise ConfigError(
                f"{row}: the tokenizer makes no tokens of {text[:60]!r}; remove the row, or use a "
                "model that knows these characters"
            )
        encoded.append(entry)
    return encoded


def _limit(
    encoded: list[_Encoded], settings: DataSettings, tokenizer: Tokenizer, limit: int
) -> list[_Encoded]:
    """Apply `overlong` to prompts of more than `limit` tokens."""
    long = [e for e in encoded if len(e) > limit]
    if not long:
        return encoded
    longest = max(len(e) for e in long)
    if settings.overlong == "error":
        raise ConfigError(
            f"{long[0].row}: the prompt has {len(long[0])} tokens, the limit is {limit}; "
            f"{len(long)} of {len(encoded)} prompts are too long, the longest with {longest}. Set "
            "data.overlong: drop or keep_end, or raise data.max_prompt_tokens as far as the "
            "context allows"
        )
    source = source_of([e.row for e in encoded])
    share = f"{source}: {len(long)} of {len(encoded)} prompts have more than {limit} tokens"
    if settings.overlong == "keep_end":
        logger.warning("%s; the last ones were kept", share)
        return [
            e.keep(slice(max(len(e) - limit, 0), None), tokenizer) if len(e) > limit else e
            for e in encoded
        ]
    kept = [e for e in encoded if len(e) <= limit]
    if not kept:
        raise ConfigError(
            f"{share}, so data.overlong: drop leaves no prompt (the longest has {longest}); raise "
            "data.max_prompt_tokens, or set data.overlong: keep_end"
        )
    logger.warning("%s and were dropped", share)
    return kept
