"""Policy and critic as one module: token ids in; log-probs, entropy and values out.

B sequences, P prompt tokens, T response tokens, D hidden width, N real response tokens.
Response token t is emitted from the state at position P-1+t: its logits and its value are read
there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from klippo.policy.adapters import CRITIC, PeftModel, using_adapter
from klippo.policy.blocks import FrozenBlocks
from klippo.tensors.head import (
    LMHead,
    LossOfTokens,
    compare_heads,
    exact_kl,
    token_logprobs,
    token_loss,
)
from klippo.types import HFModel, TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOutput:
    """Log-probs and entropy are zero wherever response_mask is False."""

    logprobs: Tensor  # (B, T) float32, nats
    entropy: Tensor  # (B, T) float32, nats
    values: Tensor  # (B, T), or (B, T+1) with the value after the last token
    hidden: Tensor  # (B, T, D), or (B, T+1, D)


class CausalLM(nn.Module):
    """A Hugging Face causal LM, split into trunk and LM head.

    `frozen`: blocks that never train, whose output may be computed once and reused.
    """

    def __init__(
        self, model: HFModel, *, autocast: bool = False, frozen: FrozenBlocks | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.trunk = model.base_model
        self.autocast = autocast
        self.frozen = frozen

    @property
    def hidden_size(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[1])

    @property
    def is_half(self) -> bool:
        """Whether it computes with 16 bits."""
        return self.autocast or self.model.dtype.itemsize < 4

    def head(self, temperature: float) -> LMHead:
        """The LM head with the model's own scale and soft cap, divided by the temperature."""
        config = self.model.config
        output = self.model.get_output_embeddings()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )
        return LMHead(
            weight=output.weight,
            bias=getattr(output, "bias", None),
            scale=scale / temperature,
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def hidden(self, batch: TokenBatch, *, after_last: bool = False) -> Tensor:
        """Hidden states of the states that emit response tokens: (B, T, D), or (B, T+1, D)."""
        states = batch.frozen_states
        context: AbstractContextManager[None] = nullcontext()
        if self.frozen is not None and states is not None:
            context = self.frozen.replaced_by(states if after_last else states[:, :-1])
        with context:
            hidden = trunk_hidden(self.trunk, batch, after_last=after_last, autocast=self.autocast)
        return hidden.bfloat16() if self.autocast else hidden

    @torch.no_grad()
    def with_frozen_states(self, batch: TokenBatch) -> TokenBatch:
        """The batch with the output of the frozen blocks, which `hidden` then leaves out.

        Unchanged if nothing is frozen. All models with the same frozen blocks can use it.
        """
        if self.frozen is None:
            return batch
        with self.frozen.alone() as above:
            trunk_hidden(self.trunk, batch, after_last=True, autocast=self.autocast)
        return replace(batch, frozen_states=above.given)

    def logprobs(
        self, batch: TokenBatch, hidden: Tensor, temperature: float, *, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of the response tokens and the entropy of their distributions, (B, T)."""
        mask = batch.response_mask
        logprobs, entropy = token_logprobs(
            self.head(temperature),
            hidden[:, : mask.shape[1]][mask],
            batch.response_ids[mask],
            with_entropy=with_entropy,
        )
        return _spread(logprobs, mask), _spread(entropy, mask)

    def loss(
        self,
        batch: TokenBatch,
        mask: Tensor,
        hidden: Tensor,
        temperature: float,
        loss_of: LossOfTokens,
        inputs: Mapping[str, Tensor],
        *,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """`token_loss` of the tokens in mask (B, T); each input is (B, T), hidden (B, T, D)."""
        return token_loss(
            self.head(temperature),
            hidden[mask],
            batch.response_ids[mask],
            loss_of,
            {name: x[mask] for name, x in inputs.items()},
            with_entropy=with_entropy,
        )

    def exact_kl(
        self, hidden: Tensor, temperature: float, ref_head: LMHead, ref_hidden: Tensor
    ) -> Tensor:
        """Exact KL from a reference at N positions, (N,) float32, nats; hidden (N, D) of both."""
        return exact_kl(self.head(temperature), hidden, ref_head, ref_hidden)


def trunk_hidden(trunk: HFModel, batch: TokenBatch, *, after_last: bool, autocast: bool) -> Tensor:
    """Last hidden states at positions P-1 … P+T-2 (P+T-1 with `after_last`) of any HF trunk."""
    ids = torch.cat([batch.prompt_ids, batch.response_ids], 1)
    mask = torch.cat([batch.prompt_mask, batch.response_mask], 1)
    if not after_last:
        ids, mask = ids[:, :-1], mask[:, :-1]
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if "position_ids" in inspect.signature(trunk.forward).parameters:
        # Padding before a row's first token must not shift its positions.
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.autocast(ids.device.type, torch.bfloat16) if autocast else nullcontext():
        hidden: Tensor = trunk(**inputs, use_cache=False).last_hidden_state
    return hidden[:, batch.prompt_ids.shape[1] - 1 :]


def _spread(x: Tensor, mask: Tensor) -> Tensor:
    """Values (N,) of the tokens in a mask (B, T), and zero elsewhere."""
    return x.new_zeros(mask.shape).masked_scatter(mask, x)


class Critic(nn.Module):
    """V of the state before each response token: a scalar head on the hidden states there.

    The states are the policy's, and its loss also trains the policy's trunk; subclasses have states
    of their own. The head is float32, or float64 on a float64 trunk, and starts at zero unless it
    is given.
    """

    reads_policy = True
    """Whether the states are the policy's; else those that `forward` gets may be None."""

    def __init__(self, width: int, dtype: torch.dtype, head: nn.Linear | None = None) -> None:
        super().__init__()
        if head is None:
            head = nn.Linear(width, 1, dtype=torch.promote_types(dtype, torch.float32))
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.head = head

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """Those that the policy does not use."""
        return self.parameters()

    def own_states(self, batch: TokenBatch, *, after_last: bool) -> Tensor:
        """What the head reads unless `reads_policy`; (B, T, D), or (B, T+1, D)."""
        raise NotImplementedError

    def forward(self, batch: TokenBatch, hidden: Tensor | None, *, after_last: bool) -> Tensor:
        """Values (B, T) or (B, T+1), from the batch and the policy's hidden states."""
        if hidden is None or not self.reads_policy:
            hidden = self.own_states(batch, after_last=after_last)
        values: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return values


class LoraCritic(Critic):
    """A second LoRA adapter on the policy's frozen base, with a head."""

    reads_policy = False

    def __init__(self, lm: CausalLM, peft_model: PeftModel) -> None:
        super().__init__(lm.hidden_size, lm.model.dtype)
        # Shared with the policy: not submodules.
        object.__setattr__(self, "_shared", (lm, peft_model))
        self._shared: tuple[CausalLM, PeftModel]
        for parameter in self.own_parameters():
            parameter.requires_grad_(True)

    def own_parameters(self) -> Iterator[nn.Parameter]:
        for name, parameter in self._shared[0].model.named_parameters():
            if f".{CRITIC}." in name:
                yield parameter
        yield from self.head.parameters()

    def own_states(self, batch: TokenBatch, *, after_last: bool) -> Tensor:
        lm, peft_model = self._shared
        with using_adapter(peft_model, CRITIC):
            return lm.hidden(batch, after_last=after_last)


class SeparateCritic(Critic):
    """A separate model: a trunk and a head, which may be those of a reward model."""

    reads_policy = False

    def __init__(
        self, trunk: HFModel, head: nn.Linear | None = None, *, autocast: bool = False
    ) -> None:
        super().__init__(trunk.config.get_text_config().hidden_size, trunk.dtype, head)
        self.trunk = trunk
        self.autocast = autocast

    def own_states(self, batch: TokenBatch, *, after_last: bool) -> Tensor:
        return trunk_hidden(self.trunk, batch, after_last=after_last, autocast=self.autocast)


class ActorCritic(nn.Module):
    """The policy with its critic."""

    def __init__(self, lm: CausalLM, critic: Critic, peft_model: PeftModel | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.critic = critic
        object.__setattr__(self, "peft_model", peft_model)  # shares lm's weights: not a submodule
        self.peft_model: PeftModel | None

    @property
    def device(self) -> torch.device:
        return self.lm.model.get_output_embeddings().weight.device

    def forward(
        self,
        batch: TokenBatch,
        temperature: float,
        *,
        with_entropy: bool = True,
        after_last: bool = False,
    ) -> PolicyOutput:
        """Everything that PPO needs of one batch, in one pass over the trunk."""
        hidden = self.lm.hidden(batch, after_last=after_last)
        logprobs, entropy = self.lm.logprobs(batch, hidden, temperature, with_entropy=with_entropy)
        values = self.critic(batch, hidden, after_last=after_last)
        return PolicyOutput(logprobs=logprobs, entropy=entropy, values=values, hidden=hidden)

    def values(self, batch: TokenBatch, hidden: Tensor | None = None) -> Tensor:
        """Values alone, (B, T); the gradient reaches the critic's own weights only (warm-up).

        `hidden` (B, T, D) is the policy's, if known.
        """
        if hidden is None and self.critic.reads_policy:
            with torch.no_grad():
                hidden = self.lm.hidden(batch)
        values: Tensor = self.critic(batch, hidden, after_last=False)
        return values

    def trainable(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(policy's, critic's own) trainable parameters, each once."""
        own = {id(parameter) for parameter in self.critic.own_parameters()}
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return (
            [parameter for parameter in parameters if id(parameter) not in own],
            [parameter for parameter in parameters if id(parameter) in own],
        )


class Reference:
    """The policy as it was at step 0, frozen."""

    def __init__(
        self, lm: CausalLM, active: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.lm = lm
        self._active = active

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch, temperature: float) -> Tensor:
        """log pi_ref of the response tokens, (B, T) float32, nats."""
        with self._active():
            hidden = self.lm.hidden(batch)
            return self.lm.logprobs(batch, hidden, temperature, with_entropy=False)[0]

    @torch.no_grad()
    def compare(
        self, policy: CausalLM, batch: TokenBatch, temperature: float, hidden: Tensor
    ) -> tuple[Tensor, ...]:
        """`compare_heads` of the response tokens, each (B, T); hidden (B, T, D) is the policy's."""
        mask = batch.response_mask
        with self._active():
            ref_hidden = self.lm.hidden(batch)[mask]
        both = compare_heads(
            policy.head(temperature),
            hidden[mask],
            self.lm.head(temperature),
            ref_hidden,
            batch.response_ids[mask],
        )
        return tuple(_spread(x, mask) for x in both)

    def kl_from(
        self, policy: CausalLM, batch: TokenBatch, temperature: float, hidden: Tensor | None = None
    ) -> Tensor:
        """Exact KL(policy || reference) at every response position, (B, T) float32, nats.

        Differentiable in the policy. `hidden` (B, T, D) is the policy's, if known.
        """
        mask = batch.response_mask
        if hidden is None:
            hidden = policy.hidden(batch)
        with torch.no_grad(), self._active():
            ref_hidden = self.lm.hidden(batch)[mask]
        own_hidden = hidden[:, : mask.shape[1]][mask]
        kl = policy.exact_kl(own_hidden, temperature, self.lm.head(temperature), ref_hidden)
        return _spread(kl, mask)
