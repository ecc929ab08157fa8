"""Where a command's config comes from: RUN, or entries named by --configs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from klippo.errors import ConfigError

if TYPE_CHECKING:
    from klippo.config.load import C, LoadedConfig

Run = Annotated[str | None, typer.Argument(metavar="RUN", help="A YAML file or a recipe's name.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, for instance ppo.num_steps=200."),
]
Configs = Annotated[
    list[str] | None,
    typer.Option(
        "--configs",
        metavar="NAME...",
        help="Instead of RUN: entries (top-level keys) of the YAML files in --config-dir, merged "
        "in this order, as in --configs defaults mine.",
    ),
]
ConfigDir = Annotated[
    str | None,
    typer.Option(
        "--config-dir", "--config_dir", help="Folder of the entries.", show_default="configs"
    ),
]
RmSeed = Annotated[
    int | None,
    typer.Option(
        "--rm_seed", "--rm-seed", help="Sets rm_seed: {seed} in the names of reward models."
    ),
]
RngSeed = Annotated[
    int | None, typer.Option("--rng_seed", "--rng-seed", help="Sets seed, that of the run.")
]

TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the models for which the config has "
        "trust_remote_code: true; without both, none runs.",
    ),
]


class EntriesCommand(TyperCommand):
    """A command whose --configs takes every name up to the next option; KEY=VALUE stays one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread_names(args))


def spread_names(arguments: list[str]) -> list[str]:
    """`--configs A B C` as click reads it: `--configs= --configs=A --configs=B --configs=C`."""
    spread: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("-"):
            inside = argument.partition("=")[0] == "--configs"
        is_name = inside and "=" not in argument
        spread.append(f"--configs={argument.removeprefix('--configs')}" if is_name else argument)
    return spread


def load(
    run: str | None,
    overrides: list[str] | None,
    configs: list[str] | None,
    config_dir: str | None,
    rm_seed: int | None,
    rng_seed: int | None,
    schema: type[C] | None = None,
) -> LoadedConfig[C]:
    """The config that the command line asks for; of a run of PPO, unless a schema is named."""
    from klippo.config.entries import FOLDER, load_entries
    from klippo.config.load import load_config
    from klippo.config.merge import seed_overrides
    from klippo.config.schema import RunConfig

    chosen: Any = schema or RunConfig
    words = [*([] if run is None else [run]), *(overrides or [])]
    if configs:
        stray = [word for word in words if "=" not in word]
        if stray:
            raise ConfigError(
                f"{stray[0]}: both RUN and --configs {' '.join(configs).strip()} are given; remove "
                "one (names of entries stand together behind --configs)"
            )
        folder = FOLDER if config_dir is None else config_dir
        return load_entries(
            configs, folder, words, schema=chosen, rm_seed=rm_seed, rng_seed=rng_seed
        )
    if config_dir is not None:
        raise ConfigError(f"--config-dir {config_dir}: needs --configs NAME...")
    if run is None:
        raise ConfigError(
            "RUN is missing: name a YAML file or a recipe, or entries with --configs NAME..."
        )
    more = seed_overrides(rm_seed, rng_seed)
    return load_config(run, [*(overrides or []), *more], schema=chosen)
