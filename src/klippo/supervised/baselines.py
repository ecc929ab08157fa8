"""The stage behind `klippo baselines`: what one would try instead of PPO, on the same file.

Each baseline starts where PPO starts, learns from the same rows behind the same prompts, and leaves
a run's folder.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from klippo.config.load import LoadedConfig, to_yaml
from klippo.config.schema import RunConfig
from klippo.data.rows import load_rows, train_source
from klippo.errors import ConfigError
from klippo.policy.loading import LoadedPolicy, load_policy
from klippo.policy.saving import save_model
from klippo.policy.settings import CriticSettings
from klippo.ranks import choose_device
from klippo.runs.folder import CONFIG_FILE, MODEL_DIR, RunFolder, write_text
from klippo.supervised.baseline_plans import PLANS, Plan, PlanOptions, Responses, learner
from klippo.supervised.progress import TrainingLine
from klippo.supervised.settings import TrainingSettings
from klippo.supervised.training import Training, check_one_process
from klippo.train.offline import Logged, OfflineData, read_logged


def baselines(
    loaded: LoadedConfig,
    options: PlanOptions,
    *,
    only: str | None = None,
    learning_rate: float | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> int:
    """Train the baselines of an offline run; returns the exit code."""
    check_one_process("baselines")
    config = _with_learning_rate(loaded.config, learning_rate)
    if config.offline is None:
        raise ConfigError(
            "klippo baselines learns from responses that exist already, and this config samples "
            "new ones; add an offline section"
        )
    folders = {
        name: Path(f"{Path(config.output_dir)}-{name}") for name in PLANS if only in (None, name)
    }
    for folder in folders.values():
        RunFolder.check(folder, overwrite=overwrite)
    device = choose_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    logged = read_logged(config, *load_rows(config.data, config.seed))
    first = _load_start(config, device)
    plans = _plan(config, logged, first, device, list(folders), options)
    starts = [first]
    del first
    console = Console(highlight=False, soft_wrap=True)
    for name, plan in plans.items():
        start = starts.pop() if starts else _load_start(config, device)
        if not quiet:
            console.print(f"{name}: {plan.about}", markup=False)
        with TrainingLine(console, name, quiet=quiet) as line:
            figures, sentence = _train(plan, start, config, device, line)
        _save(folders[name], start, config, {"method": name} | figures, overwrite=overwrite)
        console.print(f"{name}: {sentence}", markup=False)
        del start
        gc.collect()  # before the next one is loaded
    runs = " and ".join(map(str, folders.values()))
    console.print(f"Now there is {runs}; klippo compare takes them as it takes runs", markup=False)
    return 0


def _with_learning_rate(config: RunConfig, learning_rate: float | None) -> RunConfig:
    if learning_rate is None:
        return config
    optimizer = config.optimizer.model_copy(update={"learning_rate": learning_rate})
    return config.model_copy(update={"optimizer": optimizer})


def _load_start(config: RunConfig, device: torch.device) -> LoadedPolicy:
    """The policy from which PPO starts too, fresh adapters included, and its frozen copy."""
    torch.manual_seed(config.seed)
    policy = config.policy.model_copy(update={"gradient_checkpointing": False})  # TRL's to turn on
    return load_policy(policy, CriticSettings(), device)


def _plan(
    config: RunConfig,
    logged: Logged,
    start: LoadedPolicy,
    device: torch.device,
    names: list[str],
    options: PlanOptions,
) -> dict[str, Plan]:
    """All plans before anything trains."""
    data = OfflineData(config, logged, start, device)
    responses = Responses(
        train=data.train, held_out=data.held_out, source=train_source(config.data)
    )
    return {name: PLANS[name](responses, options) for name in names}


def _train(
    plan: Plan, start: LoadedPolicy, config: RunConfig, device: torch.device, line: TrainingLine
) -> tuple[dict[str, Any], str]:
    """Train the start's policy in place: figures and a sentence about it."""
    settings = _training_settings(config, plan.sequences_per_example)
    assert settings.micro_batch_size is not None
    model = learner(start)
    before = plan.measure(model, settings.micro_batch_size)
    plan.train(start, Training(settings=settings, seed=config.seed, device=device), line.step)
    after = plan.measure(model, settings.micro_batch_size)
    figures = {
        "num_examples": plan.num_examples,
        "num_epochs": settings.num_epochs,
        "learning_rate": settings.learning_rate,
        "minutes": line.seconds / 60,
    }
    return figures | plan.figures(before, after), plan.sentence(before, after)


def _training_settings(config: RunConfig, sequences_per_example: int) -> TrainingSettings:
    """PPO's settings as far as they have a meaning here; its micro-batch counts sequences."""
    assert config.offline is not None
    ppo, optimizer = config.ppo, config.optimizer
    most = (ppo.micro_batch_size or ppo.minibatch_size or ppo.batch_size) // sequences_per_example
    fits = [size for size in range(1, max(most, 1) + 1) if ppo.batch_size % size == 0]
    return TrainingSettings(
        num_epochs=config.offline.num_passes,
        batch_size=ppo.batch_size,
        micro_batch_size=fits[-1],
        learning_rate=optimizer.learning_rate,
        schedule=optimizer.schedule,
        warmup_fraction=0.0,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        autocast=config.policy.autocast,
        gradient_checkpointing=config.policy.gradient_checkpointing,
    )


def _save(
    path: Path,
    start: LoadedPolicy,
    config: RunConfig,
    details: Mapping[str, Any],
    *,
    overwrite: bool,
) -> None:
    """A run's folder: model, config and status."""
    folder = RunFolder.create(path, overwrite=overwrite)
    with folder.new_directory(MODEL_DIR) as model_dir:
        save_model(start.policy, start.tokenizer, model_dir)
    write_text(path / CONFIG_FILE, to_yaml(config.model_copy(update={"output_dir": str(path)})))
    folder.write_status("done", **details)
