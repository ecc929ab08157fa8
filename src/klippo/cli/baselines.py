"""`klippo baselines`: what one would try instead of offline PPO."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from klippo.cli.ending import ending
from klippo.cli.source import (
    ConfigDir,
    Configs,
    EntriesCommand,
    Overrides,
    RmSeed,
    RngSeed,
    Run,
    TrustCode,
    load,
)

if TYPE_CHECKING:
    from klippo.config.load import LoadedConfig


class Baseline(StrEnum):
    """Names of the baselines."""

    SFT_BEST = "sft-best"
    DPO = "dpo"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=EntriesCommand)(baselines)


@ending
def baselines(
    run: Run = None,
    overrides: Overrides = None,
    configs: Configs = None,
    config_dir: ConfigDir = None,
    rm_seed: RmSeed = None,
    rng_seed: RngSeed = None,
    only: Annotated[Baseline | None, typer.Option(help="Train this one alone.")] = None,
    best_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="sft-best: where each prompt has one response, the share of all that is learnt.",
        ),
    ] = 0.25,
    dpo_beta: Annotated[float, typer.Option(help="dpo: beta, reward per nat of log-ratio.")] = 0.1,
    dpo_pairs: Annotated[
        int, typer.Option(min=1, help="dpo: most pairs of one prompt, the widest apart in reward.")
    ] = 4,
    dpo_min_margin: Annotated[
        float, typer.Option(min=0, help="dpo: least difference of rewards in a pair.")
    ] = 0.0,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default: the run's optimizer.learning_rate.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing folders of baselines.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
    trust_remote_code: TrustCode = False,
) -> int:
    """Train what one would try instead of offline PPO.

    sft-best fine-tunes on the best responses, dpo learns from pairs of a better and a worse one.
    Both start where PPO starts, read the same config and rows, and write run folders beside
    output_dir: {output_dir}-sft-best and {output_dir}-dpo.
    """
    loaded: LoadedConfig = load(run, overrides, configs, config_dir, rm_seed, rng_seed)

    from klippo.config.trust import trust_code
    from klippo.errors import ConfigError
    from klippo.supervised.baselines import baselines

    for option, value in (
        ("--best-share", best_share),
        ("--dpo-beta", dpo_beta),
        ("--learning-rate", learning_rate),
    ):
        if value is not None and not value > 0:
            raise ConfigError(f"{option} {value:g}: must be above 0")
    trust_code(loaded.config, trust_remote_code)
    return baselines(
        loaded,
        only=None if only is None else only.value,
        best_share=best_share,
        dpo_beta=dpo_beta,
        dpo_pairs=dpo_pairs,
        dpo_min_margin=dpo_min_margin,
        learning_rate=learning_rate,
        overwrite=overwrite,
        quiet=quiet,
    )
