"""The stages before PPO: `klippo sft` and `klippo reward-model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from klippo.cli.ending import ending
from klippo.cli.source import (
    ConfigDir,
    Configs,
    EntriesCommand,
    Overrides,
    RngSeed,
    Run,
    TrustCode,
    load,
)

if TYPE_CHECKING:
    from klippo.config.load import LoadedConfig
    from klippo.supervised.settings import RewardModelConfig, SFTConfig

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Train again what stands there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command(cls=EntriesCommand)(sft)
    app.command(cls=EntriesCommand)(reward_model)


@ending
def sft(
    run: Run = None,
    overrides: Overrides = None,
    configs: Configs = None,
    config_dir: ConfigDir = None,
    rng_seed: RngSeed = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    trust_remote_code: TrustCode = False,
) -> int:
    """Fine-tune a model on responses."""
    from klippo.supervised.settings import SFTConfig

    loaded: LoadedConfig[SFTConfig] = load(
        run, overrides, configs, config_dir, None, rng_seed, SFTConfig
    )

    from klippo.config.trust import trust_code
    from klippo.supervised.sft import sft

    trust_code(loaded.config, trust_remote_code)
    return sft(loaded, overwrite=overwrite, quiet=quiet)


@ending
def reward_model(
    run: Run = None,
    overrides: Overrides = None,
    configs: Configs = None,
    config_dir: ConfigDir = None,
    rng_seed: RngSeed = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    trust_remote_code: TrustCode = False,
) -> int:
    """Train reward models on preferences.

    One member per seed; those that are there already are kept, and measured again.
    """
    from klippo.supervised.settings import RewardModelConfig

    loaded: LoadedConfig[RewardModelConfig] = load(
        run, overrides, configs, config_dir, None, rng_seed, RewardModelConfig
    )

    from klippo.config.trust import trust_code
    from klippo.supervised.reward_model import reward_model

    trust_code(loaded.config, trust_remote_code)
    return reward_model(loaded, overwrite=overwrite, quiet=quiet)
