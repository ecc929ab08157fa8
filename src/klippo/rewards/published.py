"""Reward models of published systems whose classes transformers does not know.

Each is loaded from the files that its authors' code wrote: config.json and weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from transformers import (
    AutoConfig,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
)

from klippo.errors import PreflightError


class AlpacaFarmConfig(PretrainedConfig):  # type: ignore[misc]
    """`reward_model`: names the LLaMA model whose shape the backbone has."""

    model_type = "reward_model"

    def __init__(self, backbone_model_name_or_path: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.backbone_model_name_or_path = backbone_model_name_or_path
        self.num_labels = 1


class AlpacaFarmRewardModel(PreTrainedModel):  # type: ignore[misc]
    """AlpacaFarm's reward model (Dubois et al. 2023): LLaMA, a scalar head on the last token.

    Its files hold a whole causal LM under `backbone_model`; the LM head is not read.
    """

    config_class = AlpacaFarmConfig
    base_model_prefix = "backbone_model.model"
    _keys_to_ignore_on_load_unexpected = (r"lm_head", r"rotary_emb\.inv_freq")

    def __init__(self, config: AlpacaFarmConfig) -> None:
        super().__init__(config)
        backbone = _backbone_config(config)
        for name in ("vocab_size", "hidden_size", "max_position_embeddings", "pad_token_id"):
            setattr(config, name, getattr(backbone, name))
        self.backbone_model = nn.Module()
        self.backbone_model.model = LlamaModel(backbone)
        self.reward_head = nn.Linear(backbone.hidden_size, 1)
        self.post_init()


def _backbone_config(config: AlpacaFarmConfig) -> LlamaConfig:
    name = config.backbone_model_name_or_path
    remedy = (
        "set backbone_model_name_or_path in the reward model's config.json to a folder or hub name "
        "with the LLaMA config (for the published 7B models, huggyllama/llama-7b)"
    )
    if not name:
        raise PreflightError(f"AlpacaFarm reward model without a backbone's name; {remedy}")
    try:
        backbone = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PreflightError(
            f"AlpacaFarm reward model: its backbone {name} cannot be found; {remedy}"
        ) from error
    if not isinstance(backbone, LlamaConfig):
        raise PreflightError(
            f"AlpacaFarm reward model: its backbone {name} is a {backbone.model_type} model, and "
            f"must be LLaMA; {remedy}"
        )
    return backbone


class OpenAssistantConfig(GPTNeoXConfig):  # type: ignore[misc]
    """`gpt_neox_reward_model`: GPT-NeoX and how the hidden states become one."""

    model_type = "gpt_neox_reward_model"

    def __init__(self, pooling: str = "last", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pooling = pooling
        self.num_labels = 1


class OpenAssistantRewardModel(PreTrainedModel):  # type: ignore[misc]
    """Open-Assistant's reward model for Pythia: GPT-NeoX, a scalar head on the last token.

    The reward models of the ensembles' paper (Coste et al. 2023) are of this class.
    """

    config_class = OpenAssistantConfig
    base_model_prefix = "gpt_neox"
    _keys_to_ignore_on_load_unexpected = (
        r"attention\.(masked_)?bias",
        r"rotary_emb\.inv_freq",
    )

    def __init__(self, config: OpenAssistantConfig) -> None:
        super().__init__(config)
        if config.pooling != "last":
            raise PreflightError(
                f"reward model with pooling={config.pooling}: only the last token's score is read; "
                "use a model that was trained with pooling=last"
            )
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = nn.Linear(config.hidden_size, 1)
        self.post_init()


class Published(NamedTuple):
    """What to load, where trunk and head are, and the text format that it was trained on."""

    model_class: Any
    parts: Callable[[Any], tuple[Any, nn.Linear]]
    template: str


KINDS = {
    AlpacaFarmConfig.model_type: Published(
        AlpacaFarmRewardModel, lambda m: (m.backbone_model.model, m.reward_head), "alpaca"
    ),
    OpenAssistantConfig.model_type: Published(
        OpenAssistantRewardModel, lambda m: (m.gpt_neox, m.out_proj), "open-assistant"
    ),
}
"""`model_type` of config.json -> class."""
