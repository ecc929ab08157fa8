"""What is in a run's folder, and whether this run may resume from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
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
"""Keys (and sections) that may change before a run is resumed."""
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
    """Where a run starts."""

    checkpoint: Checkpoint | None = None
    """None: at the beginning, in a folder whose content is replaced."""
    is_resumed: bool = False
    """Whether the folder's run is resumed; without a checkpoint from its beginning."""
    changed: list[str] = field(default_factory=list)
    """`key=value (was value)` of what differs from how it began."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with newer checkpoints."""


def find_start(
    path: Path, config: RunConfig, *, overwrite: bool = False, resume: bool = False
) -> Start:
    """Where the run of this config and folder starts.

    An unfinished run with an equal config is resumed without being asked. `resume` allows safe
    changes of the config, and resumes a finished run that kept its checkpoint. Raises ConfigError.
    """
    if overwrite and resume:
        raise ConfigError("--overwrite replaces a run and --resume continues it; choose one")
    status_file = path / STATUS_FILE
    if resume and not status_file.is_file():
        raise ConfigError(
            f"output_dir={path}: there is no run to resume (no {STATUS_FILE}); leave out --resume "
            "to start one"
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
            + ("" if checkpoint is None else ", or a larger ppo.num_steps to continue it")
        )
    changed = differences(config, path)
    unsafe = [key for key in changed if not is_safe(key)]
    if changed and (unsafe or not resume):
        raise ConfigError(_refusal(path, changed, unsafe))
    if checkpoint is None and problems:
        raise ConfigError(
            f"output_dir={path} holds an unfinished run, and none of its checkpoints is intact: "
            f"{'; '.join(problems)}; bring one back, choose another output_dir, or pass "
            "--overwrite to start over"
        )
    if checkpoint is None and not config.checkpoint.is_on and not resume:
        raise ConfigError(
            f"output_dir={path} exists already: an unfinished run without a checkpoint; pass "
            "--resume to start it over, or choose another output_dir"
        )
    described = [f"{key}={new} (was {old})" for key, (old, new) in changed.items()]
    return Start(checkpoint=checkpoint, is_resumed=True, changed=described, problems=problems)


def differences(config: RunConfig, path: Path) -> dict[str, tuple[str, str]]:
    """Keys whose value changed since the run began: key -> (then, now), as JSON.

    A run is the same if the config equals what was given then, or what it was resolved to.
    """
    earlier = []
    if (path / STARTED_FILE).is_file() and "config" in (started := _read(path / STARTED_FILE)):
        earlier.append(started["config"])
    if (path / CONFIG_FILE).is_file():
        with suppress(ConfigError):  # of another command
            earlier.append(load_config(path / CONFIG_FILE).config.model_dump(mode="json"))
    if not earlier:
        raise ConfigError(
            f"output_dir={path} exists already and is no PPO run that this version of Klippo can "
            "resume; choose another output_dir, or pass --overwrite to replace it"
        )
    now = dict(_leaves(config.model_dump(mode="json")))
    changes = []
    for tree in earlier:
        then = dict(_leaves(tree))
        keys = sorted((then.keys() | now.keys()) - {"output_dir"})
        pairs = {key: (then.get(key, "nothing"), now.get(key, "nothing")) for key in keys}
        changes.append({key: pair for key, pair in pairs.items() if pair[0] != pair[1]})
    return min(changes, key=len)


def is_safe(key: str) -> bool:
    """Whether a key may change before a run is resumed."""
    if key.startswith(("reward.", "gold.")):
        return key.rpartition(".")[2] in SAFE_OF_JUDGES
    return any(key == safe or key.startswith(f"{safe}.") for safe in SAFE)


def _refusal(path: Path, changed: Mapping[str, tuple[str, str]], unsafe: Sequence[str]) -> str:
    def listed(keys: Iterable[str]) -> str:
        return "".join(f"\n  {key}={changed[key][1]} (was {changed[key][0]})" for key in keys)

    text = f"output_dir={path} holds an unfinished run with another config."
    if unsafe:
        text += (
            "\nThese must not change; change them back, choose another output_dir, or pass "
            f"--overwrite to replace that run:{listed(unsafe)}"
        )
    if safe := [key for key in changed if key not in unsafe]:
        text += f"\nSafe to change; --resume continues with the new value:{listed(safe)}"
    return text


def resume_command(path: Path) -> str:
    """The command that resumes a run."""
    return f"klippo train {path / CONFIG_FILE} --resume"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
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
