"""The LM head in chunks against the dense computation.

N tokens, D hidden width, V vocabulary.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import klippo.tensors.head as head_module
from klippo.tensors.head import (
    LMHead,
    chunks,
    compare_heads,
    exact_kl,
    token_logprobs,
    token_loss,
)
from tests.tolerance import FLOAT64, FLOAT64_APPROX, float32
from tests.toys import LargestTensor

SHAPES = {
    "plain": {"bias": False, "scale": 1.0, "softcap": None},
    "bias": {"bias": True, "scale": 1.0, "softcap": None},
    "temperature": {"bias": False, "scale": 1 / 0.7, "softcap": None},
    "softcap": {"bias": False, "scale": 1.0, "softcap": 3.0},
    "everything": {"bias": True, "scale": 0.25 / 1.3, "softcap": 2.0},
}


def draw(num_tokens, vocabulary, width=5, seed=0, *, bias=True):
    """Hidden states, weight and bias in float64, and token ids."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width, generator=generator).double()
    weight = torch.randn(vocabulary, width, generator=generator).double()
    offset = torch.randn(vocabulary, generator=generator).double() if bias else None
    token_ids = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return hidden, weight, offset, token_ids


def dense(hidden, weight, bias, *, scale, softcap):
    """Log-probs of every token, (N, V), in the dtype given."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits * scale, -1)


@pytest.mark.parametrize("chunk", [1, 30, 10**6])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_dense_head(monkeypatch, shape, chunk):
    # the oracle is plain autograd
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", chunk)
    options = dict(SHAPES[shape])
    hidden, weight, bias, token_ids = draw(7, 11, bias=options.pop("bias"))
    pull = torch.randn(2, 7, generator=torch.Generator().manual_seed(9))

    ours = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    head = LMHead(weight=ours[1], bias=ours[2] if bias is not None else None, **options)
    logprobs, entropy = token_logprobs(head, ours[0], token_ids)
    (pull[0] * logprobs + pull[1] * entropy).sum().backward()

    theirs = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logp = dense(theirs[0], theirs[1], theirs[2] if bias is not None else None, **options)
    true_logprobs = logp.gather(1, token_ids[:, None]).squeeze(1)
    true_entropy = -(logp.exp() * logp).sum(1)
    (pull[0] * true_logprobs + pull[1] * true_entropy).sum().backward()

    torch.testing.assert_close(logprobs, true_logprobs, **FLOAT64)
    torch.testing.assert_close(entropy, true_entropy, **FLOAT64)
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, true.grad, **FLOAT64)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_results_are_those_of_float64_to_rounding(shape):
    tokens, vocabulary, width = 7, 11, 5
    options = dict(SHAPES[shape])
    *inputs, token_ids = draw(tokens, vocabulary, width, bias=options.pop("bias"))

    def results(dtype):
        hidden, weight, bias = (
            None if x is None else x.to(dtype, copy=True).requires_grad_() for x in inputs
        )
        head = LMHead(weight=weight, bias=bias, **options)
        logprobs, entropy = token_logprobs(head, hidden, token_ids)
        assert logprobs.dtype == entropy.dtype == dtype
        (logprobs + entropy).sum().backward()
        return [logprobs, entropy], [x.grad for x in (hidden, weight, bias) if x is not None]

    values, slopes = results(torch.float32)
    true_values, true_slopes = results(torch.float64)
    # Sums over the width and the vocabulary, and a dozen operations on each of their terms.
    rounds = width + vocabulary + 12
    hidden, weight = (float(x.abs().max()) for x in inputs[:2])
    largest = width * hidden * weight + 1  # any logit
    for ours, true in zip(values, true_values, strict=True):
        torch.testing.assert_close(ours.double(), true, **float32(rounds, largest))
    # A logit's gradient is at most p (2 + |log p| + H); weights sum it over tokens.
    largest *= 3 * tokens * max(hidden, weight)
    for ours, true in zip(slopes, true_slopes, strict=True):
        torch.testing.assert_close(ours.double(), true, **float32(rounds + tokens, largest))


@pytest.mark.parametrize("trains", ["hidden", "weight", "bias"])
def test_whichever_input_trains_alone_gets_its_gradient(trains):  # frozen heads
    hidden, weight, bias, token_ids = draw(4, 6)
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}

    def gradient(inputs, function):
        leaf = inputs[trains].clone().requires_grad_()
        function(**{**inputs, trains: leaf}).sum().backward()
        return leaf.grad

    mine = gradient(
        inputs,
        lambda hidden, weight, bias: token_logprobs(
            LMHead(weight=weight, bias=bias, scale=1.0), hidden, token_ids
        )[0],
    )
    true = gradient(
        inputs,
        lambda hidden, weight, bias: dense(hidden, weight, bias, scale=1.0, softcap=None).gather(
            1, token_ids[:, None]
        ),
    )
    torch.testing.assert_close(mine, true, **FLOAT64)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 500))
def test_chunks_cover_every_token_once_within_the_budget(num_tokens, vocabulary, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "CHUNK_ELEMENTS", budget)
        parts = list(chunks(num_tokens, vocabulary))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(num_tokens))
    assert all((part.stop - part.start) * vocabulary <= max(budget, vocabulary) for part in parts)


def two_passes(head, hidden, token_ids):
    logprobs, entropy = token_logprobs(head, hidden, token_ids)
    (logprobs + 0.1 * entropy).sum().backward()


def one_pass(head, hidden, token_ids):
    token_loss(head, hidden, token_ids, cubic)[0].backward()


PASSES = pytest.mark.parametrize("passes", [one_pass, two_passes])


def watched(passes, num_tokens, vocabulary, *, width=4):
    hidden, weight, bias, token_ids = draw(num_tokens, vocabulary, width)
    hidden, weight, bias = (x.requires_grad_() for x in (hidden, weight, bias))
    head = LMHead(weight=weight, bias=bias, scale=0.9, softcap=5.0)
    with LargestTensor() as seen:
        passes(head, hidden, token_ids)
    assert weight.grad is not None
    return seen


@PASSES
@pytest.mark.parametrize(("num_tokens", "vocabulary"), [(64, 50), (512, 50), (512, 400)])
def test_no_tensor_outgrows_the_chunk_budget_forward_or_backward(
    monkeypatch, num_tokens, vocabulary, passes
):  # nothing of the size tokens * vocabulary, ever
    budget, width = 1000, 4
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", budget)
    seen = watched(passes, num_tokens, vocabulary, width=width)
    model_size = vocabulary * width
    assert seen.largest <= max(budget, model_size, num_tokens * width)
    assert seen.largest < num_tokens * vocabulary


@PASSES
def test_peak_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch, passes):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 1000)
    few, many = watched(passes, 50, 100), watched(passes, 800, 100)
    extra_tokens = 750
    # Per token: hidden state, its gradient, and a handful of scalars; never V = 100 numbers.
    assert many.peak - few.peak <= extra_tokens * (2 * 4 + 16)


def test_without_entropy_one_chunk_of_logits_is_held(monkeypatch):
    tokens, vocabulary, width, budget = 90, 4000, 2, 40_000
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", budget)
    hidden, weight, _, token_ids = draw(tokens, vocabulary, width, bias=False)
    head = LMHead(weight=weight, bias=None, scale=1.0)  # 9 chunks, and a head that is frozen
    with LargestTensor() as seen:
        token_loss(head, hidden.requires_grad_(), token_ids, cubic, with_entropy=False)
    assert budget <= seen.peak < 1.5 * budget


def test_entropy_that_nobody_wants_is_zero_and_changes_nothing():
    hidden, weight, _, token_ids = draw(5, 9)
    head = LMHead(weight=weight, bias=None, scale=1.0)
    logprobs, entropy = token_logprobs(head, hidden, token_ids, with_entropy=False)
    assert torch.equal(logprobs, token_logprobs(head, hidden, token_ids)[0])
    assert not entropy.any()


def test_entropy_of_a_uniform_distribution_is_the_logarithm_of_its_size():
    head = LMHead(weight=torch.zeros(8, 3).double(), bias=None, scale=1.0)
    logprobs, entropy = token_logprobs(head, torch.randn(2, 3).double(), torch.tensor([0, 7]))
    torch.testing.assert_close(entropy, torch.full((2,), 3 * math.log(2)).double())
    torch.testing.assert_close(logprobs, -entropy)


def test_half_precision_heads_normalise_in_float32():
    hidden, weight, _, token_ids = draw(6, 300, 16)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    head = LMHead(weight=weight, bias=None, scale=1.0)
    logprobs, _ = token_logprobs(head, hidden, token_ids)
    logits = (hidden @ weight.T).detach().double()
    expected = logits.log_softmax(1).gather(1, token_ids[:, None]).squeeze(1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, **float32(300 + 8))
    logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("chunk", [1, 25, 10**6])
def test_exact_kl_is_the_sum_over_the_whole_vocabulary(monkeypatch, chunk):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", chunk)
    hidden, weight, bias, _ = draw(6, 10, 5, 0)
    ref_hidden, ref_weight, _, _ = draw(6, 10, 5, 1)
    kl = exact_kl(
        LMHead(weight=weight, bias=bias, scale=0.8, softcap=4.0), hidden,
        LMHead(weight=ref_weight, bias=None, scale=0.8), ref_hidden,
    )  # fmt: skip
    logp = dense(hidden, weight, bias, scale=0.8, softcap=4.0)
    ref = dense(ref_hidden, ref_weight, None, scale=0.8, softcap=None)
    for n in range(6):
        total = sum(float(logp[n, v].exp() * (logp[n, v] - ref[n, v])) for v in range(10))
        assert float(kl[n]) == pytest.approx(total, **FLOAT64_APPROX)


def test_exact_kl_of_a_head_with_itself_is_zero():
    hidden, weight, bias, _ = draw(6, 10)
    head = LMHead(weight=weight, bias=bias, scale=1.0)
    assert not exact_kl(head, hidden, head, hidden).any()


def test_the_watch_sees_what_a_dense_head_would_hold():
    hidden, weight, bias, token_ids = draw(64, 50)
    hidden.requires_grad_()
    with LargestTensor() as seen:
        logp = dense(hidden, weight, bias, scale=1.0, softcap=None)
        logp.gather(1, token_ids[:, None]).sum().backward()
    assert seen.largest >= 64 * 50
    assert seen.peak >= 2 * 64 * 50


@pytest.mark.parametrize("chunk", [1, 30, 10**6])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_kl_and_its_gradients_are_those_of_the_dense_head(monkeypatch, shape, chunk):
    # the oracle is plain autograd
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", chunk)
    options = dict(SHAPES[shape])
    has_bias = options.pop("bias")
    hidden, weight, bias, _ = draw(7, 11, bias=has_bias)
    ref_hidden, ref_weight, ref_bias, _ = draw(7, 11, seed=4, bias=has_bias)
    pull = torch.randn(7, generator=torch.Generator().manual_seed(9))
    ref_head = LMHead(weight=ref_weight, bias=ref_bias, **options)

    ours = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    head = LMHead(weight=ours[1], bias=ours[2] if has_bias else None, **options)
    kl = exact_kl(head, ours[0], ref_head, ref_hidden)
    (pull * kl).sum().backward()

    theirs = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logp = dense(theirs[0], theirs[1], theirs[2] if has_bias else None, **options)
    reference = dense(ref_hidden, ref_weight, ref_bias, **options)
    true_kl = (logp.exp() * (logp - reference)).sum(-1)
    (pull * true_kl).sum().backward()
    torch.testing.assert_close(kl, true_kl, **FLOAT64)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, **FLOAT64)


def cubic(logprobs, entropy, values=0.0):
    """A loss with a derivative of its own at every token; logs the log-prob and its square."""
    logged = torch.stack([logprobs, logprobs**2], -1).detach()
    return logprobs**3 - 2 * entropy**2 + values**2 * logprobs, logged


@pytest.mark.parametrize("chunk", [1, 30, 10**6])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_loss_of_tokens_has_the_gradients_of_the_dense_head(monkeypatch, shape, chunk):
    # the oracle is plain autograd
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", chunk)
    options = dict(SHAPES[shape])
    hidden, weight, bias, token_ids = draw(7, 11, bias=options.pop("bias"))
    values = torch.linspace(-1, 2, 7).double()
    ours = [x.clone().requires_grad_() for x in (hidden, weight, values, bias) if x is not None]
    head = LMHead(weight=ours[1], bias=ours[3] if bias is not None else None, **options)
    loss, logged = token_loss(head, ours[0], token_ids, cubic, {"values": ours[2]})
    (loss / 7).backward()

    theirs = [x.clone().requires_grad_() for x in (hidden, weight, values, bias) if x is not None]
    logp = dense(theirs[0], theirs[1], theirs[3] if bias is not None else None, **options)
    true_logprobs = logp.gather(1, token_ids[:, None]).squeeze(1)
    losses, true_logged = cubic(true_logprobs, -(logp.exp() * logp).sum(1), theirs[2])
    true_loss = losses.sum()
    (true_loss / 7).backward()

    assert not logged.requires_grad
    torch.testing.assert_close(logged, true_logged.sum(0), **FLOAT64)
    torch.testing.assert_close(loss, true_loss, **FLOAT64)
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, true.grad, **FLOAT64)


@pytest.mark.parametrize(("num_tokens", "vocabulary"), [(64, 50), (512, 400)])
def test_a_loss_of_tokens_and_a_comparison_stay_within_the_chunk_budget(
    monkeypatch, num_tokens, vocabulary
):
    budget, width = 1000, 4
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", budget)
    hidden, weight, bias, token_ids = draw(num_tokens, vocabulary, width)
    hidden, weight, bias = (x.requires_grad_() for x in (hidden, weight, bias))
    head = LMHead(weight=weight, bias=bias, scale=0.9, softcap=5.0)
    with LargestTensor() as seen:
        token_loss(head, hidden, token_ids, cubic)[0].backward()
        compare_heads(head, hidden, head, hidden, token_ids)
    assert weight.grad is not None
    assert seen.largest <= max(budget, num_tokens * width, vocabulary * width)


def test_no_tokens_have_no_loss_and_zero_gradients():
    hidden, weight, _, token_ids = (x if x is None else x[:0] for x in draw(4, 6, bias=False))
    hidden, weight = torch.zeros(0, 5).requires_grad_(), torch.randn(6, 5).requires_grad_()
    loss, logged = token_loss(LMHead(weight=weight, bias=None, scale=1.0), hidden, token_ids, cubic)
    loss.backward()
    assert (loss.item(), logged.tolist()) == (0, [0, 0])
    assert not weight.grad.any()


def test_a_loss_goes_backward_once():
    hidden, weight, _, token_ids = draw(4, 6)
    head = LMHead(weight=weight.requires_grad_(), bias=None, scale=1.0)
    loss, _ = token_loss(head, hidden, token_ids, cubic)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        loss.backward()
