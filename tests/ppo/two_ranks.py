"""PPO steps that are the same work for one process and for two; run by test_ranks.py.

python -m tests.ppo.two_ranks HELD FOLDER    (with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)
"""

import copy
import dataclasses
import math
import sys
from pathlib import Path

import torch

from klippo.policy.settings import CriticSettings, Sharding
from klippo.policy.sharding import full_weights, is_sharded, shard
from klippo.ppo.learner import Learner
from klippo.ppo.settings import KLSettings, OptimizerSettings, PPOSettings, ScoreSettings
from klippo.ranks import Ranks
from klippo.types import Scores
from tests.toys import CPU, LORA, RAGGED, disturb, llama, load, make_rollout, weights

NAN = math.nan
REWARD = [1.0, -2.0, 0.5, 3.0]
LORA_CRITIC = CriticSettings(kind="lora", lora=LORA)


@dataclasses.dataclass
class Case:
    """A batch of four rows (two a process), learnt from `num_steps` times."""

    reward: list[float] = dataclasses.field(default_factory=lambda: REWARD)
    ppo: dict = dataclasses.field(default_factory=dict)
    kl: dict = dataclasses.field(default_factory=dict)
    score: dict = dataclasses.field(default_factory=dict)
    tuning: str = "full"
    critic: CriticSettings = dataclasses.field(default_factory=CriticSettings)
    gradient_checkpointing: bool = False
    num_steps: int = 1
    old_shift: list[float] | None = None
    """Added to the old log-probs of each row."""


CASES = {
    "plain": Case(ppo={"num_epochs": 2, "entropy_coef": 0.05}),
    "minibatches": Case(ppo={"minibatch_size": 2, "num_epochs": 3}, num_steps=2),
    "micro-batches": Case(ppo={"micro_batch_size": 1}, kl={"placement": "loss", "coef": 0.3}),
    # The first process's rows would be 2 * (3 + 6) tokens and pass apart, the other's are 2 * 8.
    "unlike numbers of micro-batches": Case(ppo={"micro_batch_tokens": 16, "num_epochs": 2}),
    "score statistics": Case(
        score={"normalize": True, "whiten": True, "missing_eos": "subtract"},
        kl={"controller": "adaptive", "target": 0.01, "horizon": 50.0},
        num_steps=2,
    ),
    "lora policy and critic": Case(tuning="lora", critic=LORA_CRITIC, num_steps=2),
    "frozen blocks": Case(
        tuning="last_layers", ppo={"minibatch_size": 2, "micro_batch_size": 1}, num_steps=2
    ),
    "a process without scores": Case(reward=[1.0, -2.0, NAN, NAN], num_steps=2),
    "nobody has scores": Case(reward=[NAN] * 4),
    "ratio skip by one process": Case(
        ppo={"ratio_threshold": 10.0, "num_epochs": 2}, old_shift=[0.0, 0.0, 0.0, -6.0]
    ),
    "target kl": Case(ppo={"num_epochs": 6, "target_kl": 0.1}, old_shift=[0.0, 0.0, 0.0, -2.0]),
    "separate critic": Case(critic=CriticSettings(kind="separate"), num_steps=2),
    "exact kl": Case(kl={"placement": "exact", "coef": 0.3}, ppo={"micro_batch_size": 1}),
    "gradient checkpointing": Case(
        tuning="lora", critic=LORA_CRITIC, gradient_checkpointing=True, num_steps=2
    ),
    "critic warm-up": Case(ppo={"num_critic_warmup_steps": 2}, num_steps=3),
}


def learn(case: Case, ranks: Ranks, held: Sharding) -> dict:
    """Weights, metrics and state after the case's steps in this process."""
    rows = [i for i in range(4) if i * ranks.world_size // 4 == ranks.rank]
    loaded = load(
        llama(),
        tuning=case.tuning,
        critic=case.critic,
        num_unfrozen_layers=1,
        gradient_checkpointing=case.gradient_checkpointing,
    )
    disturb([p for group in loaded.policy.trainable() for p in group], scale=0.05)
    shard(held, loaded.policy, loaded.reference, CPU, ranks)
    learner = Learner(
        loaded.policy,
        loaded.reference,
        ppo=PPOSettings(batch_size=4, **({"num_epochs": 1} | case.ppo)),
        kl=KLSettings(**case.kl),
        score=ScoreSettings(**case.score),
        optimizer=OptimizerSettings(learning_rate=1e-3),
        ranks=ranks,
    )
    rollout = make_rollout([RAGGED[i] for i in rows], temperature=0.8)
    scores = Scores(reward=torch.tensor([case.reward[i] for i in rows]))
    for _ in range(case.num_steps):
        experience = learner.experience(rollout, scores)
        if case.old_shift is not None:
            shift = torch.tensor([case.old_shift[i] for i in rows])[:, None]
            experience = dataclasses.replace(
                experience, old_logprobs=experience.old_logprobs + shift
            )
        metrics = learner.learn(experience)
    with full_weights(learner.policy):
        trained = weights(learner.policy)
    return {
        "weights": trained,
        "metrics": metrics,
        "kl_coef": learner.kl_controller.coef,
        "moments": learner.score_moments.state_dict(),
    }


def go_on(ranks: Ranks, held: Sharding) -> dict:
    """One step, all state through the first process and back into new shards, and another step."""
    optimizer = OptimizerSettings(learning_rate=1e-3)
    rows = [i for i in range(4) if i * ranks.world_size // 4 == ranks.rank]
    rollout = make_rollout([RAGGED[i] for i in rows])
    scores = Scores(reward=torch.tensor([REWARD[i] for i in rows]))

    def start() -> Learner:
        critic = CriticSettings(kind="separate")
        loaded = load(llama(), critic=critic, sharding=held, ranks=ranks)
        ppo = PPOSettings(batch_size=4, num_epochs=1)
        return Learner(loaded.policy, loaded.reference, ppo=ppo, optimizer=optimizer, ranks=ranks)

    first = start()
    first.learn(first.experience(rollout, scores))
    then = ranks.gather(first.optimizer.tensors())[0]
    second = start()
    second.optimizer.load_tensors(copy.deepcopy(then))  # it goes on in what it loads
    second.load_state_dict(first.state_dict())
    second.learn(second.experience(rollout, scores))
    with full_weights(second.policy):
        return {
            "then": then,
            "now": weights(second.policy),
            "in parts": is_sharded(second.policy),
        }


def main(held: Sharding, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.from_environment(CPU)
    assert ranks.world_size == 2
    own = torch.tensor([ranks.rank + 1.0])
    assert ranks.all_sum(own).item() == 3.0
    assert own.item() == ranks.rank + 1.0, "a sum leaves its input alone"
    torch.save(go_on(ranks, held), folder / f"state.{ranks.rank}.pt")
    for name, case in CASES.items():
        torch.save(learn(case, ranks, held), folder / f"{name}.{ranks.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
