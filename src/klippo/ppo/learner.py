"""PPO with its state: policy, reference, optimizer, schedule, KL control, score statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from klippo.errors import ConfigError
from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.ppo.experience import Experience, Forward, build_experience
from klippo.ppo.optimizer import Optimizer, build_schedule
from klippo.ppo.settings import KLSettings, OptimizerSettings, PPOSettings, ScoreSettings
from klippo.ppo.update import loss_of, parts_of, ppo_update, warm_up_loss
from klippo.ranks import Ranks
from klippo.tensors.estimators import RunningMoments
from klippo.types import Metrics, Rollout, Scores


class Learner:
    """Learns from one scored rollout batch at a time; knows no engine and no reward."""

    def __init__(
        self,
        policy: ActorCritic,
        reference: Reference,
        *,
        ppo: PPOSettings | None = None,
        kl: KLSettings | None = None,
        score: ScoreSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.ppo = ppo or PPOSettings()
        self.kl = kl or KLSettings()
        self.score = score or ScoreSettings()
        self.optimizer_settings = optimizer or OptimizerSettings()
        self.ranks = ranks or Ranks()
        require_equal_shares(self.ppo, self.ranks)
        target = self.kl.target if self.kl.controller == "adaptive" else None
        self.kl_controller = KLController(self.kl.coef, target, self.kl.horizon)
        self.score_moments = RunningMoments()
        self.optimizer = Optimizer(policy, reference, self.optimizer_settings, self.ranks)
        self.scheduler = self._schedule()
        self.generator = torch.Generator().manual_seed(seed)  # the same on every process
        self.num_steps_done = 0

    @torch.no_grad()
    def forward(self, rollout: Rollout) -> Forward:
        """Run policy, critic and reference once, in the update's own micro-batches."""
        batch, temperature, policy = rollout.tokens, rollout.temperature, self.policy
        after_last = self.ppo.bootstrap_truncated
        (num_rows, num_response), num_prompt = batch.response_ids.shape, batch.prompt_ids.shape[1]
        full: dict[str, Tensor] = {}

        def put(name: str, x: Tensor, width: int = num_response, first: int = 0) -> None:
            """x (b, t, ...) into the rows of this micro-batch, from column `first`."""
            if name not in full:
                full[name] = x.new_zeros(num_rows, width, *x.shape[2:])
            full[name][rows, first : first + x.shape[1]] = x

        for rows in parts_of(self.ppo, batch, ranks=self.ranks):
            tokens = policy.lm.with_frozen_states(batch.rows(rows))
            if tokens.frozen_states is not None:
                missing = num_prompt - tokens.prompt_ids.shape[1]
                put("frozen_states", tokens.frozen_states, num_prompt + num_response, missing)
            hidden = policy.lm.hidden(tokens, after_last=after_last)
            values = policy.critic(tokens, hidden, after_last=after_last)
            put("values", values, num_response + int(after_last))
            hidden = hidden[:, : tokens.response_ids.shape[1]]
            if self._is_warming_up and policy.critic.reads_policy:
                put("hidden", hidden)
            if rollout.behavior == "policy":
                logprobs, entropy = policy.lm.logprobs(
                    tokens, hidden, temperature, with_entropy=True
                )
                ref_logprobs = self.reference.logprobs(tokens, temperature)
            else:
                logprobs, entropy, ref_logprobs, exact_kl = self.reference.compare(
                    policy.lm, tokens, temperature, hidden
                )
                put("exact_kl", exact_kl)
            put("logprobs", logprobs)
            put("entropy", entropy)
            put("ref_logprobs", ref_logprobs)
        self.optimizer.free_gathered()
        batch = replace(batch, frozen_states=full.pop("frozen_states", None))
        return Forward(tokens=batch, **full)

    def experience(
        self, rollout: Rollout, scores: Scores, forward: Forward | None = None
    ) -> Experience:
        """What the rollout teaches; `forward` is what `self.forward` gave, and runs by default."""
        return build_experience(
            self.ppo,
            self.kl,
            self.score,
            rollout,
            forward or self.forward(rollout),
            scores,
            kl_coef=self.kl_controller.coef,
            moments=self.score_moments,
            ranks=self.ranks,
        )

    def learn(self, experience: Experience) -> Metrics:
        """One PPO step on this experience."""
        if experience.num_scored == 0:
            stats: Metrics = {"update/num_optimizer_steps": 0.0}
        else:
            loss = partial(warm_up_loss, self.ppo, self.policy)
            if not self._is_warming_up:
                coef = 0.0 if self.kl.placement == "reward" else self.kl_controller.coef
                reference = self.reference if self.kl.placement == "exact" else None
                loss = partial(loss_of, self.ppo, self.policy, kl_coef=coef, exact_kl_to=reference)
            stats = ppo_update(
                self.ppo,
                loss,
                self.policy,
                self.optimizer,
                experience,
                generator=self.generator,
                ranks=self.ranks,
            )
            self.kl_controller.update(experience.sequence_kl, experience.num_scored)
        stats["update/learning_rate"] = float(self.optimizer.adam.param_groups[0]["lr"])
        # PyTorch warns when a schedule moves before the first optimizer step (if no row was scored
        # or every minibatch skipped); this one counts PPO steps and moves all the same.
        self.optimizer.adam._opt_called = True  # type: ignore[attr-defined]
        self.scheduler.step()
        self.num_steps_done += 1
        return experience.metrics | stats

    def state_dict(self) -> dict[str, Any]:
        """All other state, as JSON holds it."""
        return {
            "num_steps_done": self.num_steps_done,
            "kl_coef": self.kl_controller.coef,
            "score_moments": self.score_moments.state_dict(),
            "shuffling": self.generator.get_state().tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` gave."""
        self.num_steps_done = int(state["num_steps_done"])
        self.kl_controller.coef = float(state["kl_coef"])
        self.score_moments.load_state_dict(state["score_moments"])
        self.generator.set_state(torch.tensor(state["shuffling"], dtype=torch.uint8))
        self.scheduler = self._schedule(self.num_steps_done)

    def _schedule(self, num_steps_done: int = 0) -> LambdaLR:
        settings, num_steps = self.optimizer_settings, self.ppo.num_steps
        return build_schedule(self.optimizer.adam, settings, num_steps, num_steps_done)

    @property
    def _is_warming_up(self) -> bool:
        """Whether this step trains the critic alone."""
        return self.num_steps_done < self.ppo.num_critic_warmup_steps


@dataclass(slots=True)
class KLController:
    """beta, and how it follows the measured KL.

    Fixed, or adaptive after Ziegler et al. 2019 (arXiv 1909.08593), section 2.2:

        e = clip(KL / target - 1, -0.2, 0.2);   beta *= 1 + e * n / horizon
    """

    coef: float  # beta, reward units per nat
    target: float | None = None  # nats per sequence; None keeps beta fixed
    horizon: float = 10_000.0  # episodes

    def update(self, sequence_kl: float, num_episodes: int) -> None:
        """Take in the mean KL per sequence (nats) of num_episodes sequences."""
        if self.target is None:
            return
        error = min(max(sequence_kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_episodes / self.horizon


def require_equal_shares(ppo: PPOSettings, ranks: Ranks) -> None:
    """Raise ConfigError if the processes cannot share batch and minibatch evenly."""
    for name, size in {"batch_size": ppo.batch_size, "minibatch_size": ppo.minibatch}.items():
        if size % ranks.world_size != 0:
            raise ConfigError(
                f"ppo.{name}={size} must be a multiple of the {ranks.world_size} processes; try "
                f"{math.ceil(size / ranks.world_size) * ranks.world_size}"
            )
