"""Settings of sampling."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, Strict

from klippo.settings import LengthRange, Settings


class VLLMSettings(Settings):
    """What vLLM may use beside its copy of the weights."""

    gpu_memory_utilization: float = Field(default=0.3, gt=0, lt=1)
    """On a GPU: share of its memory for vLLM's weights and key-value cache together."""
    kv_cache_gib: PositiveFloat = 1.0
    """On the CPU: memory of the key-value cache."""
    max_model_len: PositiveInt | None = None
    """Most tokens of a prompt and its response; default: the longest prompt of the data and the
    longest response."""
    enforce_eager: bool = True
    """Do not compile the model; compiling pays off in long runs on GPUs alone."""
    sleep: bool = False
    """On a GPU: give vLLM's memory back between batches; its weights wait in the host's memory."""


class RolloutSettings(Settings):
    engine: Literal["hf", "vllm"] = "hf"
    """Who samples: the policy itself, or vLLM on a copy of its weights (installed apart)."""
    vllm: VLLMSettings = VLLMSettings()
    """With `engine: vllm`."""
    response_length: PositiveInt | LengthRange = 64
    """Most tokens of a response; a pair [low, high] draws each response's limit uniformly."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits; the same temperature enters every log-prob."""
    top_k: int = Field(default=0, ge=0)
    """0 is off. Training refuses truncation: what is sampled must be what is scored."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """1 is off. Training refuses truncation, as for `top_k`."""
    min_response_length: int = Field(default=0, ge=0)
    """0 is off. Training refuses a minimum, as for `top_k`; penalise short responses instead."""
    stop_at_eos: bool = True
    """Stop at the end-of-sequence tokens of the tokenizer and the model; False fixes the length."""
    stop_tokens: Annotated[tuple[str | int, ...], Strict(False)] = ()
    """More stop tokens, as text of one token or as ids."""
    generation_batch_size: PositiveInt | None = None
    """Prompts decoded at once; default: all of them."""
    merge_adapters: bool = True
    """With `engine: hf` and LoRA: sample with the adapter folded into a copy of the weights that it
    adapts, if the policy computes in float32 and is not sharded."""
    record_logprobs: bool = False
    """Keep the sampler's own log-probs and report how far they are from the training forward's;
    with `engine: vllm` they always are."""

    @property
    def keeps_logprobs(self) -> bool:
        return self.record_logprobs or self.engine == "vllm"
