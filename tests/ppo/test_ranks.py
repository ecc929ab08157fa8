"""Rules 17, 19, 23, 24, 25: two processes do what one does, on real process groups.

The weights are float64: in float32 AdamW divides gradients that are almost zero by themselves, so
that rounding alone moves weights apart by up to a learning rate.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from klippo import ranks as ranks_module
from klippo.errors import ConfigError
from klippo.ppo.learner import Learner
from klippo.ppo.settings import PPOSettings
from klippo.ranks import Ranks
from tests.ppo.two_ranks import CASES, go_on, learn
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import assert_same_tensors, load

ROOT = Path(__file__).parents[2]


@pytest.fixture(
    scope="module", params=["none", "fsdp", pytest.param("shard_grad_op", marks=pytest.mark.slow)]
)
def held(request):
    """How the two processes hold the models."""
    return request.param


@pytest.fixture(scope="module")
def folder(held, tmp_path_factory):
    """Every case, learnt by two processes: NAME.RANK.pt."""
    path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ppo.two_ranks", held, str(path)],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0]
    return path


@pytest.mark.parametrize("name", CASES)
def test_two_processes_reach_the_weights_and_metrics_of_one(folder, name, held):
    alone = learn(CASES[name], Ranks(), "none")
    first, second = (torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1))
    assert_same_tensors(first["weights"], second["weights"], atol=0)
    assert first["metrics"] == second["metrics"], "so that health checks decide the same"
    assert_same_tensors(first["weights"], alone["weights"], **FLOAT64)
    assert first["metrics"] == pytest.approx(alone["metrics"], **FLOAT64_APPROX)
    assert first["kl_coef"] == pytest.approx(alone["kl_coef"], **FLOAT64_APPROX)
    assert first["moments"] == pytest.approx(alone["moments"], **FLOAT64_APPROX)


def test_the_state_of_two_is_that_of_one_process_and_starts_new_ones(folder, held):
    alone = go_on(Ranks(), "none")
    first, second = (torch.load(folder / f"state.{rank}.pt") for rank in (0, 1))
    assert first["in parts"] is (held != "none")
    for part in ("weights", "optimizer"):
        assert_same_tensors(first["then"][part], alone["then"][part], **FLOAT64)
    assert_same_tensors(first["now"], alone["now"], **FLOAT64)
    assert_same_tensors(second["now"], alone["now"], **FLOAT64)


def test_the_cases_do_what_their_names_say():
    counts = {
        name: learn(CASES[name], Ranks(), "none")["metrics"]
        for name in ("ratio skip by one process", "target kl", "nobody has scores")
    }
    assert counts["ratio skip by one process"]["update/num_skipped_minibatches"] == 2
    assert counts["target kl"]["update/stopped_early"] == 1
    assert counts["nobody has scores"]["update/num_optimizer_steps"] == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 4}, r"ppo\.batch_size=4 .* 3 processes; try 6"),
        ({"batch_size": 12, "minibatch_size": 4}, r"ppo\.minibatch_size=4 .* 3 processes; try 6"),
    ],
)
def test_a_batch_that_processes_cannot_share_is_refused(sizes, message):
    loaded = load()
    with pytest.raises(ConfigError, match=message):
        Learner(loaded.policy, loaded.reference, ppo=PPOSettings(**sizes), ranks=Ranks(0, 3))


def test_gradients_travel_in_messages_of_one_type_that_are_large_but_the_last(monkeypatch):
    monkeypatch.setattr(ranks_module, "BUCKET_BYTES", 16)
    tensors = [torch.zeros(n) for n in (1, 2, 1, 9, 1)] + [torch.zeros(3, dtype=torch.bfloat16)]
    found = [[x.numel() for x in bucket] for bucket in ranks_module._buckets(tensors)]
    assert found == [[1, 2, 1], [9], [1], [3]]


@pytest.mark.parametrize(("num", "world_size"), [(0, 2), (3, 2), (8, 3), (2, 5)])
def test_shares_put_together_are_the_whole(num, world_size):
    shares = [Ranks(rank, world_size).share(num) for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
