"""Commands that train: `klippo train`, `sft`, `reward-model` and `baselines`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from klippo.cli.source import Load, Quiet, TrustCode

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Train again what exists already.")]


class Baseline(StrEnum):
    """Names of the baselines."""

    SFT_BEST = "sft-best"
    DPO = "dpo"


def train(
    load: Load,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing run folder.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume an unfinished run with safe changes of its config (without changes it "
            "resumes by itself).",
        ),
    ] = False,
    quiet: Quiet = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what the run would do, cost and take; train nothing."),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask before judges that may cost much.")
    ] = False,
    trust_remote_code: TrustCode = False,
) -> int:
    """Train a policy with PPO."""
    from klippo.config.schema import RunConfig

    loaded = load(RunConfig)
    if dry_run:
        from klippo.train.dry_run import dry_run as show_plan

        return show_plan(loaded.config, trust_remote_code=trust_remote_code)

    from klippo.train.run import train

    return train(
        loaded,
        overwrite=overwrite,
        resume=resume,
        quiet=quiet,
        yes=yes,
        trust_remote_code=trust_remote_code,
    )


def sft(
    load: Load,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    trust_remote_code: TrustCode = False,
) -> int:
    """Fine-tune a model on responses."""
    from klippo.config.trust import trust_code
    from klippo.supervised.settings import SFTConfig

    loaded = load(SFTConfig)
    trust_code(loaded.config, trust_remote_code)

    from klippo.supervised.sft import sft

    return sft(loaded, overwrite=overwrite, quiet=quiet)


def reward_model(
    load: Load,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    trust_remote_code: TrustCode = False,
) -> int:
    """Train reward models on preferences.

    One member per seed; those that exist already are kept, and measured again.
    """
    from klippo.config.trust import trust_code
    from klippo.supervised.settings import RewardModelConfig

    loaded = load(RewardModelConfig)
    trust_code(loaded.config, trust_remote_code)

    from klippo.supervised.reward_model import reward_model

    return reward_model(loaded, overwrite=overwrite, quiet=quiet)


def baselines(
    load: Load,
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
    quiet: Quiet = False,
    trust_remote_code: TrustCode = False,
) -> int:
    """Train what one would try instead of offline PPO.

    sft-best fine-tunes on the best responses, dpo learns from pairs of a better and a worse one.
    Both start where PPO starts, read the same config and rows, and write run folders beside
    output_dir: {output_dir}-sft-best and {output_dir}-dpo.
    """
    from klippo.config.schema import RunConfig
    from klippo.config.trust import trust_code
    from klippo.errors import ConfigError

    loaded = load(RunConfig)

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
