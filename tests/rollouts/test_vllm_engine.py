"""vLLM as the engine, against the policy itself: `make test-vllm`.

B sequences, T response tokens.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from klippo.errors import ConfigError, PreflightError
from klippo.policy.weights import merged_weights
from klippo.rollouts.collate import collate
from klippo.rollouts.hf import HFEngine
from klippo.rollouts.sampling import Sampling, response_seeds
from klippo.rollouts.settings import VLLMSettings
from klippo.rollouts.vllm import open_vllm, vllm_version
from tests.small_models import word_tokenizer
from tests.toys import CPU, EOS, NO_TOKENIZER, disturb, load, prompt, weights

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(vllm_version() is None, reason="needs a Python with vLLM: `make test-vllm`"),
]

PROMPTS = [prompt(3, 7, 1), prompt(5), prompt(1, EOS, 2, 11, 4), prompt(10, 6)]
LIMITS = [20, 30, 9, 12]
SEEDS = response_seeds(0, range(4))
SIZES = {"vocab_size": 64, "bos_token_id": EOS, "eos_token_id": EOS, "initializer_range": 0.2}
SMALL_CACHE = VLLMSettings(kv_cache_gib=0.05)


def gpt2():
    """Learnt positions, biases, transposed weights, a tied head; heads of 32, as vLLM needs."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=64, n_layer=2, n_head=2, **SIZES))


def llama(**config):
    """Rotary positions, grouped keys and values, an untied head."""
    torch.manual_seed(0)
    sizes = {
        "max_position_embeddings": 64, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(SIZES | sizes | config)))


def train_with_vllm(folder: Path, *, policy=None, ppo=None, vllm=None) -> list[float]:
    """Two steps of `klippo train`; the mismatches that they logged."""
    tokenizer = word_tokenizer(pad=False)
    tokenizer.save_pretrained(folder / "model")
    llama(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    prompts = [json.dumps({"prompt": text}) + "\n" for text in ["the movie was", "I liked it"] * 8]
    (folder / "prompts.jsonl").write_text("".join(prompts))
    config = {
        "policy": {"model": str(folder / "model")} | (policy or {}),
        "data": {"train": str(folder / "prompts.jsonl")},
        "reward": {"kind": "length", "max_tokens": 4},
        "rollout": {
            "engine": "vllm",
            "response_length": [4, 8],
            "vllm": {"kv_cache_gib": 0.05} | (vllm or {}),
        },
        "ppo": {"num_steps": 2, "batch_size": 8, "max_logprob_mismatch": 0.01} | (ppo or {}),
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"num_prompts": 4},
        "output_dir": str(folder / "run"),
    }
    file = folder / "vllm.yaml"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "klippo", "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    logged = [row["engine/logprob_mismatch_nats"] for row in rows if "kl/coef" in row]
    assert len(logged) == 2
    return logged


def engine(policy, temperature=0.7, stops=(EOS,), max_tokens=40, settings=SMALL_CACHE):
    model = policy.lm.model
    return open_vllm(
        model, partial(merged_weights, policy), settings, CPU,
        dtype=model.dtype, stop_ids=frozenset(stops), temperature=temperature,
        max_tokens=max_tokens, batch_size=None, seed=0,
    )  # fmt: skip


def mismatch(policy, completions, temperature=0.7, prompts=PROMPTS):
    """Largest difference, in nats, between the engine's log-probs and the policy's own forward."""
    rollout = collate(prompts, completions, NO_TOKENIZER, temperature=temperature, device=CPU)
    with torch.no_grad():
        own = policy(rollout.tokens, temperature).logprobs
    return float((own - rollout.behavior_logprobs).abs().max())


FAMILIES = {
    "gpt2": gpt2,
    "llama": llama,
    "llama, tied head": partial(llama, tie_word_embeddings=True),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_log_probs_are_the_policys_before_and_after_a_step(family, tuning):
    policy = load(FAMILIES[family](), tuning=tuning).policy
    disturb(policy.trainable()[0], 0.05)  # an adapter starts at zero
    sampler = engine(policy)
    completions = sampler.generate(PROMPTS, LIMITS, SEEDS)
    assert mismatch(policy, completions) < 1e-3

    optimizer = torch.optim.SGD(policy.trainable()[0], lr=0.5)
    tokens = collate(PROMPTS, completions, NO_TOKENIZER, temperature=0.7, device=CPU).tokens
    policy(tokens, 0.7).logprobs.sum().backward()
    optimizer.step()
    assert mismatch(policy, completions) > 0.1, "the step moved the policy"
    stale = sampler.generate(PROMPTS, LIMITS, SEEDS)
    assert stale == completions, "the engine has weights of its own"

    before = weights(policy)
    sampler.sync()
    fresh = sampler.generate(PROMPTS, LIMITS, SEEDS)
    assert mismatch(policy, fresh) < 1e-3
    assert fresh != completions
    assert all(torch.equal(w, before[name]) for name, w in weights(policy).items())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_compiled_engine_takes_over_weights_too(family):
    policy = load(FAMILIES[family]()).policy
    settings = VLLMSettings(kv_cache_gib=0.05, enforce_eager=False)
    sampler = engine(policy, settings=settings)
    disturb(policy.trainable()[0], 0.1)
    assert mismatch(policy, sampler.generate(PROMPTS, LIMITS, SEEDS)) > 0.1
    sampler.sync()
    assert mismatch(policy, sampler.generate(PROMPTS, LIMITS, SEEDS)) < 1e-3


SMOLLM = Path(os.environ.get("KLIPPO_VLLM_MODEL", ROOT / "build/smollm2-135m-instruct"))


@pytest.mark.skipif(not SMOLLM.is_dir(), reason="benchmarks/prepare_smollm.py makes the model")
def test_log_probs_of_a_real_model_are_the_policys():
    policy = load(LlamaForCausalLM.from_pretrained(SMOLLM), tuning="lora").policy
    disturb(policy.trainable()[0], 0.01)
    prompts = [prompt(1, 4093, 198, *range(500, 500 + 7 * n)) for n in range(1, 5)]
    completions = engine(policy, max_tokens=60).generate(prompts, [24, 3, 9, 16], SEEDS)
    assert mismatch(policy, completions, prompts=prompts) < 1e-3


def test_greedy_responses_are_those_of_the_hugging_face_engine():
    policy = load(llama()).policy
    free = HFEngine(policy.lm.model, stop_ids=frozenset(), sampling=Sampling(temperature=0))
    stops = frozenset({free.generate(PROMPTS, LIMITS, SEEDS)[1].token_ids[7], EOS})
    theirs = HFEngine(policy.lm.model, stop_ids=stops, sampling=Sampling(temperature=0))
    expected = theirs.generate(PROMPTS, LIMITS, SEEDS)
    assert any(completion.finished for completion in expected)
    assert not all(completion.finished for completion in expected)
    ours = engine(policy, temperature=0.0, stops=stops).generate(PROMPTS, LIMITS, SEEDS)
    assert [(c.token_ids, c.finished) for c in ours] == [
        (c.token_ids, c.finished) for c in expected
    ]


@pytest.fixture
def policy():
    return load(llama()).policy


@pytest.fixture
def sampler(policy):
    return engine(policy, stops=(EOS, 9, 30))


def test_seeds_alone_decide_the_responses(sampler):
    together = sampler.generate(PROMPTS, LIMITS, SEEDS)
    assert sampler.generate(PROMPTS, LIMITS, SEEDS) == together
    assert sampler.generate(PROMPTS, LIMITS, response_seeds(1, range(4))) != together
    for order in ([2], [3, 0], [1, 3, 2, 0]):
        part = sampler.generate(
            [PROMPTS[i] for i in order], [LIMITS[i] for i in order], [SEEDS[i] for i in order]
        )
        assert [c.token_ids for c in part] == [together[i].token_ids for i in order]


def test_responses_end_at_a_stop_token_or_at_their_own_limit(sampler):
    prompts = PROMPTS * 16
    limits = [1 + i % 24 for i in range(len(prompts))]
    told = {}
    completions = sampler.generate(
        prompts, limits, response_seeds(2, range(len(prompts))), told.setdefault
    )
    assert told == dict(enumerate(completions))
    assert list(told) != sorted(told), "each is told when it is finished"
    for completion, limit in zip(completions, limits, strict=True):
        *inner, last = completion.token_ids
        assert not {EOS, 9, 30} & set(inner)
        assert completion.finished == (last in {EOS, 9, 30})
        assert completion.finished or len(completion.token_ids) == limit
    assert {completion.finished for completion in completions} == {True, False}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_frequencies_are_the_tempered_softmax(policy, temperature):
    number = 4000
    tokens = [
        completion.token_ids[0]
        for completion in engine(policy, temperature=temperature).generate(
            [PROMPTS[0]] * number, [1] * number, response_seeds(3, range(number))
        )
    ]
    with torch.no_grad():
        logits = policy.lm.model(torch.tensor([PROMPTS[0].token_ids])).logits[0, -1]
    expected = (logits / temperature).softmax(-1).double()
    shares = torch.bincount(torch.tensor(tokens), minlength=64) / number
    error = (expected * (1 - expected) / number).sqrt()
    assert bool(((shares - expected).abs() < 5 * error + 1e-3).all())


def test_a_failure_while_sampling_leaves_nothing_behind(sampler):
    def fail(i, completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.generate(PROMPTS, LIMITS, SEEDS, fail)
    assert len(sampler.generate(PROMPTS[:1], LIMITS[:1], SEEDS[:1])) == 1


def test_the_longest_prompt_and_response_fit_and_nothing_beyond(policy):
    limits, two = [35, 2], PROMPTS[2::-2]
    exact = engine(policy, stops=(), max_tokens=40)
    lengths = [len(c.token_ids) for c in exact.generate(two, limits, SEEDS[:2])]
    assert lengths == limits
    with pytest.raises(ConfigError, match=r"prompt of 5 tokens with a response of 36 .*=40"):
        exact.generate(two, [36, 2], SEEDS[:2])


def test_a_model_that_vllm_does_not_know_is_one_clear_error(policy):
    class Homemade(LlamaForCausalLM):
        """An architecture of nobody else's."""

    policy = load(Homemade(llama().config)).policy
    with pytest.raises(PreflightError, match=r"cannot run this Homemade .*use rollout.engine=hf"):
        engine(policy)


def test_a_shape_that_vllm_does_not_compute_is_one_clear_error():
    heads_of_40 = load(llama(head_dim=40)).policy
    with pytest.raises(PreflightError, match=r"cannot run this Llama.*head_dim=40.*engine=hf"):
        engine(heads_of_40)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_whole_run_logs_its_mismatch_and_ends(tuning: str, tmp_path: Path):
    mismatches = train_with_vllm(tmp_path, policy={"tuning": tuning}, ppo={"importance_cap": 2.0})
    assert max(mismatches) < 1e-2
