"""One reward model from preference pairs, by TRL's RewardTrainer (Bradley and Terry 1952).

loss = -log sigmoid(r_chosen - r_rejected - margin) + center_coef * (r_chosen + r_rejected)^2,
averaged over the pairs of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from klippo.data.preference_rows import Pair
from klippo.errors import PreflightError
from klippo.hub import (
    LOADING_ERRORS,
    code_option,
    load_model,
    no_progress_bars,
    not_loaded,
    resolve,
)
from klippo.policy.loading import turn_dropout_off
from klippo.rewards.reading import Reader, check_max_tokens, context_of
from klippo.supervised.settings import RewardModelSettings, RewardTrainingSettings
from klippo.supervised.training import (
    Report,
    Training,
    add_lora,
    load_own_tokenizer,
    make_trainer,
    quiet_trl,
    refuse_adapter_folder,
    run_trainer,
    unwrapped,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A reward model, and what belongs to it."""

    model: Any
    tokenizer: Any
    num_cut: int
    """Texts that were too long and lost their start."""

    def save(self, folder: Path) -> None:
        """Write both as from_pretrained reads them."""
        with no_progress_bars():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def train_reward_model(
    pairs: Sequence[Pair],
    model: RewardModelSettings,
    training: RewardTrainingSettings,
    *,
    template: str,
    max_tokens: int | None,
    prompt_column: str,
    seed: int,
    device: torch.device,
    report: Report,
) -> Trained:
    """Train on the pairs; `seed` draws the score head and the order of the pairs.

    Raises PreflightError when the model cannot be trained so, ConfigError when template or
    `max_tokens` do not fit it, DivergedError when training fails.
    """
    with quiet_trl():
        classifier = load_classifier(model, seed)
        tokenizer = load_own_tokenizer(model)
        limit = check_max_tokens(model.name, max_tokens, context_of(classifier, tokenizer))
        reader = Reader(
            model.name,
            copy.deepcopy(tokenizer),
            template=template,
            max_tokens=limit,
            prompt_column=prompt_column,
        )
        rows, num_cut = tokenize(pairs, reader)
        own_pad = classifier.config.get_text_config().pad_token_id
        trainer = reward_trainer(classifier, tokenizer, rows, model, training, seed, device)
        run_trainer(trainer, report)
        trained = finished(trainer, own_pad)
    return Trained(model=trained, tokenizer=tokenizer, num_cut=num_cut)


def load_classifier(settings: RewardModelSettings, seed: int) -> Any:
    """A sequence classifier with one output and dropout off; a missing head is drawn by `seed`.

    Raises PreflightError for a model with several outputs, for an adapter without its model, and
    where more than the head is missing.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    refuse_adapter_folder(
        settings.name,
        settings.revision,
        "give its base model as model.name, and this folder as model.adapter",
    )
    name = resolve(settings.name)
    options = {"revision": settings.revision, "dtype": getattr(torch, settings.dtype)}
    trust = code_option(settings.name)
    torch.manual_seed(seed)
    try:
        config = AutoConfig.from_pretrained(name, revision=settings.revision, **trust)
        architectures = getattr(config, "architectures", None) or []
        is_classifier = any("ForSequenceClassification" in a for a in architectures)
        if is_classifier and config.num_labels != 1:
            raise PreflightError(
                f"model.name={settings.name} is a classifier with {config.num_labels} outputs; a "
                "reward model has one: give a policy or SFT model, or a classifier with one output"
            )
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, output_loading_info=True, **trust, **options
        )
    except LOADING_ERRORS as error:
        raise not_loaded(settings.name, error) from error
    lacking = sorted(key for key in loaded["missing_keys"] if _in_trunk(key, model))
    if lacking:
        raise PreflightError(
            f"model.name={settings.name}: the checkpoint lacks weights besides the score head "
            f"({', '.join(lacking[:4])}); give a whole model"
        )
    if settings.adapter is not None:
        model.base_model.load_state_dict(_merged_trunk(settings, options))
    turn_dropout_off(model)
    return model


def _in_trunk(key: str, model: Any) -> bool:
    return key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key


def _merged_trunk(settings: RewardModelSettings, options: dict[str, Any]) -> dict[str, Any]:
    """Weights of the causal LM's trunk with the adapter in them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert settings.adapter is not None
    causal = load_model(AutoModelForCausalLM, settings.name, **options)
    try:
        merged = PeftModel.from_pretrained(causal, resolve(settings.adapter)).merge_and_unload()
    except LOADING_ERRORS as error:
        raise not_loaded(f"model.adapter={settings.adapter}", error) from error
    weights: dict[str, Any] = merged.base_model.state_dict()
    return weights


def tokenize(pairs: Sequence[Pair], reader: Reader) -> tuple[dict[str, list[Any]], int]:
    """Columns chosen_ids, rejected_ids and, where pairs have one, margin; and how many were cut."""
    prompts = [pair.prompt for pair in pairs]
    chosen, chosen_cut = reader.encode(reader.texts(prompts, [pair.chosen for pair in pairs]))
    rejected, rejected_cut = reader.encode(reader.texts(prompts, [pair.rejected for pair in pairs]))
    rows: dict[str, list[Any]] = {"chosen_ids": chosen, "rejected_ids": rejected}
    if any(pair.margin is not None for pair in pairs):
        rows["margin"] = [pair.margin or 0.0 for pair in pairs]
    return rows, sum(chosen_cut) + sum(rejected_cut)


def filler_id(model: Any, rows: dict[str, list[Any]]) -> int:
    """What stands behind a shorter text: a token with which no text ends.

    transformers' classifiers on causal models read the last token that is not the padding token,
    which would skip a real end-of-sequence token where the two are one. The filler is masked, so
    any other token serves. Encoders find positions by their own padding token and keep it.
    """
    config = model.config.get_text_config()
    own = config.pad_token_id
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return 0 if own is None else int(own)
    last = {ids[-1] for ids in (*rows["chosen_ids"], *rows["rejected_ids"])}
    candidates = range(config.vocab_size) if own is None else (own, *range(config.vocab_size))
    return next(int(token) for token in candidates if token not in last)


def finished(trainer: Any, own_pad: int | None) -> Any:
    """The trained classifier with adapters merged and its own padding token back."""
    model = unwrapped(trainer)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.config.get_text_config().pad_token_id = own_pad
    return model


def reward_trainer(
    classifier: Any,
    tokenizer: Any,
    rows: dict[str, list[Any]],
    model: RewardModelSettings,
    training: RewardTrainingSettings,
    seed: int,
    device: torch.device,
) -> Any:
    """TRL's RewardTrainer on pairs that are tokenized already."""
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    filler = filler_id(classifier, rows)
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(filler)
    if model.tuning == "lora":
        classifier = add_lora(classifier, model.lora, "SEQ_CLS")
    center_coef = training.center_coef or None
    trainer = make_trainer(
        RewardTrainer,
        RewardConfig,
        classifier,
        tokenizer,
        rows,
        Training(settings=training, seed=seed, device=device),
        options={"center_rewards_coefficient": center_coef, "disable_dropout": True},
        data_collator=DataCollatorForPreference(pad_token_id=filler),
    )
    # TRL put its own padding token there.
    trainer.model.config.get_text_config().pad_token_id = filler
    return trainer
