"""What flows between the rooms, and the small protocols that the rooms satisfy.

B sequences, P prompt tokens (left-padded), T response tokens (right-padded), K ensemble members.
Masks come from lengths; True always means "keep".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the data set, ready for the policy."""

    id: int
    """Row number in the data set, from 0."""
    text: str
    """What the policy reads, after the chat template or any cut; plain text has no BOS in front."""
    token_ids: list[int]
    """The same as token ids, with a BOS token if the tokenizer adds one."""
    content: str | None = None
    """The prompt without the data's template, which rewards read; None where `text` is that."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Every column of the row, for reward functions."""

    def conversation(self, column: str) -> list[dict[str, str]]:
        """The messages before the response, without the policy's chat template.

        These are `content`; else the data's `column` (text is one message), if the policy read all
        of it; else what the policy read.
        """
        if self.content is not None:
            return [{"role": "user", "content": self.content}]
        messages = self.meta.get(column)
        if isinstance(messages, str) and messages.strip():
            messages = [{"role": "user", "content": messages}]
        if (
            messages
            and isinstance(messages, list)
            and all(
                isinstance(m, dict) and str(m.get("content", "")).strip() in self.text
                for m in messages
            )
        ):
            return messages
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine sampled for one prompt."""

    token_ids: list[int]
    """Up to and including the first stop token."""
    finished: bool
    """True when a stop token ended it, False when the length limit did."""
    logprobs: list[float] | None = None
    """The engine's own log-probs of `token_ids` in nats, if it reports them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedResponse:
    """A response that exists already."""

    prompt: Prompt
    """Its `meta` has this response, its reward and, if rewards are compared with those of the other
    responses to the prompt, their mean under `BASELINE`."""
    completion: Completion
    """`logprobs` are those of the policy that wrote it, if they were recorded."""
    reward: float


BASELINE = "mean reward of the other responses"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Prompts and responses as tensors: all that a model needs to see."""

    prompt_ids: Tensor  # (B, P) int64, left-padded
    prompt_mask: Tensor  # (B, P) bool
    response_ids: Tensor  # (B, T) int64, right-padded
    response_mask: Tensor  # (B, T) bool, True on real tokens including the stop token
    frozen_states: Tensor | None = None
    """(B, P+T, D), the policy's frozen blocks' output for these tokens, if it was kept."""

    def __post_init__(self) -> None:
        assert self.prompt_ids.shape == self.prompt_mask.shape
        assert self.response_ids.shape == self.response_mask.shape
        assert self.prompt_mask.dtype == self.response_mask.dtype == torch.bool

    def __len__(self) -> int:
        return int(self.response_ids.shape[0])

    def rows(self, index: Tensor) -> TokenBatch:
        """These rows alone, without the columns that are padding in all of them."""
        prompt_mask, response_mask = self.prompt_mask[index], self.response_mask[index]
        first = prompt_mask.shape[1] - int(prompt_mask.sum(1).max())
        last = max(int(response_mask.sum(1).max()), 1)
        states = self.frozen_states
        if states is not None:
            states = states[index, first : self.prompt_ids.shape[1] + last]
        return TokenBatch(
            prompt_ids=self.prompt_ids[index, first:],
            prompt_mask=prompt_mask[:, first:],
            response_ids=self.response_ids[index, :last],
            response_mask=response_mask[:, :last],
            frozen_states=states,
        )

    def to(self, device: torch.device | str) -> TokenBatch:
        tensors = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{k: t.to(device) for k, t in tensors.items() if t is not None})


Behavior = Literal["policy", "start", "recorded"]
"""Whose log-probs ratios start from: the policy's as it is now; those of the policy at step 0
(responses of long ago); or recorded ones, `behavior_logprobs`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Prompts, the responses sampled for them, and how they were sampled."""

    prompts: list[Prompt]
    responses: list[str]
    """Decoded, special tokens left out: for rewards and people, never tokenized again to train."""
    tokens: TokenBatch
    finished: Tensor  # (B,) bool, False if the length limit cut the response
    temperature: float
    behavior_logprobs: Tensor | None = None  # (B, T) float32, the engine's (or the file's) own
    behavior: Behavior = "policy"

    def __len__(self) -> int:
        return len(self.prompts)

    def response_token_ids(self) -> list[list[int]]:
        """The responses' token ids without padding."""
        lengths = self.tokens.response_mask.sum(1).tolist()
        ids = self.tokens.response_ids.tolist()
        return [row[:length] for row, length in zip(ids, lengths, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One score per response; NaN means "unscored" and masks the row out of everything."""

    reward: Tensor  # (B,) float32
    members: Tensor | None = None  # (K, B) float32, an ensemble's single scores
    parts: Mapping[str, Tensor] = field(default_factory=dict)  # name -> (B,) float32
    baseline: Tensor | None = None  # (B,) float32: what to compare with, instead of the critic
    not_finite: Mapping[int, str] = field(default_factory=dict)
    """Rows whose reward came as NaN or infinite (`reward` has NaN), and what to say of each."""


class Tokenizer(Protocol):
    """What Klippo uses of a Hugging Face tokenizer."""

    name_or_path: str
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str | None
    pad_token_id: int | None
    all_special_ids: list[int]
    truncation_side: str
    model_max_length: int

    def __len__(self) -> int: ...
    def __call__(self, text: str | list[str], **options: object) -> Mapping[str, Any]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: list[int], **options: object) -> str: ...
    def batch_decode(self, rows: Sequence[Sequence[int]], **options: object) -> list[str]: ...
    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> object: ...
    def convert_ids_to_tokens(self, token_id: int) -> str: ...
    def get_vocab(self) -> dict[str, int]: ...
    def save_pretrained(self, folder: str | Path) -> object: ...


class HFModel(nn.Module):
    """What Klippo uses of a Hugging Face model (a causal LM, a classifier or a trunk); a type only.

    A model returns `logits` if it has a head, and `last_hidden_state` if not.
    """

    config: Any  # transformers' PretrainedConfig
    generation_config: object
    name_or_path: str
    base_model: HFModel
    dtype: torch.dtype
    device: torch.device
    get_output_embeddings: Callable[[], nn.Linear]
    save_pretrained: Callable[..., object]
    gradient_checkpointing_enable: Callable[[Mapping[str, object]], None]


OnDone = Callable[[int, Completion], None]
"""Receives a completion's index among the prompts, and the completion."""


class Engine(Protocol):
    """Samples responses. Another engine needs nothing from PPO."""

    def sync(self) -> None:
        """Take over the policy's current weights."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_lengths: Sequence[int],
        seeds: Sequence[int],
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """One completion per prompt, each at most `max_lengths[i]` tokens long.

        `seeds[i]` (63 bits) alone decides the random numbers of completion i. `on_done(i,
        completion)` is called once for each, as soon as it is finished, in any order.
        """


class RolloutSource(Protocol):
    """Where training responses come from: sampled now, or (offline) read from a file."""

    def next(self) -> Rollout:
        """The next rollout batch."""


class RewardSource(Protocol):
    """Anything that scores a rollout, at once or when awaited."""

    def score(self, rollout: Rollout) -> Scores | Awaitable[Scores]: ...


@runtime_checkable
class EagerRewardSource(RewardSource, Protocol):
    """A slow source that scores single responses while others are still being sampled."""

    async def begin(self, prompt: Prompt, response: str) -> None:
        """Start on a finished response and return at once; `score` asks for it later."""


@runtime_checkable
class Stateful(Protocol):
    """Something whose state, as JSON holds it, a checkpoint keeps."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


def stateful(part: object) -> Stateful | None:
    """The part if it has such a state; PyTorch modules' states are saved otherwise."""
    is_module = isinstance(part, torch.nn.Module)
    return part if isinstance(part, Stateful) and not is_module else None
