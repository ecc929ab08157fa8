"""`klippo baselines`: what one would try instead of PPO, on the same file.

Each baseline starts where PPO starts, learns from the same rows behind the same prompts, and leaves
a run's folder.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from klippo.config.load import LoadedConfig, to_yaml
from klippo.config.schema import RunConfig
from klippo.data.logged import best_responses, pairs_by_reward
from klippo.data.rows import load_rows
from klippo.errors import ConfigError
from klippo.evaluation.statistics import compare_paired
from klippo.policy.loading import LoadedPolicy, load_policy
from klippo.policy.settings import CriticSettings
from klippo.policy.weights import save_model
from klippo.runs.folder import CONFIG_FILE, MODEL_DIR, RunFolder, write_text
from klippo.supervised.settings import TrainingSettings
from klippo.supervised.sft import (
    Example,
    fine_tune,
    loss_figures,
    nats_per_token,
    train_causal,
)
from klippo.supervised.training import Training, TrainingLine, prepare
from klippo.train.offline import OfflineData, read_logged
from klippo.types import LoggedResponse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("sft-best", "dpo")
Responses = Sequence[LoggedResponse]


class BestResponses:
    """Supervised fine-tuning on the best responses."""

    sequences_per_example = 1

    def __init__(self, train: Responses, held_out: Responses, share: float = 0.25) -> None:
        """If each prompt has one response, `share` of all are learnt."""
        best, by_prompt = best_responses(train, share)
        self.examples = [_example(one) for one in best]
        self._held_out = [_example(one) for one in best_responses(held_out, share)[0]]
        which = "of each prompt" if by_prompt else f"{share:.0%}"
        mean, of_all = (fmean(one.reward for one in some) for some in (best, train))
        self.about = (
            f"{len(best)} of {len(train)} responses, the best {which} "
            f"(mean reward {mean:.3g}, of all {of_all:.3g})"
        )

    def train(self, start: LoadedPolicy, training: Training) -> None:
        """Train the start's policy in place."""
        fine_tune(learner(start), start.tokenizer, self.examples, training)

    def measure(self, model: PreTrainedModel, batch_size: int) -> list[float]:
        """-log p per learnt token of each held-out example, nats."""
        return nats_per_token(model, self._held_out, batch_size)

    def result(self, before: Sequence[float], after: Sequence[float]) -> tuple[dict[str, Any], str]:
        """Figures of what was measured before and after training, and the same in words."""
        compared = compare_paired(before, after)
        if compared is None:
            return {}, "nothing was held out"
        return {"held_out_nats_per_token": loss_figures(compared)}, (
            f"held-out loss, {len(after)} best responses: {compared.before.mean:.3f} → "
            f"{compared.after.mean:.3f} nats/token"
        )


class Preferences:
    """DPO on pairs of a better and a worse response to the same prompt, by TRL's DPOTrainer.

    loss = -log sigmoid(r(better) - r(worse)), with the implicit reward
    r(y) = beta * (log pi(y) - log pi_start(y)) summed over the response's tokens
    (Rafailov et al. 2023, eq. 7).
    """

    sequences_per_example = 2

    def __init__(
        self,
        train: Responses,
        held_out: Responses,
        source: str,
        *,
        beta: float = 0.1,
        pairs_per_prompt: int = 4,
        min_margin: float = 0.0,
    ) -> None:
        """Of each prompt the `pairs_per_prompt` widest apart in reward, at least `min_margin`.

        Raises ConfigError without pairs; `source` is the data's name.
        """
        self._beta = beta
        chosen, other = (
            pairs_by_reward(some, min_margin=min_margin, max_per_prompt=pairs_per_prompt)
            for some in (train, held_out)
        )
        if not chosen.pairs:
            why, remedy = "each prompt has one response", "add responses to the same prompts"
            if chosen.num_ties + chosen.num_close:
                why, remedy = f"{chosen.num_ties} tie in reward or text", "check the rewards"
            if chosen.num_close:
                why += f", {chosen.num_close} lie closer than --dpo-min-margin {min_margin:g}"
                remedy = "lower --dpo-min-margin"
            raise ConfigError(
                f"{source}: DPO needs pairs, two responses to the same prompt with unlike rewards, "
                f"and there are none: {why}; {remedy}, or train the other baseline alone with "
                "--only sft-best"
            )
        self.examples, self._held_out = (
            [(_example(better), _example(worse)) for better, worse in some.pairs]
            for some in (chosen, other)
        )
        num_prompts = len({tuple(better.prompt.token_ids) for better, _ in chosen.pairs})
        gap = fmean(better.reward - worse.reward for better, worse in chosen.pairs)
        close = f" and {chosen.num_close} closer than {min_margin:g}" if chosen.num_close else ""
        self.about = (
            f"{len(chosen.pairs)} pairs of {num_prompts} prompts, {gap:.3g} apart in reward on "
            f"average ({chosen.num_ties} ties{close} left out)"
        )

    def train(self, start: LoadedPolicy, training: Training) -> None:
        """Train the start's policy in place, against its frozen copy.

        An adapter needs no copy: TRL keeps one of the adapter as it is now.
        """
        from trl import DPOConfig, DPOTrainer

        class TokenizedDPOTrainer(DPOTrainer):  # type: ignore[misc]
            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset  # token ids already, as PPO reads them

        columns = {
            "prompt_ids": [better.prompt for better, _ in self.examples],
            "chosen_ids": [better.response for better, _ in self.examples],
            "rejected_ids": [worse.response for _, worse in self.examples],
        }
        frozen = None if start.policy.peft_model is not None else start.reference.lm.model
        train_causal(
            TokenizedDPOTrainer,
            DPOConfig,
            learner(start),
            start.tokenizer,
            columns,
            training,
            options={"beta": self._beta},
            ref_model=frozen,
        )

    def measure(self, model: PreTrainedModel, batch_size: int) -> list[float]:
        """log pi(better) - log pi(worse) of each held-out pair, nats."""
        better, worse = (
            [
                -nats * len(example.response)
                for nats, example in zip(nats_per_token(model, side, batch_size), side, strict=True)
            ]
            for side in ([better for better, _ in self._held_out], [w for _, w in self._held_out])
        )
        return [b - w for b, w in zip(better, worse, strict=True)]

    def result(self, before: Sequence[float], after: Sequence[float]) -> tuple[dict[str, Any], str]:
        """Figures of what was measured before and after training, and the same in words."""
        if not after:
            return {}, "no pair was held out"
        margins = [self._beta * (b - a) for a, b in zip(before, after, strict=True)]
        num, accuracy, margin = len(margins), fmean(m > 0 for m in margins), fmean(margins)
        figures = {"held_out_pairs": num, "held_out_accuracy": accuracy, "held_out_margin": margin}
        return figures, (
            f"held-out pairs, {num}: the implicit reward is right on {accuracy:.2f} (at the start "
            f"it knows none), mean margin {margin:+.3f}"
        )


def baselines(
    loaded: LoadedConfig,
    *,
    only: str | None = None,
    best_share: float = 0.25,
    dpo_beta: float = 0.1,
    dpo_pairs: int = 4,
    dpo_min_margin: float = 0.0,
    learning_rate: float | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> int:
    """Train the baselines of an offline run; returns the exit code."""
    config = loaded.config
    if learning_rate is not None:
        optimizer = config.optimizer.model_copy(update={"learning_rate": learning_rate})
        config = config.model_copy(update={"optimizer": optimizer})
    if config.offline is None:
        raise ConfigError(
            "klippo baselines learns from responses that exist already, and this config samples "
            "new ones; add an offline section"
        )
    device = prepare("baselines", config)
    folders = {
        name: Path(f"{Path(config.output_dir)}-{name}") for name in NAMES if only in (None, name)
    }
    for folder in folders.values():
        RunFolder.check(folder, overwrite=overwrite)
    logged = read_logged(config, *load_rows(config.data, config.seed))
    starts = [_load_start(config, device)]
    data = OfflineData(config, logged, starts[0], device)
    plans: dict[str, BestResponses | Preferences] = {}
    if "sft-best" in folders:
        plans["sft-best"] = BestResponses(data.train, data.held_out, best_share)
    if "dpo" in folders:
        plans["dpo"] = Preferences(
            data.train,
            data.held_out,
            ", ".join(config.data.sources),
            beta=dpo_beta,
            pairs_per_prompt=dpo_pairs,
            min_margin=dpo_min_margin,
        )
    del data  # it holds the first start
    console = Console(highlight=False, soft_wrap=True)
    for name, plan in plans.items():
        start = starts.pop() if starts else _load_start(config, device)
        if not quiet:
            console.print(f"{name}: {plan.about}", markup=False)
        with TrainingLine(console, name, quiet=quiet) as line:
            figures, sentence = _train(plan, start, config, device, line)
        run = RunFolder.create(folders[name], overwrite=overwrite)
        with run.new_directory(MODEL_DIR) as model_dir:
            save_model(start.policy, start.tokenizer, model_dir)
        of_run = config.model_copy(update={"output_dir": str(run.path)})
        write_text(run.path / CONFIG_FILE, to_yaml(of_run))
        run.write_status("done", method=name, **figures)
        console.print(f"{name}: {sentence}", markup=False)
        del start
        gc.collect()  # before the next one is loaded
    runs = " and ".join(map(str, folders.values()))
    console.print(f"Done: {runs}; klippo compare takes them as it takes runs", markup=False)
    return 0


def _load_start(config: RunConfig, device: torch.device) -> LoadedPolicy:
    """The policy from which PPO starts too, fresh adapters included, and its frozen copy."""
    torch.manual_seed(config.seed)
    policy = config.policy.model_copy(update={"gradient_checkpointing": False})  # TRL's to turn on
    return load_policy(policy, CriticSettings(), device)


def _train(
    plan: BestResponses | Preferences,
    start: LoadedPolicy,
    config: RunConfig,
    device: torch.device,
    line: TrainingLine,
) -> tuple[dict[str, Any], str]:
    """Train the start's policy in place with PPO's settings as far as they have a meaning here."""
    assert config.offline is not None
    ppo, optimizer, policy = config.ppo, config.optimizer, config.policy
    # PPO's micro-batch counts sequences.
    most = max(ppo.micro_batch // plan.sequences_per_example, 1)
    micro = max(size for size in range(1, most + 1) if ppo.batch_size % size == 0)
    settings = TrainingSettings(
        num_epochs=config.offline.num_passes,
        batch_size=ppo.batch_size,
        micro_batch_size=micro,
        learning_rate=optimizer.learning_rate,
        schedule=optimizer.schedule,
        warmup_fraction=0.0,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        autocast=policy.autocast,
        gradient_checkpointing=policy.gradient_checkpointing,
    )
    model = learner(start)
    before = plan.measure(model, micro)
    training = Training(settings, config.seed, device, line.step)
    plan.train(start, training)
    figures, sentence = plan.result(before, plan.measure(model, micro))
    details = {
        "num_examples": len(plan.examples),
        "num_epochs": settings.num_epochs,
        "learning_rate": settings.learning_rate,
        "minutes": line.seconds / 60,
    }
    return details | figures, sentence


def learner(start: LoadedPolicy) -> PreTrainedModel:
    """What trains: the policy's adapters on their base, or the model itself."""
    return start.policy.peft_model or start.policy.lm.model


def _example(one: LoggedResponse) -> Example:
    return Example(one.prompt.token_ids, one.completion.token_ids)
