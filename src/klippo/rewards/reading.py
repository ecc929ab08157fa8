"""From prompts and responses to the token ids that a reward model reads.

N texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from klippo.errors import ConfigError
from klippo.rewards.rendering import Renderer
from klippo.types import Prompt, Tokenizer


class Reader:
    """A reward model's template and tokenizer. Training and scoring both read through it."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        *,
        template: str = "{prompt}{response}",
        response_only: bool = False,
        max_tokens: int | None = None,
        prompt_column: str = "prompt",
    ) -> None:
        """`name` is the model's, for messages; longer texts than `max_tokens` lose their start.

        `prompt_column` names the data's column with the prompt, which `template: chat` reads.
        Raises PreflightError or ConfigError when the template cannot work.
        """
        self.tokenizer = tokenizer
        self.tokenizer.truncation_side = "left"
        self.max_tokens = max_tokens
        self._renderer = Renderer(
            name,
            tokenizer,
            template=template,
            response_only=response_only,
            prompt_column=prompt_column,
        )
        adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._added_bos = (adds_bos and tokenizer.bos_token) or ""
        self.key = json.dumps([_identity(tokenizer), template, response_only, max_tokens])
        """Equal for readers that read every text alike."""

    def texts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[str]:
        """What the model sees, as text."""
        return [self._renderer.render(p, r) for p, r in zip(prompts, responses, strict=True)]

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids as the model saw them in training, and which texts were cut from the left."""
        all_ids = self._ids(texts, None)
        limit = self.max_tokens
        if limit is None:
            return all_ids, [False] * len(texts)
        cut = [len(ids) > limit for ids in all_ids]
        short = iter(self._ids([t for t, long in zip(texts, cut, strict=True) if long], limit))
        return [next(short) if long else i for i, long in zip(all_ids, cut, strict=True)], cut

    def _ids(self, texts: Sequence[str], limit: int | None) -> list[list[int]]:
        """Ids of each text, never with two BOS tokens: chat templates write one of their own."""
        if not texts:
            return []
        is_chat = self._renderer.is_chat
        encoded = self.tokenizer(
            list(texts) if is_chat else [text.removeprefix(self._added_bos) for text in texts],
            add_special_tokens=not is_chat,
            truncation=limit is not None,
            max_length=limit,
            verbose=False,
        )
        return [[int(i) for i in ids] for ids in encoded["input_ids"]]


def check_max_tokens(name: str, wanted: int | None, context: int | None) -> int | None:
    """The longest text in tokens: what was asked for, or the model's context (None: no limit).

    Raises ConfigError when more is asked for than the model reads.
    """
    if wanted is not None and context is not None and wanted > context:
        raise ConfigError(
            f"max_tokens={wanted}: reward model {name} reads at most {context} tokens; lower it "
            "or leave it out"
        )
    return context if wanted is None else wanted


def context_of(model: Any, tokenizer: Tokenizer) -> int | None:
    """The most tokens that a model's positions and its tokenizer allow (None: no limit)."""
    limits = [n for n in (tokenizer.model_max_length,) if n is not None and n < 1_000_000]
    text_config = model.config.get_text_config()
    limits += [n for n in (getattr(text_config, "max_position_embeddings", None),) if n is not None]
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            # RoBERTa's kind counts positions from behind the padding's own.
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits, default=None)


def _identity(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that make the same ids of every text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.to_str())
    return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
