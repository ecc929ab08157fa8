"""Models side by side, and a model and its adapter as one: `klippo compare`, `klippo merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from klippo.cli.ending import ending


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("compare")(compare)
    app.command("merge")(merge)


@ending
def compare(
    before: Annotated[
        str,
        typer.Argument(
            help="A run folder, a model or adapter (folder or name), BASE+ADAPTER, or `start`: "
            "what the runs trained from."
        ),
    ],
    afters: Annotated[
        list[str],
        typer.Argument(
            metavar="AFTER [AFTER …]", help="The same, after training; as NAME=RUN to name it."
        ),
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file or data set, or a run's config.yaml for its held-out prompts; default: "
            "those of the first run."
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]REWARD",
            help="What measures the answers: a model, file.py:function, or a YAML file with a "
            "reward section; may be given several times. A judge with mode: pairwise compares "
            "the models directly. Default: the first run's gold reward, or else its reward.",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Also a table for each value of this data column."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 64,
    output: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write all figures and answers to this JSON file."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest response; default: the first run's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 64,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Storage of all models' weights.")
    ] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts and the sampling.")] = 0,
) -> int:
    """Put the same prompts through one model and others.

    Did the weights and the responses change, and are the responses better? Every difference is
    paired, with a 95% interval; all models draw the same random numbers.
    """
    from klippo.lab.compare import compare

    return compare(
        before,
        afters,
        prompts=prompts,
        rewards=reward or (),
        by=by,
        num_prompts=num_prompts,
        output=output,
        max_tokens=max_tokens,
        batch_size=batch_size,
        dtype=dtype,
        seed=seed,
    )


@ending
def merge(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_ADAPTER", help="A run with LoRA, an adapter, or BASE+ADAPTER."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="A new folder for the whole model.")],
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Storage of the weights.")
    ] = "float32",
) -> int:
    """Write a base and its LoRA adapter as one plain model, for programs that know no adapters."""
    from klippo.lab.merge import merge

    return merge(source, output, dtype=dtype)
