"""From prompts and responses to the token ids that a reward model reads.

N texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from klippo.errors import ConfigError, PreflightError
from klippo.templates import full_text
from klippo.types import Prompt, Tokenizer

CHAT = "chat"


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

        `prompt_column` holds the prompt without the policy's chat template, for `template: chat`.
        Raises ConfigError for a template without the response, PreflightError for `chat` if the
        tokenizer has no chat template.
        """
        self.tokenizer = tokenizer
        self.tokenizer.truncation_side = "left"
        self.max_tokens = max_tokens
        self._is_chat = template == CHAT and not response_only
        self._template = "{response}" if response_only else template
        self._prompt_column = prompt_column
        if self._is_chat and not getattr(tokenizer, "chat_template", None):
            raise PreflightError(
                f"reward model {name}: template=chat needs a tokenizer with a chat "
                "template, and this one has none; write the template out, with {prompt} and "
                "{response}"
            )
        if not self._is_chat and "{" in self._template and "{response}" not in self._template:
            raise ConfigError(
                f"reward model {name}: template={self._template!r} does not contain "
                "{response}, so every response would get the same score; add it"
            )
        adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._added_bos = (adds_bos and tokenizer.bos_token) or ""
        self.key = json.dumps([_identity(tokenizer), template, response_only, max_tokens])
        """Equal for readers that read every text alike."""

    def texts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[str]:
        """What the model sees, as text; {prompt} is without the data's template."""
        return [self._render(p, r) for p, r in zip(prompts, responses, strict=True)]

    def _render(self, prompt: Prompt, response: str) -> str:
        if self._is_chat:
            answer = {"role": "assistant", "content": response}
            messages = [*prompt.conversation(self._prompt_column), answer]
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        content = prompt.text if prompt.content is None else prompt.content
        return full_text(self._template, content, response, prompt.meta)

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids as the model saw them in training, and which texts were cut from the left."""
        all_ids, limit = self._ids(texts, None), self.max_tokens
        cut = [limit is not None and len(ids) > limit for ids in all_ids]
        short = iter(self._ids([t for t, long in zip(texts, cut, strict=True) if long], limit))
        return [next(short) if long else i for i, long in zip(all_ids, cut, strict=True)], cut

    def _ids(self, texts: Sequence[str], limit: int | None) -> list[list[int]]:
        """Ids of each text, never with two BOS tokens: chat templates write one of their own."""
        if not texts:
            return []
        encoded = self.tokenizer(
            [text if self._is_chat else text.removeprefix(self._added_bos) for text in texts],
            add_special_tokens=not self._is_chat,
            truncation=limit is not None,
            max_length=limit,
            verbose=False,
        )
        return [[int(i) for i in ids] for ids in encoded["input_ids"]]


def longest_text(name: str, model: Any, tokenizer: Tokenizer, wanted: int | None) -> int | None:
    """In tokens: what is wanted, or what the model's positions and tokenizer allow (None: any).

    Raises ConfigError when more is wanted than the model reads.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [n for n in (tokenizer.model_max_length, positions) if n is not None and n < 1_000_000]
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            # RoBERTa's kind counts positions from behind the padding's own.
            limits.append(module.num_embeddings - padding - 1)
    context = min(limits, default=None)
    if wanted is not None and context is not None and wanted > context:
        raise ConfigError(
            f"max_tokens={wanted}: reward model {name} reads at most {context} tokens; lower it "
            "or leave it out"
        )
    return context if wanted is None else wanted


def _identity(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that make the same ids of every text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.to_str())
    return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
