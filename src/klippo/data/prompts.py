"""From rows to prompts: template, token ids, cuts, and the length limit."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from klippo.data.files import Row, require_column
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


def build_prompts(
    rows: Sequence[Row],
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    seed: int,
    source: str,
) -> list[Prompt]:
    """The policy's prompts, each at most `max_prompt_tokens` long including a BOS token.

    `tokenizer` is the policy's. `source` names the rows' file in messages. `seed` and the row's
    number decide a cut, so other rows have no influence on it. Rows that `overlong: drop` left out
    are counted in the log. `Prompt.text` is what the policy reads: with all of a template's special
    tokens, and in text format without a BOS token at its start.

    Raises ConfigError for a missing column, an empty prompt, a wrong type, a tokenizer without a
    chat template where one is needed, an overlong prompt, and when no prompt is left.
    """
    if not rows:
        return []
    for column in settings.prompt_columns:
        require_column(column, rows[0].columns, "data.prompt_column", source)
    texts = _texts(rows, settings, tokenizer, source)
    encoded = _encode(rows, texts, settings, tokenizer, source)
    if settings.cut_tokens is not None:
        low, high = settings.cut_tokens
        encoded = [
            _keep(e, slice(random.Random(f"{seed}:{e.row.number}").randint(low, high)), tokenizer)
            for e in encoded
        ]
    encoded = _limit(encoded, settings, tokenizer, max_prompt_tokens, source)
    return [
        Prompt(
            id=e.row.number,
            text=e.text,
            token_ids=e.bos + e.content,
            content=None if settings.template is None else _bare(e.row, settings, tokenizer),
            meta=dict(e.row.columns),
        )
        for e in encoded
    ]


def _bare(row: Row, settings: DataSettings, tokenizer: Tokenizer) -> str:
    """A row's prompt without template and without a BOS token at its start."""
    return str(row.prompt(settings.prompt_columns)).removeprefix(tokenizer.bos_token or "")


def _texts(
    rows: Sequence[Row], settings: DataSettings, tokenizer: Tokenizer, source: str
) -> list[str]:
    """Each row's prompt as one text, after the template."""
    render: Callable[[Row], str]
    if settings.format == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "data.format=chat needs a tokenizer with a chat template, and that of "
                f"{tokenizer.name_or_path or 'this model'} has none; use an instruction-tuned "
                "model's tokenizer, or set data.format: text"
            )
        render = _ChatFormat(settings, tokenizer, source).render
    elif settings.system_prompt is not None:
        raise ConfigError(
            "data.system_prompt has a place only in a chat template; set data.format: chat, or "
            "write it into the prompts"
        )
    else:
        render = _TextFormat(settings, tokenizer, source).render
    _check_filled(rows, settings, tokenizer, source)
    return [render(row) for row in rows]


def _check_filled(
    rows: Sequence[Row], settings: DataSettings, tokenizer: Tokenizer, source: str
) -> None:
    names = settings.prompt_columns
    empty = [row for row in rows if _is_empty(row.prompt(names), tokenizer.bos_token)]
    if empty:
        found = repr(empty[0].prompt(names))
        others = f"; {len(empty)} of {len(rows)} rows are so" if len(empty) > 1 else ""
        raise ConfigError(
            f"{empty[0].place(source)}: the prompt in {_columns(settings)} is empty "
            f"({found}){others}; a prompt needs text: fill or remove these rows"
        )


def _is_empty(value: Any, bos: str | None) -> bool:
    if isinstance(value, str):
        return not value.removeprefix(bos or "").strip()
    if isinstance(value, list) and all(isinstance(m, dict) for m in value):
        return not any(str(m.get("content") or "").strip() for m in value)
    return value is None


def _columns(settings: DataSettings) -> str:
    names = settings.prompt_columns
    return f"column {names[0]!r}" if len(names) == 1 else f"columns {', '.join(names)}"


class _TextFormat:
    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, source: str) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._source = source

    def render(self, row: Row) -> str:
        value = row.prompt(self._settings.prompt_columns)
        template = self._settings.template
        if isinstance(value, str):
            if template is None:
                return value
            return prompt_text(template, _bare(row, self._settings, self._tokenizer), row.columns)
        messages = isinstance(value, list) and all(isinstance(m, dict) for m in value)
        raise ConfigError(
            f"{row.place(self._source)}: {_columns(self._settings)} holds {type(value).__name__} "
            f"{str(value)[:60]!r} where text is needed; "
            + (
                "for chat messages set data.format: chat"
                if messages
                else "choose another data.prompt_column, or convert it to text"
            )
        )


class _ChatFormat:
    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, source: str) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._source = source

    def render(self, row: Row) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                self._messages(row), add_generation_prompt=True, tokenize=False
            )
        except ConfigError:
            raise
        except Exception as error:  # templates raise what they like
            raise ConfigError(
                f"{row.place(self._source)}: the tokenizer's chat template refuses these messages: "
                f"{error}; change the messages (or data.system_prompt)"
            ) from error
        return str(text)

    def _messages(self, row: Row) -> list[dict[str, str]]:
        value = row.prompt(self._settings.prompt_columns)
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        where = f"{row.place(self._source)}: {_columns(self._settings)}"
        if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
            raise ConfigError(
                f"{where} holds {type(value).__name__} {str(value)[:60]!r} where text or a list of "
                '{"role": ..., "content": text} is needed'
            )
        if messages[-1]["role"] == "assistant":
            raise ConfigError(
                f"{where} ends with an assistant message, but the policy is to write that; keep "
                "the messages up to the user's last"
            )
        if self._settings.system_prompt is None:
            return messages
        if messages[0]["role"] == "system":
            raise ConfigError(
                f"{where} begins with a system message of its own; remove it, or data.system_prompt"
            )
        return [{"role": "system", "content": self._settings.system_prompt}, *messages]


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def _encode(
    rows: Sequence[Row], texts: list[str], settings: DataSettings, tokenizer: Tokenizer, source: str
) -> list[_Encoded]:
    """Token ids with at most one BOS token of ours, and no EOS token that the tokenizer adds."""
    all_ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    added = _added_bos(tokenizer) if settings.format == "text" else []
    bos_token, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
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
                f"{row.place(source)}: the tokenizer makes no tokens of {text[:60]!r}; remove the "
                "row, or use a model that knows these characters"
            )
        encoded.append(entry)
    return encoded


def _added_bos(tokenizer: Tokenizer) -> list[int]:
    """[BOS] where the tokenizer puts one before every text, else nothing."""
    with_special = tokenizer("a")["input_ids"]
    if tokenizer.bos_token_id is not None and with_special[:1] == [tokenizer.bos_token_id]:
        return [tokenizer.bos_token_id]
    return []


def _keep(encoded: _Encoded, part: slice, tokenizer: Tokenizer) -> _Encoded:
    """The same with a part of its content; the text is that part's, where it is not the whole."""
    content = encoded.content[part]
    if len(content) == len(encoded.content):
        return encoded
    text = tokenizer.decode(content, clean_up_tokenization_spaces=False)
    return _Encoded(encoded.row, text, encoded.bos, content)


def _limit(
    encoded: list[_Encoded], settings: DataSettings, tokenizer: Tokenizer, limit: int, source: str
) -> list[_Encoded]:
    """Apply `overlong` to prompts of more than `limit` tokens."""
    long = [e for e in encoded if len(e) > limit]
    if not long:
        return encoded
    longest = max(len(e) for e in long)
    if settings.overlong == "error":
        raise ConfigError(
            f"{long[0].row.place(source)}: the prompt has {len(long[0])} tokens, the limit is "
            f"{limit}; {len(long)} of {len(encoded)} prompts are too long, the longest with "
            f"{longest}. Set data.overlong: drop or keep_end, or raise data.max_prompt_tokens as "
            "far as the context allows"
        )
    share = f"{source}: {len(long)} of {len(encoded)} prompts have more than {limit} tokens"
    if settings.overlong == "keep_end":
        logger.warning("%s; the last ones were kept", share)
        return [
            _keep(e, slice(max(len(e) - limit, 0), None), tokenizer) if len(e) > limit else e
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
