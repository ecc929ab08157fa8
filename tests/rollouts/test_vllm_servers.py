"""`klippo serve-rollouts` with vLLM, against the policy itself: `make test-vllm`."""

import gc
from functools import partial
from pathlib import Path

import pytest
import torch

from klippo.errors import PreflightError
from klippo.policy.merged import merged_weights
from klippo.rollouts.opening import Opening
from klippo.rollouts.servers import ServersEngine
from klippo.rollouts.settings import VLLMSettings
from klippo.rollouts.vllm import vllm_version
from tests.rollouts.serving import QUICK, later, server_process
from tests.rollouts.test_vllm_engine import (
    LIMITS,
    PROMPTS,
    SEEDS,
    llama,
    mismatch,
    train_with_vllm,
)
from tests.toys import EOS, disturb, load

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(vllm_version() is None, reason="needs a Python with vLLM: `make test-vllm`"),
]


@pytest.fixture(scope="module")
def server():
    command = ("klippo", "serve-rollouts", "--device", "cpu", "--port")
    with server_process(*command) as process:
        yield process


def sampler(policy, *urls, say=lambda text: None, temperature=0.7):
    opening = Opening.of(
        policy.lm.model, VLLMSettings(kv_cache_gib=0.05), dtype=torch.float32, max_tokens=40,
        stop_ids=frozenset({EOS}), temperature=temperature, batch_size=None, seed=0,
    )  # fmt: skip
    weights = partial(merged_weights, policy)
    return ServersEngine(urls, weights, opening, patience_s=120, say=say, timing=QUICK)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_log_probs_are_the_policys_before_and_after_a_step(server, tuning):  # rule 8
    policy = load(llama(), tuning=tuning).policy
    engine = sampler(policy, server.url)
    before = engine.generate(PROMPTS, LIMITS, SEEDS)
    assert mismatch(policy, before) < 1e-3
    disturb(policy.trainable()[0], 0.1)
    assert engine.generate(PROMPTS, LIMITS, SEEDS) == before, "a copy, until it is renewed"
    engine.sync()
    after = engine.generate(PROMPTS, LIMITS, SEEDS)
    assert mismatch(policy, after) < 1e-3
    assert mismatch(policy, before) > 0.1


def test_kill_9_in_the_middle_of_a_batch_changes_no_response(server):
    policy = load(llama()).policy
    prompts, limits = PROMPTS * 8, [1 + i for i in range(32)]
    seeds = [SEEDS[0] + i for i in range(32)]
    said, told, restarting = [], [], []
    engine = sampler(policy, server.url, say=said.append)
    whole = engine.generate(prompts, limits, seeds)
    disturb(policy.trainable()[0], 0.1)
    engine.sync()
    expected = engine.generate(prompts, limits, seeds)
    assert expected != whole

    def kill(i, completion):
        told.append(i)
        if len(told) == 2:
            server.kill()
            restarting.append(later(server.start))

    found = engine.generate(prompts, limits, seeds, kill)
    restarting[0].join()
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert mismatch(policy, found, prompts=prompts) < 1e-3
    assert sorted(told) == list(range(32))
    assert len(said) == 2, "lost, and back"


def test_a_whole_run_on_a_server_has_small_mismatches(server, tmp_path: Path):
    gc.collect()  # engines of the tests before this one hold the server
    assert max(train_with_vllm(tmp_path, vllm={"servers": [server.url]})) < 1e-2


def test_a_shape_that_vllm_does_not_compute_is_one_clear_error_from_the_server(server):
    heads_of_40 = load(llama(head_dim=40)).policy
    with pytest.raises(PreflightError, match=rf"{server.url}: vLLM cannot run .*head_dim=40"):
        sampler(heads_of_40, server.url).generate(PROMPTS, LIMITS, SEEDS)
