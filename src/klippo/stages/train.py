"""The stage behind `klippo train`."""

from pathlib import Path

from klippo.config.load import LoadedConfig
from klippo.ranks import Ranks
from klippo.runs.folder import RunFolder
from klippo.stages.build import choose_device
from klippo.stages.trainer import PPOTrainer


def train(loaded: LoadedConfig, *, overwrite: bool = False, quiet: bool = False) -> int:
    """Run PPO as the config says; returns the exit code."""
    ranks = Ranks.from_environment(choose_device(loaded.config.device))
    ranks.on_main(lambda: RunFolder.check(Path(loaded.config.output_dir), overwrite=overwrite))
    PPOTrainer(loaded, overwrite=overwrite, quiet=quiet).train()
    return 0
