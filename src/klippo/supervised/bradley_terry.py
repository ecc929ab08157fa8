"""One reward model from preference pairs, by TRL's RewardTrainer (Bradley and Terry 1952).

loss = -log sigmoid(r_chosen - r_rejected - margin) + center_coef * (r_chosen + r_rejected)^2,
averaged over the pairs of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from klippo.data.preferences import Pair
from klippo.errors import PreflightError
from klippo.hub import (
    LOADING_ERRORS,
    code_option,
    load_model,
    load_tokenizer,
    not_loaded,
    resolve,
)
from klippo.policy.adapters import add_lora
from klippo.policy.loading import turn_dropout_off
from klippo.rewards.reading import Reader, longest_text
from klippo.supervised.settings import RewardModelConfig, RewardModelSettings
from klippo.supervised.training import (
    Training,
    make_trainer,
    quiet_trl,
    refuse_adapter_folder,
    run_trainer,
)
from klippo.types import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer


def train_reward_model(
    pairs: Sequence[Pair], config: RewardModelConfig, training: Training
) -> tuple[PreTrainedModel, Tokenizer, int]:
    """Model, tokenizer, and the number of texts that were too long and lost their start.

    The training's seed draws the score head and the order of the pairs. Raises PreflightError when
    the model cannot be trained so, ConfigError when template or `max_tokens` do not fit it,
    DivergedError when training fails.
    """
    name = config.model.name
    with quiet_trl():
        model = load_classifier(config.model, training.seed)
        tokenizer = load_tokenizer(name, config.model.revision)
        reader = Reader(
            name,
            copy.deepcopy(tokenizer),
            template=config.template,
            max_tokens=longest_text(name, model, tokenizer, config.max_tokens),
            prompt_column=config.prompt_column,
        )
        columns, num_cut = tokenize(pairs, reader)
        pad = model.config.get_text_config().pad_token_id
        trainer = reward_trainer(model, tokenizer, columns, config, training)
        model = run_trainer(trainer, training.report)
        if config.model.tuning == "lora":
            model = model.merge_and_unload()
        model.config.get_text_config().pad_token_id = pad
    return model, tokenizer, num_cut


def load_classifier(settings: RewardModelSettings, seed: int) -> PreTrainedModel:
    """A sequence classifier with one output and dropout off; a missing head is drawn by `seed`.

    Raises PreflightError for a model with several outputs, for an adapter without its model, and
    if more than the head is missing.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    refuse_adapter_folder(
        settings.name,
        settings.revision,
        "give its base model as model.name, and this folder as model.adapter",
    )
    name = resolve(settings.name)
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
            name,
            revision=settings.revision,
            num_labels=1,
            output_loading_info=True,
            dtype=getattr(torch, settings.dtype),
            **trust,
        )
    except LOADING_ERRORS as error:
        raise not_loaded(settings.name, error) from error
    trunk = f"{model.base_model_prefix}."
    missing = sorted(
        key for key in loaded["missing_keys"] if key.startswith(trunk) and ".pooler." not in key
    )
    if missing:
        raise PreflightError(
            f"model.name={settings.name}: the checkpoint lacks weights besides the score head "
            f"({', '.join(missing[:4])}); give a complete model"
        )
    if settings.adapter is not None:
        model.base_model.load_state_dict(_merged_trunk(settings, settings.adapter))
    turn_dropout_off(model)
    return model


def _merged_trunk(settings: RewardModelSettings, adapter: str) -> dict[str, torch.Tensor]:
    """Weights of the causal LM's trunk with the adapter merged into them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, settings.dtype)
    causal = load_model(AutoModelForCausalLM, settings.name, settings.revision, dtype=dtype)
    try:
        merged = PeftModel.from_pretrained(causal, resolve(adapter)).merge_and_unload()
    except LOADING_ERRORS as error:
        raise not_loaded(f"model.adapter={adapter}", error) from error
    weights: dict[str, torch.Tensor] = merged.base_model.state_dict()
    return weights


def tokenize(pairs: Sequence[Pair], reader: Reader) -> tuple[dict[str, list[Any]], int]:
    """Columns chosen_ids, rejected_ids and, if pairs have one, margin; and how many were cut."""
    prompts = [pair.prompt for pair in pairs]
    chosen, chosen_cut = reader.encode(reader.texts(prompts, [pair.chosen for pair in pairs]))
    rejected, rejected_cut = reader.encode(reader.texts(prompts, [pair.rejected for pair in pairs]))
    columns: dict[str, list[Any]] = {"chosen_ids": chosen, "rejected_ids": rejected}
    if any(pair.margin is not None for pair in pairs):
        columns["margin"] = [pair.margin or 0.0 for pair in pairs]
    return columns, sum(chosen_cut) + sum(rejected_cut)


def filler_id(model: PreTrainedModel, columns: Mapping[str, list[list[int]]]) -> int:
    """What stands behind a shorter text: a token with which no text ends.

    transformers' classifiers on causal models read the last token that is not the padding token,
    which would skip a real end-of-sequence token if the two are one. The filler is masked, so
    any other token serves. Encoders find positions by their own padding token and keep it.
    """
    config = model.config.get_text_config()
    pad = config.pad_token_id
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return 0 if pad is None else int(pad)
    last = {ids[-1] for ids in (*columns["chosen_ids"], *columns["rejected_ids"])}
    candidates = range(config.vocab_size) if pad is None else (pad, *range(config.vocab_size))
    return next(int(token) for token in candidates if token not in last)


def reward_trainer(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    columns: dict[str, list[Any]],
    config: RewardModelConfig,
    training: Training,
) -> Trainer:
    """TRL's RewardTrainer on pairs that are tokenized already."""
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    filler = filler_id(model, columns)
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(filler)
    if config.model.tuning == "lora":
        model = add_lora(model, config.model.lora, "model.lora", task="SEQ_CLS")
    center_coef = config.training.center_coef or None
    trainer = make_trainer(
        RewardTrainer,
        RewardConfig,
        model,
        tokenizer,
        columns,
        training,
        options={"center_rewards_coefficient": center_coef, "disable_dropout": True},
        data_collator=DataCollatorForPreference(pad_token_id=filler),
    )
    trainer.model.config.get_text_config().pad_token_id = filler  # TRL put its own there
    return trainer
