"""A sequence-classification model as the reward.

N texts, L labels, S tokens of the longest text in a batch (right-padded), K models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from klippo.errors import ConfigError, NotFiniteRewardError, nearest
from klippo.hub import load_tokenizer
from klippo.rewards import stored
from klippo.rewards.reading import Reader, longest_text
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
        self.reader = Reader(
            name,
            tokenizer,
            template=stored.template_of(settings, loaded.template),
            response_only=settings.reads == "response",
            max_tokens=longest_text(name, model, tokenizer, settings.max_tokens),
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
    by_length = sorted((row for row, i in enumerate(all_ids) if i), key=lambda r: -len(all_ids[r]))
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        ids = [torch.tensor(all_ids[row]) for row in rows]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=first.filler)  # (N, S)
        mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        input_ids, mask = input_ids.to(first.device), mask.to(first.device)
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
    near = nearest(label.casefold(), folded)
    hint = f"; did you mean {names[folded.index(near)]}?" if near else "; choose one of them"
    raise ConfigError(f"label={label!r}: reward model {model} has the outputs {listed}{hint}")


def _filler_id(model: Any, tokenizer: Tokenizer) -> int:
    """Pads shorter texts; masked, but RoBERTa's kind finds positions by it."""
    config = model.config.get_text_config()
    ids = (
        getattr(holder, name, None)
        for name in ("pad_token_id", "eos_token_id")
        for holder in (config, tokenizer)
    )
    return next((i for i in ids if isinstance(i, int) and 0 <= i < config.vocab_size), 0)
