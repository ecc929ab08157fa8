"""What stands in a run's folder, and whether this run may go on from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klippo.config.load import load_config
from klippo.config.schema import RunConfig
from klippo.errors import ConfigError
from klippo.report.reading import STARTED_FILE
from klippo.runs.checkpoints import Checkpoint, Checkpoints
from klippo.runs.folder import CONFIG_FILE, STATUS_FILE, RunFolder

SAFE = (
    "device",
    "num_threads",
    "sharding",
    "peer_timeout_s",
    "max_memory_gib",
    "checkpoint",
    "health",
    "ppo.num_steps",
    "ppo.micro_batch_size",
    "ppo.micro_batch_tokens",
    "ppo.max_logprob_mismatch",
    "ppo.ratio_threshold",
    "ppo.target_kl",
    "rollout.generation_batch_size",
    "rollout.merge_adapters",
    "rollout.engine",
    "rollout.vllm",
    "evaluation.every",
    "evaluation.num_shown",
    "optimizer.learning_rate",
    "optimizer.critic_learning_rate",
    "optimizer.max_grad_norm",
)
"""Keys (and sections) that may change when a run goes on."""
SAFE_OF_JUDGES = (
    "concurrency",
    "timeout_s",
    "max_attempts",
    "max_calls",
    "max_tokens_total",
    "max_usd",
    "max_unscored_step",
    "max_unscored_run",
    "outage_patience_s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a run begins."""

    checkpoint: Checkpoint | None = None
    """None: at the beginning, in a folder whose content goes."""
    is_resumed: bool = False
    """Whether a run that stands there goes on; without a checkpoint from its beginning."""
    changed: list[str] = field(default_factory=list)
    """`key=value (was value)` of what differs from how it began."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with newer checkpoints."""


def find_start(
    path: Path, config: RunConfig, *, overwrite: bool = False, resume: bool = False
) -> Start:
    """Where the run of this config and folder begins.

    An unfinished run with an equal config goes on by itself. `resume` allows safe changes of the
    config, and a finished run that kept its checkpoint to go on. Raises ConfigError.
    """
    if overwrite and resume:
        raise ConfigError("--overwrite replaces a run and --resume goes on with it; choose one")
    status_file = path / STATUS_FILE
    if resume and not status_file.is_file():
        raise ConfigError(
            f"output_dir={path}: there is no run to go on with (no {STATUS_FILE}); leave --resume "
            "out to start one"
        )
    if overwrite or not status_file.is_file():
        RunFolder.check(path, overwrite=overwrite)
        return Start()
    is_done = _read(status_file).get("state") == "done"
    checkpoint, problems = Checkpoints(path).newest()
    if is_done and (checkpoint is None or config.ppo.num_steps <= checkpoint.step):
        raise ConfigError(
            f"output_dir={path} exists already: that run is done; choose another output_dir, or "
            "pass --overwrite to replace it"
            + ("" if checkpoint is None else ", or a larger ppo.num_steps to go on with it")
        )
    changed = differences(config, path)
    _refuse_changes(path, changed, resume=resume)
    if checkpoint is None:
        _refuse_beginning_again(path, config, problems, resume=resume)
    told = [f"{key}={new} (was {old})" for key, (old, new) in changed.items()]
    return Start(checkpoint=checkpoint, is_resumed=True, changed=told, problems=problems)


def differences(config: RunConfig, path: Path) -> dict[str, tuple[str, str]]:
    """Keys whose value is another than when the run began: key -> (then, now), as JSON."""
    now = _flat(config.model_dump(mode="json"))
    candidates = []
    if (path / STARTED_FILE).is_file() and "config" in (started := _read(path / STARTED_FILE)):
        candidates.append(_flat(started["config"]))
    if (resolved := _resolved(path / CONFIG_FILE)) is not None:
        candidates.append(_flat(resolved))
    if not candidates:
        raise ConfigError(
            f"output_dir={path} exists already and is no PPO run that this version of Klippo can "
            "go on with; choose another output_dir, or pass --overwrite to replace it"
        )
    found = [
        {
            key: (then.get(key, "nothing"), now.get(key, "nothing"))
            for key in sorted(then.keys() | now.keys())
            if key != "output_dir" and then.get(key) != now.get(key)
        }
        for then in candidates
    ]
    return min(found, key=len)


def is_safe(key: str) -> bool:
    """Whether a key may change while the run stands still."""
    if key.startswith(("reward.", "gold.")):
        return key.rpartition(".")[2] in SAFE_OF_JUDGES
    return any(key == safe or key.startswith(f"{safe}.") for safe in SAFE)


def _refuse_changes(path: Path, changed: Mapping[str, tuple[str, str]], *, resume: bool) -> None:
    unsafe = [key for key in changed if not is_safe(key)]
    if not changed or (resume and not unsafe):
        return

    def told(keys: list[str]) -> str:
        return "".join(f"\n  {key}={changed[key][1]} (was {changed[key][0]})" for key in keys)

    safe = [key for key in changed if key not in unsafe]
    text = f"output_dir={path} holds an unfinished run with another config."
    if unsafe:
        text += (
            "\nNot to be changed on the way; change back, or choose another output_dir, or pass "
            f"--overwrite to replace that run:{told(unsafe)}"
        )
    if safe:
        text += f"\nSafe to change; --resume goes on with the new value:{told(safe)}"
    raise ConfigError(text)


def _refuse_beginning_again(
    path: Path, config: RunConfig, problems: list[str], *, resume: bool
) -> None:
    if problems:
        raise ConfigError(
            f"output_dir={path} holds an unfinished run, and none of its checkpoints is whole: "
            f"{'; '.join(problems)}; bring one back, choose another output_dir, or pass "
            "--overwrite to begin again"
        )
    if not config.checkpoint.is_on and not resume:
        raise ConfigError(
            f"output_dir={path} exists already: an unfinished run without a checkpoint; pass "
            "--resume to begin it again, or choose another output_dir"
        )


def resume_command(path: Path) -> str:
    """What goes on with a run."""
    return f"klippo train {path / CONFIG_FILE} --resume"


def _resolved(file: Path) -> dict[str, Any] | None:
    """What a run's config.yaml says; None where there is none, or one of another command."""
    if not file.is_file():
        return None
    try:
        return load_config(file).config.model_dump(mode="json")
    except ConfigError:
        return None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    return dict(_leaves(tree, prefix))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} cannot be read; remove the folder or choose another output_dir")
    return content
