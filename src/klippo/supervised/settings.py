"""Settings of supervised fine-tuning and of reward-model training."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from klippo.config.schema import WholeConfig
from klippo.data.settings import DataSettings, PreferenceSettings
from klippo.policy.settings import LoraSettings
from klippo.settings import CodeSettings, Count, LengthRange, Settings, near_divisors


class ModelSettings(CodeSettings):
    model_key: ClassVar[str] = "name"
    name: str
    """Folder, hub name, or `demo:policy` for the model that ships with Klippo."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    tuning: Literal["full", "lora"] = "full"
    """What is trained: every weight, or LoRA adapters."""
    lora: LoraSettings = LoraSettings()
    """With `tuning: lora`: the adapter's shape."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the weights."""


class RewardModelSettings(ModelSettings):
    """A policy or SFT model, which gets a new score head; a model with one output keeps its own."""

    adapter: str | None = None
    """LoRA adapter of that model (as `klippo sft` writes it), merged before training."""


class TrainingSettings(Settings):
    num_epochs: Count = 1
    """Passes over the data."""
    batch_size: Count = 32
    """Examples (or pairs) per optimizer step."""
    micro_batch_size: PositiveInt | None = None
    """Examples (or pairs) per forward and backward pass: changes memory, not numbers; default: the
    whole batch."""
    learning_rate: PositiveFloat = 1e-5
    """AdamW's peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay after warm-up, to 0 at the end."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the optimizer steps in which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the global gradient norm; null turns it off."""
    autocast: bool = False
    """Compute matrix products in bfloat16 while weights keep their dtype."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro != 0:
            raise ValueError(
                f"micro_batch_size={micro} must divide batch_size={self.batch_size}; "
                f"try {min(near_divisors(micro, self.batch_size)[:2])}"
            )
        return self


class RewardTrainingSettings(TrainingSettings):
    center_coef: float = Field(default=0.0, ge=0)
    """Weight of the mean squared sum of a pair's two scores, which keeps scores around 0
    (Eisenstein et al. 2023, eq. 2); 0.01 is usual, 0 is off."""


class ReferenceSettings(CodeSettings):
    """One shared set of responses, on which every member's mean and spread are measured."""

    model_key: ClassVar[str] = "policy"

    policy: str
    """Whose responses: a model folder, a run folder, a hub name, or `demo:policy`; PPO's start."""
    prompts: str
    """Prompts for it: a file, a hub data set, or `demo:prompts`."""
    prompt_column: str = "prompt"
    """Column with the prompt."""
    template: str | None = None
    """Text around the prompt that the policy reads, as in `data.template` of `klippo train`."""
    format: Literal["text", "chat"] = "text"
    """How the policy reads the prompt, as in `data.format` of `klippo train`."""
    cut_tokens: LengthRange | None = None
    """Keep only so many first tokens of a prompt, as in `data.cut_tokens` of `klippo train`."""
    num_samples: int = Field(default=512, ge=2, le=1_000_000)
    """How many responses; prompts repeat if there are fewer."""
    response_length: PositiveInt | LengthRange = 64
    """Most tokens of a response, as in `rollout.response_length` of `klippo train`."""
    temperature: PositiveFloat = 1.0
    """Divides the logits."""
    seed: NonNegativeInt = 0
    """Seed of prompts and responses, the same for every member."""


class ExampleSettings(DataSettings):
    """What `klippo sft` learns to write."""

    response_column: str | None = "response"
    """Column with the response, on which alone the loss stands; null: all of the prompt column is
    learnt, text or chat messages that end with the assistant's."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with an example that is longer than `max_tokens`: stop, or leave it out."""
    max_tokens: PositiveInt | None = None
    """Longest example, prompt, response and end token together; default: the model's context."""

    @model_validator(mode="after")
    def _whole_examples(self) -> Self:
        for name in ("cut_tokens", "max_prompt_tokens"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} cuts prompts for PPO; supervised fine-tuning "
                    "learns whole examples: remove it"
                )
        return self


class RewardModelConfig(WholeConfig):
    """Reward models from one set of preferences: one member per seed."""

    recipe_folder: ClassVar[str] = "reward-model"

    seed: NonNegativeInt = 0
    """Seed of the member: score head, order of the pairs, bagging."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    """One member per seed, instead of the one of `seed`; 5 make an ensemble."""
    output_dir: str = "runs/{name}"
    """Members are the folders `{output_dir}_seed1` and so on; `{name}` is the config's name."""
    model: RewardModelSettings
    """What the members start from."""
    data: PreferenceSettings
    """The preferences."""
    template: str = "{prompt}{response}"
    """Text that the model reads: written out with {prompt} and {response}, or `chat` (the model's
    own chat template), `alpaca` or `open-assistant`. Stored with the model."""
    max_tokens: PositiveInt | None = None
    """Cut longer texts from the left; default: the model's context."""
    training: RewardTrainingSettings = RewardTrainingSettings()
    """Optimizer, batches and loss."""
    reference: ReferenceSettings | None = None
    """Responses on which mean and spread of every member are measured and stored with it."""

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        seeds = self.seeds or []
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if twice:
            raise ValueError(
                f"seeds={seeds}: {twice[0]} is there twice, and would train the same member twice; "
                "remove one"
            )
        return self

    @property
    def member_seeds(self) -> list[int]:
        """One seed per member."""
        return [self.seed] if self.seeds is None else list(self.seeds)

    @property
    def prompt_column(self) -> str:
        """The column that `template: chat` reads."""
        return self.data.prompt_column if isinstance(self.data.prompt_column, str) else "prompt"


class SFTConfig(WholeConfig):
    """Supervised fine-tuning of a causal language model."""

    recipe_folder: ClassVar[str] = "sft"

    output_dir: str = "runs/{name}"
    """The folder that then is the model (or the adapter); `{name}` is the config's name."""
    model: ModelSettings
    """The model that learns."""
    data: ExampleSettings
    """What it learns to write."""
    training: TrainingSettings = TrainingSettings()
    """Optimizer and batches."""
