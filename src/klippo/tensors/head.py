"""The LM head in chunks: log-probs, entropy and exact KL without ever holding (B, T, V) logits.

N tokens, D hidden width, V vocabulary. Each chunk of tokens gets its logits, gives up the few
numbers that are wanted, and is dropped; the backward pass computes them again. Where the loss is
known (`token_loss`) a chunk gives up its gradients at once, and there is no second time.
Results are float32, or float64 for float64 hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**23
"""Logits held at once: 32 MiB in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LMHead:
    """Hidden states to tempered logits: softcap(hidden @ weight.T + bias) * scale."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    """The model's own logit scale divided by the sampling temperature."""
    softcap: float | None = None
    """c in c * tanh(logits / c), before the scale."""

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """(n, D) -> `out`, (n, V)."""
        weight = self.weight.to(hidden.dtype)
        if hidden.dtype == out.dtype:
            torch.mm(hidden, weight.T, out=out)
        else:
            out.copy_(hidden @ weight.T)
        if self.bias is not None:
            out += self.bias.to(out.dtype)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out if self.scale == 1 else out.mul_(self.scale)

    def chunks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the tokens of hidden (N, D), and their logits (n, V).

        All lie in one place: a chunk is overwritten by the next, and may be overwritten before.
        """
        place = None
        for part in chunks(len(hidden), len(self.weight)):
            if place is None:  # the first is the largest
                place = _results(hidden, part.stop, len(self.weight))
            yield part, self.logits(hidden[part], place[: part.stop - part.start])

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d (hidden @ weight.T + bias), given the logits (n, V)."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (logits / (self.scale * self.softcap)) ** 2)


def _results(hidden: Tensor, *shape: int) -> Tensor:
    """An empty tensor in float32, or in float64 if the hidden states are."""
    return hidden.new_empty(shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


def chunks(num_tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices of tokens whose logits fit in CHUNK_ELEMENTS; an empty one of no tokens."""
    size = max(CHUNK_ELEMENTS // vocabulary, 1)
    for start in range(0, max(num_tokens, 1), size):
        yield slice(start, min(start + size, num_tokens))


def token_logprobs(
    head: LMHead, hidden: Tensor, token_ids: Tensor, *, with_entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """log pi(token) and the entropy of pi at each position, both (N,) in nats.

    hidden (N, D), token_ids (N,). Differentiable in hidden, weight and bias. The entropy is zero
    (and costs nothing) without `with_entropy`.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, token_ids, head, with_entropy
        )
    return logprobs, entropy


LossOfTokens = Callable[..., tuple[Tensor, Tensor]]
"""`logprobs`, `entropy` and further inputs of n tokens by name, each (n,) -> the losses of these
tokens (n,), and M numbers to log of each (n, M)."""


def token_loss(
    head: LMHead,
    hidden: Tensor,
    token_ids: Tensor,
    loss_of: LossOfTokens,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """The sum of a loss of single tokens; the sums (M,) float64 of what it logs, without gradient.

    hidden (N, D), token_ids and each of `inputs` (N,). `loss_of` must be differentiable, and each
    token's loss a function of its own log-prob, entropy (zero without `with_entropy`) and inputs.
    Then a chunk's gradients are known as soon as its logits are, and the LM head runs once instead
    of twice, as in the fused cross-entropy of Hsu et al. 2024 (arXiv 2410.10989).
    """
    inputs = inputs or {}
    with torch.autocast(hidden.device.type, enabled=False):
        loss, logged = _TokenLoss.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, token_ids, head, loss_of,
            ["logprobs", "entropy", *inputs], with_entropy, *inputs.values(),
        )  # fmt: skip
    return loss, logged


@torch.no_grad()
def compare_heads(
    head: LMHead, hidden: Tensor, ref_head: LMHead, ref_hidden: Tensor, token_ids: Tensor
) -> tuple[Tensor, ...]:
    """log pi(token), the entropy of pi, log ref(token) and KL(pi || ref), in one pass over logits.

    hidden (N, D) of the policy and ref_hidden (N, D) of the reference, token_ids (N,). Each result
    is (N,), in nats, without gradient; the KL is summed over the vocabulary.
    """
    found = _results(hidden, 4, len(hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        both = zip(head.chunks(hidden), ref_head.chunks(ref_hidden), strict=True)
        for (part, logits), (_, ref_logits) in both:
            ids = token_ids[part, None]
            logp = torch.log_softmax(logits, -1, out=logits)
            ref_logp = torch.log_softmax(ref_logits, -1, out=ref_logits)
            found[0, part] = logp.gather(1, ids).squeeze(1)
            found[2, part] = ref_logp.gather(1, ids).squeeze(1)
            log_ratio = ref_logp.neg_().add_(logp)
            probabilities = logp.exp()
            found[3, part] = log_ratio.mul_(probabilities).sum(-1)
            found[1, part] = -probabilities.mul_(logp).sum(-1)
    return tuple(found)


def exact_kl(head: LMHead, hidden: Tensor, ref_head: LMHead, ref_hidden: Tensor) -> Tensor:
    """KL(pi || ref) summed over the vocabulary at each position, (N,) in nats.

    hidden (N, D) of the policy and ref_hidden (N, D) of the reference at the same positions.
    Differentiable in hidden, and in the policy's weight and bias.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        kl: Tensor = _ExactKL.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, ref_hidden, head, ref_head
        )
    return kl


class _ExactKL(torch.autograd.Function):
    """With p = softmax(z) and q the reference:

    d KL / dz = p * (log p - log q - KL)
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        head: LMHead,
        ref_head: LMHead,
    ) -> Tensor:
        kl = _results(hidden, len(hidden))
        both = zip(head.chunks(hidden), ref_head.chunks(ref_hidden), strict=True)
        for (part, logits), (_, ref_logits) in both:
            logp = torch.log_softmax(logits, -1, out=logits)
            log_ratio = torch.log_softmax(ref_logits, -1, out=ref_logits).neg_().add_(logp)
            kl[part] = log_ratio.mul_(logp.exp_()).sum(-1)
        ctx.save_for_backward(hidden, weight, ref_hidden, kl)
        ctx.head, ctx.ref_head, ctx.has_bias = head, ref_head, bias is not None
        return kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ref_hidden, kl = ctx.saved_tensors
        head: LMHead = ctx.head
        sink = _Gradients(ctx.needs_input_grad, hidden, weight, has_bias=ctx.has_bias)
        both = zip(head.chunks(hidden), ctx.ref_head.chunks(ref_hidden), strict=True)
        for (part, logits), (_, ref_logits) in both:
            slope = head.slope(logits)
            logp = torch.log_softmax(logits, -1, out=logits)
            log_ratio = torch.log_softmax(ref_logits, -1, out=ref_logits).neg_().add_(logp)
            grad = logp.exp_().mul_(log_ratio.sub_(kl[part, None])).mul_(grads[0][part, None])
            sink.add(part, grad, slope)
        return *sink.all, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    """With p = softmax(z), y the token and H the entropy of p:

    d log p_y / dz = onehot(y) - p          d H / dz = -p * (log p + H)
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        head: LMHead,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = _results(hidden, len(hidden))
        entropy = torch.zeros_like(logprobs)
        for part, logits in head.chunks(hidden):
            logp = torch.log_softmax(logits, -1, out=logits)
            logprobs[part] = logp.gather(1, token_ids[part, None]).squeeze(1)
            if with_entropy:
                entropy[part] = -logp.exp().mul_(logp).sum(-1)
        ctx.save_for_backward(hidden, weight, token_ids, entropy)
        ctx.head, ctx.with_entropy, ctx.has_bias = head, with_entropy, bias is not None
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        hidden, weight, token_ids, entropy = ctx.saved_tensors
        head: LMHead = ctx.head
        use_entropy = ctx.with_entropy and bool(grad_entropy.any())
        sink = _Gradients(ctx.needs_input_grad, hidden, weight, has_bias=ctx.has_bias)
        for part, logits in head.chunks(hidden):
            slope = head.slope(logits)
            # In place from here on: a chunk of logits is the largest thing in memory.
            logp = torch.log_softmax(logits, -1, out=logits)
            pull = grad_logprobs[part, None]
            if use_entropy:
                pull = pull + grad_entropy[part, None] * (logp + entropy[part, None])
            grad = logp.exp_().mul_(-pull)
            grad.scatter_add_(1, token_ids[part, None], grad_logprobs[part, None])
            sink.add(part, grad, slope)
        return *sink.all, None, None, None


class _TokenLoss(torch.autograd.Function):
    """The derivatives of `_TokenLogprobs`, taken while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        head: LMHead,
        loss_of: LossOfTokens,
        names: Sequence[str],
        with_entropy: bool,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        total = _results(hidden).zero_()
        sums: list[Tensor] = []  # of what is logged, by chunk
        of_inputs = [torch.empty_like(x) for x in inputs]
        sink = _Gradients(ctx.needs_input_grad, hidden, weight, has_bias=bias is not None)
        for part, logits in head.chunks(hidden):
            slope = head.slope(logits)
            # In place from here on: a chunk of logits is the largest thing in memory.
            logp = torch.log_softmax(logits, -1, out=logits)
            ids = token_ids[part, None]
            logprobs = logp.gather(1, ids).squeeze(1)
            entropy = torch.zeros_like(logprobs)
            if with_entropy:
                entropy = -logp.exp().mul_(logp).sum(-1)
            with torch.enable_grad():
                given = [logprobs, entropy, *(x[part] for x in inputs)]
                given = [x.detach().requires_grad_() for x in given]
                losses, logged = loss_of(**dict(zip(names, given, strict=True)))
                loss = losses.sum()
            of_logprobs, of_entropy, *others = torch.autograd.grad(
                loss, given, materialize_grads=True
            )
            total += loss.detach()
            sums.append(logged.double().sum(0))
            for gradient, other in zip(of_inputs, others, strict=True):
                gradient[part] = other
            pull = of_logprobs[:, None]
            if with_entropy:
                pull = pull + of_entropy[:, None] * (logp + entropy[:, None])
            grad = logp.exp_().mul_(-pull)
            grad.scatter_add_(1, ids, of_logprobs[:, None])
            sink.add(part, grad, slope)
        ctx.gradients = [*sink.all, *of_inputs]
        logged_sums = torch.stack(sums).sum(0)
        ctx.mark_non_differentiable(logged_sums)
        return total, logged_sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.gradients = ctx.gradients, None  # in place, and nothing is held twice
        assert kept is not None, "token_loss goes backward once"
        hidden, weight, bias, *others = (x if x is None else x.mul_(grads[0]) for x in kept)
        return hidden, weight, bias, *[None] * 5, *others


class _Gradients:
    """Collects the gradients of hidden, weight and bias from those of the logits, by chunks."""

    def __init__(
        self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, *, has_bias: bool
    ) -> None:
        self._inputs = hidden, weight
        self.all = (
            torch.empty_like(hidden) if needed[0] else None,
            torch.zeros_like(weight) if needed[1] else None,
            weight.new_zeros(len(weight)) if needed[2] and has_bias else None,
        )

    def add(self, part: slice, grad: Tensor, slope: Tensor | float) -> None:
        """`grad` (n, V) of a chunk's logits is used up."""
        hidden, weight = self._inputs
        of_hidden, of_weight, of_bias = self.all
        if isinstance(slope, Tensor) or slope != 1:
            grad.mul_(slope)
        grad = grad.to(hidden.dtype)
        if of_hidden is not None:
            torch.mm(grad, weight.to(grad.dtype), out=of_hidden[part])
        if of_weight is not None:
            of_weight.addmm_(grad.T.to(weight.dtype), hidden[part].to(weight.dtype))
        if of_bias is not None:
            of_bias.add_(grad.sum(0))
