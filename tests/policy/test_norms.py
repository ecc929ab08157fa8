"""RMSNorm with less to keep: the same numbers, the same weights."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from klippo.policy.norms import LeanRMSNorm, with_lean_norms
from tests.tolerance import FLOAT64, gamma
from tests.toys import gpt2, llama, load, oracle

ROWS, TOKENS, WIDTH = 3, 5, 64


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    x = 3 * torch.randn(ROWS, TOKENS, WIDTH).to(dtype)
    return x.requires_grad_(), torch.randn(ROWS, TOKENS, WIDTH).to(dtype)


def norms(kind=LlamaRMSNorm, dtype=torch.float32):
    """transformers' norm with weights far from 1, and ours with the same parameter."""
    theirs = kind(WIDTH, eps=1e-3).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(torch.linspace(-1, 2, WIDTH))
    return theirs, with_lean_norms(torch.nn.Sequential(theirs))[0]


def backward(norm, x, grad):
    """Output, and gradients of input and weight."""
    out = norm(x)
    return out.detach(), *torch.autograd.grad(out, [x, norm.weight], grad)


def test_by_hand():
    # mean of squares (9 + 16) / 2 + 0.5 = 13
    norm = LeanRMSNorm(torch.nn.Parameter(torch.tensor([2.0, -1.0]).double()), 0.5)
    out = norm(torch.tensor([[3.0, 4.0]]).double())
    torch.testing.assert_close(out, torch.tensor([[6.0, -4.0]]).double() / 13**0.5)


def test_gradients_are_those_of_finite_differences():
    norm = LeanRMSNorm(torch.nn.Parameter(torch.ones(4).double()), 1e-2)
    torch.manual_seed(1)
    x, grad, weight = (torch.randn(shape).double() for shape in ((2, 3, 4), (2, 3, 4), (4,)))
    norm.weight.data.copy_(weight)
    _, of_x, of_weight = backward(norm, x.requires_grad_(), grad)

    def loss(x, weight):
        out = weight * x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt()
        return float((out * grad).sum())

    step = 1e-5
    for found, place in ((of_x, x.detach()), (of_weight, weight)):
        for i in range(place.numel()):
            up, down = place.clone(), place.clone()
            up.view(-1)[i] += step
            down.view(-1)[i] -= step
            pair = [(p, weight) if place.dim() == 3 else (x.detach(), p) for p in (up, down)]
            slope = (loss(*pair[0]) - loss(*pair[1])) / (2 * step)
            # The error of central differences is step^2 times the third derivative, below 100.
            assert float(found.reshape(-1)[i]) == pytest.approx(slope, abs=100 * step**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_transformers(dtype):
    theirs, ours = norms(dtype=dtype)
    x, grad = inputs(dtype)
    # Both sum WIDTH squares (and all tokens' gradients of a weight) in float32, and round a handful
    # of products to their own type.
    relative = 2 * gamma(WIDTH + ROWS * TOKENS) + gamma(8, dtype)
    for found, expected in zip(backward(ours, x, grad), backward(theirs, x, grad), strict=True):
        assert found.dtype == expected.dtype
        largest = float(expected.abs().max())
        torch.testing.assert_close(found, expected, atol=relative * largest, rtol=0)


def test_the_normalized_states_are_not_kept():
    kept = []
    for norm in norms():
        x, _ = inputs()
        tensors = {}

        def keep(tensor, tensors=tensors):
            tensors[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            norm(x)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()))
    theirs, ours = kept
    one = 4 * ROWS * TOKENS * WIDTH
    assert ours == one + 4 * WIDTH + 4 * ROWS * TOKENS
    assert theirs - ours >= one


@pytest.mark.parametrize("kind", [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm])
def test_norms_with_llamas_code_are_replaced_and_keep_their_weight(kind):
    theirs, ours = norms(kind)
    assert type(ours) is LeanRMSNorm
    assert ours.weight is theirs.weight
    assert ours.variance_epsilon == 1e-3


def test_other_norms_stay():
    gemma = torch.nn.Sequential(GemmaRMSNorm(WIDTH), torch.nn.LayerNorm(WIDTH))
    before = list(gemma)
    assert list(with_lean_norms(gemma)) == before
    assert not any(isinstance(m, LeanRMSNorm) for m in load(gpt2()).policy.modules())


def test_a_policy_has_them_and_is_saved_as_before():
    model = llama()
    names, ids = list(model.state_dict()), torch.tensor([[3, 7, 1, 5]])
    with torch.no_grad():
        expected = oracle(model)(ids).logits
        loaded = load(model)
        torch.testing.assert_close(loaded.policy.lm.model(ids).logits, expected, **FLOAT64)
    assert list(loaded.policy.lm.model.state_dict()) == names
    for lm in (loaded.policy.lm, loaded.reference.lm):
        assert sum(isinstance(m, LeanRMSNorm) for m in lm.modules()) == 2 * 2 + 1
