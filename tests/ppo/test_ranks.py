"""Two processes do what one does, on real process groups.

The weights are float64: in float32 AdamW divides gradients that are almost zero by themselves, so
that rounding alone moves weights apart by up to a learning rate.
"""

import os
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from klippo.errors import ConfigError
from klippo.ppo.learner import Learner
from klippo.ppo.settings import PPOSettings
from klippo.ppo.update import minibatches
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


@pytest.mark.parametrize(("batch_size", "minibatch_size"), [(24, 6), (24, 24), (24, None)])
def test_each_minibatch_has_equally_many_rows_of_every_process(batch_size, minibatch_size):
    settings = PPOSettings(batch_size=batch_size, minibatch_size=minibatch_size, num_epochs=2)

    def rows_of(world_size):
        """Of each minibatch, numbered as in the whole batch; one list per process."""
        num_own = batch_size // world_size
        held = SimpleNamespace(tokens=range(num_own), mask=torch.ones(num_own, 1))
        return [
            [
                (rows + rank * num_own).tolist()
                for rows in minibatches(
                    settings, held, torch.Generator().manual_seed(5), Ranks(rank, world_size)
                )
            ]
            for rank in range(world_size)
        ]

    [alone] = rows_of(1)
    for world_size in (2, 3):
        shares = rows_of(world_size)
        for minibatch, *parts in zip(alone, *shares, strict=True):
            assert {len(part) for part in parts} == {len(minibatch) // world_size}
            assert list(chain(*parts)) == minibatch
    size = minibatch_size or batch_size
    num = batch_size // size
    for epoch in (alone[:num], alone[num:]):
        assert sorted(chain(*epoch)) == list(range(batch_size)), "every row once"
    assert num == 1 or alone[:num] != alone[num:]


def test_rows_that_do_not_divide_make_minibatches_that_differ_by_one_group():
    settings = PPOSettings(batch_size=12, minibatch_size=4, num_epochs=1)
    held = SimpleNamespace(tokens=range(10), mask=torch.ones(10, 1))
    found = [rows.tolist() for rows in minibatches(settings, held, torch.Generator(), Ranks())]
    assert sorted(chain(*found)) == list(range(10))
    assert sorted(map(len, found)) == [3, 3, 4]


@pytest.mark.parametrize(("num", "world_size"), [(0, 2), (3, 2), (8, 3), (2, 5)])
def test_shares_put_together_are_the_whole(num, world_size):
    shares = [Ranks(rank, world_size).share(num) for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
