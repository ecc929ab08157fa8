"""`klippo config`: what a run would use, whether it is right, and what it may contain."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from klippo.cli.ending import ending, plain
from klippo.cli.source import EntriesCommand, Load, with_config

if TYPE_CHECKING:
    from klippo.config.schema import WholeConfig

config_app = typer.Typer(
    help="Show, check and describe configs.", no_args_is_help=True, rich_markup_mode=None
)

Stage = Annotated[
    Literal["train", "sft", "reward-model"],
    typer.Option("--stage", help="The command whose config it is."),
]


def show(
    load: Load,
    stage: Stage = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Every value as YAML that can be used as a config; comments say where each was set."""
    from klippo.config.load import show, to_yaml

    loaded = load(_schema(stage))
    if as_json:
        rows = show(loaded)
        entries = {key: {"value": value, "origin": origin} for key, value, origin in rows}
        typer.echo(json.dumps(entries, indent=2, ensure_ascii=False))
    else:
        typer.echo(plain(to_yaml(loaded.config, loaded.origins)), nl=False)


def check(load: Load, stage: Stage = "train") -> None:
    """Say ok, or everything that is wrong."""
    typer.echo(plain(f"{load(_schema(stage)).name}: ok"))


@config_app.command()
@ending
def schema(stage: Stage = "train") -> None:
    """The JSON schema of a config, for editors."""
    typer.echo(json.dumps(_schema(stage).model_json_schema(), indent=2, ensure_ascii=False))


for command in (show, check):
    config_app.command(cls=EntriesCommand)(with_config(command))


def _schema(stage: str) -> type[WholeConfig]:
    from klippo.config.schema import RunConfig
    from klippo.supervised.settings import RewardModelConfig, SFTConfig

    schemas: dict[str, type[WholeConfig]] = {
        "train": RunConfig,
        "sft": SFTConfig,
        "reward-model": RewardModelConfig,
    }
    return schemas[stage]
