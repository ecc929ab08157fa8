"""The text that a reward model reads, from a prompt and a response."""

from __future__ import annotations

from klippo.errors import ConfigError, PreflightError
from klippo.templates import full_text
from klippo.types import Prompt, Tokenizer

CHAT = "chat"


class Renderer:
    """Puts a prompt and a response into the text of a reward model, by its own template."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        *,
        template: str = "{prompt}{response}",
        response_only: bool = False,
        prompt_column: str = "prompt",
    ) -> None:
        """`prompt_column` holds the prompt without the policy's chat template, for `chat`.

        Raises ConfigError for a template without the response, PreflightError for `chat` when the
        tokenizer has no chat template.
        """
        self.is_chat = template == CHAT and not response_only
        self._template = "{response}" if response_only else template
        self._tokenizer = tokenizer
        self._prompt_column = prompt_column
        if self.is_chat and not getattr(tokenizer, "chat_template", None):
            raise PreflightError(
                f"reward model {name}: template=chat needs a tokenizer with a chat "
                "template, and this one has none; write the template out, with {prompt} and "
                "{response}"
            )
        if not self.is_chat and "{" in self._template and "{response}" not in self._template:
            raise ConfigError(
                f"reward model {name}: template={self._template!r} does not contain "
                "{response}, so every response would get the same score; add it"
            )

    def render(self, prompt: Prompt, response: str) -> str:
        """The text; a template of the data around the prompt is left out of {prompt}."""
        if self.is_chat:
            messages = [*self._messages(prompt), {"role": "assistant", "content": response}]
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        content = prompt.text if prompt.content is None else prompt.content
        return full_text(self._template, content, response, prompt.meta)

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        """The conversation before the response.

        The data's own column, where the policy read all of it; else (cut prompts, other columns)
        what the policy read, as one message.
        """
        if prompt.content is not None:
            return [{"role": "user", "content": prompt.content}]
        raw = prompt.meta.get(self._prompt_column)
        messages = [{"role": "user", "content": raw}] if isinstance(raw, str) else raw
        if isinstance(messages, list) and all(
            isinstance(m, dict) and str(m.get("content", "")).strip() in prompt.text
            for m in messages
        ):
            return messages
        return [{"role": "user", "content": prompt.text}]
