"""A sequence-classification model as the reward.

N texts, L labels, S tokens of the longest text in a batch (right-padded), K models.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from klippo.errors import ConfigError, NotFiniteRewardError
from klippo.hub import load_tokenizer
from klippo.rewards import stored
from klippo.rewards.reading import Reader, check_max_tokens, context_of
from klippo.rewards.scorers import architecture, load_scorer
from klippo.rewards.settings import ClassifierSettings
from klippo.types import Prompt, Rollout, Scores, Tokenizer


class ClassifierReward:
    """Scores texts with a frozen classification or reward model and that model's own tokenizer."""

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
        self.settings = settings
        self.device = torch.device(device)
        name = settings.model
        tokenizer = load_tokenizer(name, settings.revision)
        loaded = load_scorer(name, settings.revision, settings.dtype)
        model = loaded.model
        self.scorer = loaded.module.to(self.device)
        self.width = int(getattr(model.config.get_text_config(), "hidden_size", 1))
        context = context_of(model, tokenizer)
        self.reader = Reader(
            name,
            tokenizer,
            template=stored.template_of(settings, loaded.template),
            response_only=settings.reads == "response",
            max_tokens=check_max_tokens(name, settings.max_tokens, context),
            prompt_column=prompt_column,
        )
        self.label = find_label(settings.label, model.config, name)
        self.labels_exclude = getattr(model.config, "problem_type", None) != (
            "multi_label_classification"
        )
        self.filler = _filler_id(model, tokenizer)
        self.family = json.dumps([architecture(loaded), self.reader.key, self.filler])
        """Equal for models that read the same ids and differ in their weights alone."""

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

        A text without any token gets NaN. Raises NotFiniteRewardError when the model returns a
        number that is not finite.
        """

        def outputs(input_ids: Tensor, mask: Tensor) -> Tensor:
            alone: Tensor = self.scorer(input_ids, mask)
            return alone[None]

        values, cut = score_together([self], outputs, prompts, responses)
        return Scores(reward=values[0].to(device), parts={"cut": cut.to(device)})


@torch.no_grad()
def score_together(
    models: Sequence[ClassifierReward],
    outputs: Callable[[Tensor, Tensor], Tensor],
    prompts: Sequence[Prompt],
    responses: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Scores (K, N) float32 on the CPU, and 1 where a text was cut (N,), for models of one family.

    `outputs` maps ids (n, S) and mask (n, S) to the models' outputs (K, n, L). The texts are put
    together and tokenized once. Raises NotFiniteRewardError when an output is not finite.
    """
    first = models[0]
    texts = first.reader.texts(prompts, responses)
    all_ids, cut = first.reader.encode(texts)
    scores = torch.full((len(models), len(texts)), float("nan"))
    batch_size = min(model.settings.batch_size for model in models)
    for rows in _batches([len(ids) for ids in all_ids], batch_size):
        input_ids, mask = _pad([all_ids[row] for row in rows], first.filler, first.device)
        for k, (model, logits) in enumerate(zip(models, outputs(input_ids, mask), strict=True)):
            values = read_output(logits, model.label, model.settings.output, model.labels_exclude)
            if not bool(values.isfinite().all()):
                raise NotFiniteRewardError(
                    f"reward model {model.settings.model} returned a number that is not finite "
                    f"for {texts[rows[int((~values.isfinite()).nonzero()[0])]][:80]!r}; try "
                    "dtype: float32"
                )
            scores[k, rows] = values.cpu()
    return scores, torch.tensor(cut, dtype=torch.float32)


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of texts of like length, longest first, without empty texts."""
    rows = sorted((row for row, n in enumerate(lengths) if n > 0), key=lambda row: -lengths[row])
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def _pad(
    all_ids: Sequence[Sequence[int]], filler: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids (N, S) padded on the right, and their mask (N, S) int64, both from lengths."""
    lengths = torch.tensor([len(ids) for ids in all_ids], device=device)  # (N,)
    width = int(lengths.max())
    padded = [[*ids, *[filler] * (width - len(ids))] for ids in all_ids]
    mask = torch.arange(width, device=device) < lengths[:, None]
    return torch.tensor(padded, device=device), mask.long()


def read_output(logits: Tensor, label: int, output: str, labels_exclude: bool = True) -> Tensor:
    """One number per text (N,) from logits (N, L): the label's logit, log-prob or probability.

    Log-probs are log softmax over the labels, or log sigmoid if there is one label, or if
    `labels_exclude` is False: each label is a separate question then.
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


def _filler_id(model: Any, tokenizer: Tokenizer) -> int:
    """Pads shorter texts; masked, but RoBERTa's kind finds positions by it."""
    config = model.config.get_text_config()
    for name in ("pad_token_id", "eos_token_id"):
        for holder in (config, tokenizer):
            token_id = getattr(holder, name, None)
            if isinstance(token_id, int) and 0 <= token_id < config.vocab_size:
                return token_id
    return 0
