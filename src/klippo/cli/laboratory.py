"""What to learn from runs and models: `klippo gold-eval`, `best-of-n` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from klippo.cli.ending import ending
from klippo.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("gold-eval")(gold_eval)
    app.command("best-of-n")(best_of_n)
    app.command("report")(report)


@ending
def gold_eval(
    eval_dir: Annotated[
        Path, typer.Argument(metavar="EVAL_DIR", help="A run's folder, or its eval/.")
    ],
    gold_model: Annotated[
        str,
        typer.Argument(
            metavar="GOLD_MODEL",
            help="A model (folder, hub or demo: name), file.py:function, a YAML file with a "
            "reward section, or FILE.yaml:SECTION.",
        ),
    ],
    is_alpacafarm_rm: Annotated[
        bool, typer.Option("--is-alpacafarm-rm", help="It reads AlpacaFarm's template.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 32,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the scores of another gold model.")
    ] = False,
) -> int:
    """Add gold scores to the samples that a run has recorded."""
    from klippo.lab.gold_eval import gold_eval

    return gold_eval(
        eval_dir,
        gold_model,
        is_alpacafarm=is_alpacafarm_rm,
        batch_size=batch_size,
        overwrite=overwrite,
    )


@ending
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN …]", help="Run folders.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="The HTML file; default: RUN/report.html, of several ./report.html."
        ),
    ] = None,
    best_of_n: Annotated[
        Path | None,
        typer.Option("--best-of-n", help="What klippo best-of-n found; default: the run's own."),
    ] = None,
) -> int:
    """Write what became of a run, or of several, as one HTML file."""
    from klippo.report.write import report

    return report(runs, output=output, best_of_n=best_of_n)


@ending
def best_of_n(
    policy: Annotated[
        str | None,
        typer.Argument(metavar="POLICY", help="A run folder, a model folder or name."),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Instead of POLICY: JSON lines with a prompt and response or answers."),
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            help="What picks the best: a model, file.py:function, or a YAML file with reward "
            "sections; may be given several times."
        ),
    ] = None,
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OBJECTIVE[:WEIGHT]",
            help="The proxies combined: mean, WCO, UWO:0.5, soft_min, median, mean_minus_sd:1; may "
            "be given several times.",
        ),
    ] = None,
    gold: Annotated[str | None, typer.Option(help="What the picked samples are worth.")] = None,
    n: Annotated[
        str | None, typer.Option("--n", help="As in 1,2,4,8; default: powers of two.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of samples, scores and results.")] = Path(
        "runs/best-of-n"
    ),
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", "--data", help="File or data set; default: the run's own."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 64,
    num_samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 64,
    response_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a response; default: the run's.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses sampled at once.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    standardize: Annotated[
        Literal["start", "stored", "none"],
        typer.Option(
            help="The one scale of an ensemble's members: measured on these samples, "
            "stored with the models, or none."
        ),
    ] = "start",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove samples of another request.")
    ] = False,
) -> int:
    """How gold moves as the best is picked from more samples.

    Goes on where an earlier command with the same --output ended; nothing is done twice.
    """
    from klippo.lab.best_of_n import BestOfN

    return BestOfN(
        policy=policy,
        samples=samples,
        proxies=proxy or (),
        ensembles=ensemble or (),
        gold=gold,
        ns=_numbers(n),
        output=output,
        prompts=prompts,
        num_prompts=num_prompts,
        num_samples=num_samples,
        response_length=response_length,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
        standardize=standardize,
        overwrite=overwrite,
    ).run()


def _numbers(text: str | None) -> list[int]:
    try:
        return [] if text is None else [int(word) for word in text.replace("_", "").split(",")]
    except ValueError:
        raise ConfigError(f"n={text}: write whole numbers with commas, as in 1,2,4,8") from None
