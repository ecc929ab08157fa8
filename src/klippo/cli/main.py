"""The command line: one thin command per stage, each importing its stage when called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klippo.cli.baselines import register as register_baselines
from klippo.cli.comparing import register as register_comparing
from klippo.cli.config import config_app
from klippo.cli.ending import EXIT_CODES, ending
from klippo.cli.judge import register as register_judge
from klippo.cli.laboratory import register as register_laboratory
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
from klippo.cli.supervised import register as register_supervised

if TYPE_CHECKING:
    from klippo.config.load import LoadedConfig

# Read when PyTorch starts its threads: idle ones sleep instead of spinning. On cores that another
# process uses too this makes a run several times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="PPO for language models from any reward.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(config_app, name="config")

MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest response; default: the run's.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]


@app.callback(invoke_without_command=True)
def klippo(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"klippo {version_of('klippo')}")
        raise typer.Exit


@app.command(cls=EntriesCommand)
@ending
def train(
    run: Run = None,
    overrides: Overrides = None,
    configs: Configs = None,
    config_dir: ConfigDir = None,
    rm_seed: RmSeed = None,
    rng_seed: RngSeed = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing run folder.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with an unfinished run, with safe changes of its config (without changes "
            "it goes on by itself).",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
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
    loaded: LoadedConfig = load(run, overrides, configs, config_dir, rm_seed, rng_seed)

    if dry_run:
        from klippo.train.dry_run import dry_run as tell_plan

        return tell_plan(loaded.config, trust_remote_code=trust_remote_code)

    from klippo.train.run import train

    return train(
        loaded,
        overwrite=overwrite,
        resume=resume,
        quiet=quiet,
        yes=yes,
        trust_remote_code=trust_remote_code,
    )


register_supervised(app)
register_baselines(app)
register_laboratory(app)
register_judge(app)


@app.command()
@ending
def generate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="A run folder, a model or adapter (folder or name), or BASE+ADAPTER.",
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be given several times.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="One prompt per line.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Responses per prompt.")] = 1,
    max_tokens: MaxTokens = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="Divides the logits; 0 is greedy.")
    ] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest; 0 is off.")] = 0,
    seed: Seed = 0,
) -> int:
    """Sample responses to prompts.

    Without --prompt and --file, prompts are read from standard input, or asked for.
    """
    from klippo.lab.generate import generate

    return generate(
        source,
        prompt or None,
        file,
        num_samples=num_samples,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )


register_comparing(app)


@app.command()
@ending
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Versions, devices, storage, and which keys are set."""
    from klippo.cli.doctor import doctor

    return doctor(as_json=as_json)


def main() -> None:
    """The `klippo` command."""
    app(prog_name="klippo")
