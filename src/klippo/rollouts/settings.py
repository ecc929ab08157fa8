"""Settings of sampling."""

from pydantic import Field, PositiveInt

from klippo.settings import LengthRange, Settings


class RolloutSettings(Settings):
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
    stop_tokens: tuple[str | int, ...] = ()
    """More stop tokens, as text of one token or as ids."""
    generation_batch_size: PositiveInt | None = None
    """Prompts decoded at once; default: all of them."""
    record_logprobs: bool = False
    """Keep the sampler's own log-probs and report how far they are from the training forward's."""
