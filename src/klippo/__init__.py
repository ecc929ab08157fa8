"""Klippo: PPO for language models from any reward, and an honest account of what it did."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klippo.config.load import LoadedConfig, config_from_mapping, load_config
    from klippo.config.schema import RunConfig
    from klippo.train.trainer import PPOTrainer
    from klippo.types import Completion, Prompt, Rollout, Scores

__version__ = "0.1.0"

_HOMES = {
    "PPOTrainer": "klippo.train.trainer",
    "RunConfig": "klippo.config.schema",
    "LoadedConfig": "klippo.config.load",
    "load_config": "klippo.config.load",
    "config_from_mapping": "klippo.config.load",
    "Prompt": "klippo.types",
    "Completion": "klippo.types",
    "Rollout": "klippo.types",
    "Scores": "klippo.types",
}

__all__ = [
    "Completion",
    "LoadedConfig",
    "PPOTrainer",
    "Prompt",
    "Rollout",
    "RunConfig",
    "Scores",
    "__version__",
    "config_from_mapping",
    "load_config",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import klippo` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'klippo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
