"""A sequence-classification model as the reward.

N texts, L labels, S tokens of the longest text in a batch (right-padded).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klippo.errors import ConfigError, RewardError
from klippo.hub import load_model, load_tokenizer
from klippo.rewards.rendering import Renderer
from klippo.rewards.settings import ClassifierSettings
from klippo.types import Prompt, Rollout, Scores


class ClassifierReward:
    """Scores texts with a frozen classification or reward model and that model's own tokenizer.

    A causal model (a linear `score` on its trunk) is read at the last real token, found from the
    text's length: transformers' own forward looks for the last token that is not the padding token,
    and so skips an end-of-sequence token wherever the two are one.
    """

    def __init__(
        self,
        settings: ClassifierSettings,
        *,
        device: torch.device | str = "cpu",
        prompt_column: str = "prompt",
    ) -> None:
        """Load model and tokenizer.

        `prompt_column` names the data's column with the prompt, which `template: chat` reads.
        Raises PreflightError when model or tokenizer cannot be loaded or lack a part, ConfigError
        when the label, the template or `max_tokens` do not fit them.
        """
        self._settings = settings
        self._device = torch.device(device)
        self._tokenizer = load_tokenizer(settings.model, settings.revision)
        self._tokenizer.truncation_side = "left"
        adds_bos = self._tokenizer("a")["input_ids"][:1] == [self._tokenizer.bos_token_id]
        self._added_bos: str = self._tokenizer.bos_token if adds_bos else ""
        self._model = _load_model(settings).to(self._device)
        self._renderer = Renderer(settings, self._tokenizer, prompt_column)
        self._label = find_label(settings.label, self._model.config, settings.model)
        self._excludes = getattr(self._model.config, "problem_type", None) != (
            "multi_label_classification"
        )
        self._max_tokens = _max_tokens(settings, self._model, self._tokenizer)
        self._filler = _filler_id(self._model, self._tokenizer)

    def score(self, rollout: Rollout) -> Scores:
        """reward: (B,) float32; parts: `cut` (B,), 1 where the text was too long for the model."""
        return self.score_pairs(
            rollout.prompts, rollout.responses, device=rollout.tokens.response_ids.device
        )

    def score_pairs(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        *,
        device: torch.device | str = "cpu",
    ) -> Scores:
        """The same from prompts and decoded responses alone; the scores lie on `device`.

        A text without any token gets NaN. Raises RewardError when the model returns a number that
        is not finite.
        """
        texts = [self._renderer.render(p, r) for p, r in zip(prompts, responses, strict=True)]
        all_ids, cut = self._tokenize(texts)
        rewards = torch.full((len(texts),), float("nan"))
        for rows in self._batches([len(ids) for ids in all_ids]):
            logits = self._logits([all_ids[row] for row in rows])
            values = read_output(logits, self._label, self._settings.output, self._excludes)
            rewards[rows] = values.cpu()
            if not bool(values.isfinite().all()):
                raise RewardError(
                    f"reward model {self._settings.model} returned a number that is not finite "
                    f"for {texts[rows[int((~values.isfinite()).nonzero()[0])]][:80]!r}; try "
                    "dtype: float32"
                )
        parts = {"cut": torch.tensor(cut, dtype=torch.float32, device=device)}
        return Scores(reward=rewards.to(device), parts=parts)

    def _tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids as the model saw them in training, and which texts were cut from the left."""
        all_ids = [self._encode(text, None) for text in texts]
        limit = self._max_tokens
        if limit is None:
            return all_ids, [False] * len(texts)
        cut = [len(ids) > limit for ids in all_ids]
        return [
            self._encode(text, limit) if long else ids
            for text, ids, long in zip(texts, all_ids, cut, strict=True)
        ], cut

    def _encode(self, text: str, limit: int | None) -> list[int]:
        """One text's ids, never with two BOS tokens: chat templates write one of their own."""
        encoded = self._tokenizer(
            text if self._renderer.is_chat else text.removeprefix(self._added_bos),
            add_special_tokens=not self._renderer.is_chat,
            truncation=limit is not None,
            max_length=limit,
            verbose=False,
        )
        return [int(i) for i in encoded["input_ids"]]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Row numbers in batches of texts of like length, longest first, without empty texts."""
        rows = sorted(
            (row for row, n in enumerate(lengths) if n > 0), key=lambda row: -lengths[row]
        )
        size = self._settings.batch_size
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    @torch.no_grad()
    def _logits(self, all_ids: Sequence[Sequence[int]]) -> Tensor:
        """The model's outputs (N, L) float32."""
        lengths = torch.tensor([len(ids) for ids in all_ids], device=self._device)  # (N,)
        width = int(lengths.max())
        input_ids = torch.tensor(
            [[*ids, *[self._filler] * (width - len(ids))] for ids in all_ids], device=self._device
        )  # (N, S)
        mask = (torch.arange(width, device=self._device) < lengths[:, None]).long()  # (N, S)
        model = self._model
        if not isinstance(getattr(model, "score", None), nn.Linear):
            logits: Tensor = model(input_ids=input_ids, attention_mask=mask).logits
        else:
            trunk = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
            rows = torch.arange(len(all_ids), device=self._device)
            logits = model.score(trunk.last_hidden_state[rows, lengths - 1])
        return logits.float()


def read_output(logits: Tensor, label: int, output: str, labels_exclude: bool = True) -> Tensor:
    """One number per text (N,) from logits (N, L): the label's logit, log-prob or probability.

    Log-probs are log softmax over the labels, or log sigmoid where there is one label, or where
    `labels_exclude` is False: each label is a question of its own then.
    """
    if output == "logit":
        return logits[:, label]
    over_labels = labels_exclude and logits.shape[1] > 1
    logprobs = F.log_softmax(logits, -1) if over_labels else F.logsigmoid(logits)
    return logprobs[:, label] if output == "logprob" else logprobs[:, label].exp()


def find_label(label: str | int | None, config: Any, model: str) -> int:
    """The number of the output that `label` names; raises ConfigError listing what there is."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    if label is None:
        if len(names) == 1:
            return 0
        raise ConfigError(
            f"reward model {model} has {len(names)} outputs ({listed}); set label to one of them"
        )
    if isinstance(label, int):
        if 0 <= label < len(names):
            return label
        raise ConfigError(f"label={label}: reward model {model} has the outputs {listed}")
    folded = [name.casefold() for name in names]
    if label.casefold() in folded:
        return folded.index(label.casefold())
    near = difflib.get_close_matches(label.casefold(), folded, n=1)
    hint = f"; did you mean {names[folded.index(near[0])]}?" if near else "; choose one of them"
    raise ConfigError(f"label={label!r}: reward model {model} has the outputs {listed}{hint}")


def _load_model(settings: ClassifierSettings) -> Any:
    """The frozen model, dropout off."""
    from transformers import AutoModelForSequenceClassification

    model = load_model(
        AutoModelForSequenceClassification,
        settings.model,
        settings.revision,
        dtype=getattr(torch, settings.dtype),
    )
    return model.eval().requires_grad_(False)


def _max_tokens(settings: ClassifierSettings, model: Any, tokenizer: Any) -> int | None:
    """Longest text in tokens: what was asked for, or the model's context (None: no limit)."""
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
    context = min(limits, default=None)
    if settings.max_tokens is not None and context is not None and settings.max_tokens > context:
        raise ConfigError(
            f"max_tokens={settings.max_tokens}: reward model {settings.model} reads at most "
            f"{context} tokens; lower it or leave it out"
        )
    return context if settings.max_tokens is None else settings.max_tokens


def _filler_id(model: Any, tokenizer: Any) -> int:
    """What stands behind a shorter text; masked, but RoBERTa's kind finds positions by it."""
    config = model.config.get_text_config()
    for name in ("pad_token_id", "eos_token_id"):
        for holder in (config, tokenizer):
            found = getattr(holder, name, None)
            if isinstance(found, int) and 0 <= found < config.vocab_size:
                return found
    return 0
