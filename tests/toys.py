"""Tiny models, prompts and rollouts that tests share.

The models are in float64, so that results do not depend on the processor (see tolerance.py); a test
of float32 itself says `gpt2().float()`.

B sequences, P prompt tokens, T response tokens, V vocabulary.
"""

import copy
import weakref
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from klippo.policy.loading import ONE_PROCESS, load_policy
from klippo.policy.settings import CriticSettings, LoraSettings, PolicySettings
from klippo.rollouts.collate import collate
from klippo.types import Completion, Prompt

CPU = torch.device("cpu")
VOCABULARY = 13
EOS = 0
LORA = LoraSettings(rank=2, alpha=8.0)

NO_TOKENIZER = SimpleNamespace(
    eos_token_id=None,
    batch_decode=lambda rows, skip_special_tokens: [""] * len(rows),
    save_pretrained=lambda folder: None,
)
"""For tests that never touch text."""


def gpt2(seed=0, vocab_size=VOCABULARY, num_layers=2, **config):
    """A GPT-2 (learnt absolute positions, tied head) whose distributions are far from uniform."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_positions=40, n_embd=16, n_layer=num_layers, n_head=2,
            bos_token_id=EOS, eos_token_id=EOS, initializer_range=0.4, **config,
        )
    ).double().eval()  # fmt: skip


def llama(seed=0, vocab_size=VOCABULARY, num_layers=2, **config):
    """A Llama (rotary positions, grouped keys, untied head)."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, max_position_embeddings=40, hidden_size=16,
            intermediate_size=24, num_hidden_layers=num_layers, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=EOS, eos_token_id=EOS, initializer_range=0.4,
            **config,
        )
    ).double().eval()  # fmt: skip


FAMILIES = {"gpt2": gpt2, "llama": llama}


def load(model=None, *, critic=None, sharding="none", ranks=ONE_PROCESS, **policy):
    """What `load_policy` makes of a model (a GPT-2 by default)."""
    settings = PolicySettings(**({"model": "toy", "lora": LORA} | policy))
    model = gpt2() if model is None else model
    return load_policy(
        settings,
        critic or CriticSettings(),
        CPU,
        model=model,
        tokenizer=NO_TOKENIZER,
        sharding=sharding,
        ranks=ranks,
    )


def oracle(model):
    """A copy of a model that computes in float64 all the way.

    transformers' RMSNorm computes in float32 whatever its weights are; PyTorch's replaces it.
    """
    copied = copy.deepcopy(model).double()
    for module in copied.modules():
        for name, norm in module.named_children():
            if isinstance(norm, LlamaRMSNorm):
                other = torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon)
                other.weight = norm.weight
                setattr(module, name, other)
    return copied


def disturb(parameters, scale=0.1, seed=5):
    """Move weights, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def prompt(*token_ids, id=0):
    return Prompt(id=id, text="", token_ids=list(token_ids))


def make_rollout(rows, *, temperature=1.0, logprobs=None, finished=None):
    """A Rollout of (prompt ids, response ids) pairs; finished where the response ends with EOS."""
    if finished is None:
        finished = [response[-1] == EOS for _, response in rows]
    completions = [
        Completion(
            token_ids=response, finished=end, logprobs=None if logprobs is None else logprobs[i]
        )
        for i, ((_, response), end) in enumerate(zip(rows, finished, strict=True))
    ]
    prompts = [prompt(*ids, id=i) for i, (ids, _) in enumerate(rows)]
    return collate(prompts, completions, NO_TOKENIZER, temperature=temperature, device=CPU)


RAGGED = [
    ([3, 7, 1], [2, 9, 4, EOS]),
    ([5], [8, 8, 1, 12, 6, 2]),
    ([1, EOS, 2, 11, 4], [EOS]),
    ([10, 6], [3, 5, EOS]),
]
"""Four rows of unlike lengths; one prompt has the end-of-sequence token inside."""


def dense_logprobs(model, prompt_ids, response_ids, temperature=1.0):
    """Log-softmax of a model's own logits where each response token is emitted, (T, V).

    One row at a time, without padding, mask or cache.
    """
    ids = torch.tensor([prompt_ids + response_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return (logits[len(prompt_ids) - 1 : -1] / temperature).log_softmax(-1)


def gradients(module):
    """Copies of the gradients by parameter name."""
    return {
        name: parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def weights(module):
    """Copies of the weights by parameter name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same_tensors(left, right, *, atol, rtol=0.0):
    """Two mappings from names to tensors agree."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=rtol, msg=name)


def over_two_ranks(function, halves):
    """Run `function(half, all_sum)` for both halves as if each were a process of its own.

    The sums depend on earlier sums, so each round replays with what is known by then.
    """
    known: list[torch.Tensor] = []
    while True:
        partial, results = [], []
        for half in halves:
            calls = iter(known)

            def all_sum(x, calls=calls):
                total = next(calls, None)
                if total is None:
                    raise StopAsyncIteration(x)
                return total

            try:
                results.append(function(half, all_sum))
            except StopAsyncIteration as stop:
                partial.append(stop.args[0])
        if not partial:
            return results
        assert len(partial) == len(halves), "ranks made different numbers of sums"
        known.append(torch.stack(partial).sum(0))


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that comes out of an operation: the largest, and the live sum."""

    def __init__(self):
        super().__init__()
        self.largest = self.live = self.peak = 0
        self._storages = set()

    def _freed(self, key, size):
        self._storages.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                size = storage.nbytes() // x.element_size()
                self.largest = max(self.largest, size)
                key = storage._cdata
                if key not in self._storages:
                    self._storages.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, key, size)
        return result
