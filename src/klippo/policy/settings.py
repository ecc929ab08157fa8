"""Settings of the policy and the critic."""

from typing import Literal

from pydantic import Field, PositiveInt

from klippo.settings import CodeSettings, Settings

Sharding = Literal["none", "fsdp", "shard_grad_op"]
"""How several processes hold the models: in full, or in shards (FSDP2); `shard_grad_op` keeps
gathered weights from the forward to the backward pass."""


class LoraSettings(Settings):
    rank: int = Field(default=16, ge=1, le=16_384)
    """Rank of the update matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Which linear layers get an adapter; the LM head never does."""


class PolicySettings(CodeSettings):
    model: str
    """Folder, hub name, or `demo:policy` for the model that ships with Klippo."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    adapter: str | None = None
    """Existing LoRA adapter to start from; the reference is then base model plus this adapter."""
    tuning: Literal["full", "lora", "last_layers"] = "full"
    """What is trained: every weight, LoRA adapters, or the last `num_unfrozen_layers` blocks."""
    num_unfrozen_layers: PositiveInt = 2
    """With `tuning: last_layers`: how many blocks train (counted from the top)."""
    lora: LoraSettings = LoraSettings()
    """With `tuning: lora`: the adapter's shape (ignored when `adapter` is given)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the weights; adapters and value heads stay float32."""
    autocast: bool = False
    """Compute matrix products in bfloat16 (GPU) while weights keep `dtype`."""
    quantize_4bit: bool = False
    """Load the frozen base in 4 bits (bitsandbytes, CUDA, `tuning: lora` only)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class CriticSettings(CodeSettings):
    kind: Literal["trunk", "lora", "separate"] = "trunk"
    """Value head on the policy's trunk, a LoRA adapter on the same base, or a model of its own."""
    model: str | None = None
    """With `kind: separate`: start from this reward model, head included; default: the policy's
    weights with a new head."""
    lora: LoraSettings = LoraSettings()
    """With `kind: lora`: the critic adapter's shape."""
