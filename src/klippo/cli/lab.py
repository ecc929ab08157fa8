"""Commands that look at runs and models: gold-eval, best-of-n, report, generate, compare, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from klippo.errors import ConfigError

Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Storage of the weights.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest response in tokens; default: the run's.")
]
NumPrompts = Annotated[int, typer.Option(min=1, help="How many prompts.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]


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
        typer.Option("--best-of-n", help="A best_of_n.json; default: the run's."),
    ] = None,
) -> int:
    """Write the report of a run, or of several side by side, as one HTML file."""
    from klippo.report.write import report

    return report(runs, output=output, best_of_n=best_of_n)


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
            help="A reward that picks the best: a model, file.py:function, or a YAML file with "
            "reward sections; may be given several times."
        ),
    ] = None,
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OBJECTIVE[:WEIGHT]",
            help="These rewards combined: mean, WCO, UWO:0.5, soft_min, median, mean_minus_sd:1; "
            "may be given several times.",
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
    num_prompts: NumPrompts = 64,
    num_samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 64,
    response_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a response; default: the run's.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses sampled at once.")] = 64,
    seed: Seed = 0,
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

    Resumes an earlier command with the same --output; nothing is done twice.
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
    num_prompts: NumPrompts = 64,
    output: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write all figures and answers to this JSON file."),
    ] = None,
    max_tokens: MaxTokens = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 64,
    dtype: Dtype = "float32",
    seed: Seed = 0,
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


def merge(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_ADAPTER", help="A run with LoRA, an adapter, or BASE+ADAPTER."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="A new folder for the merged model.")],
    dtype: Dtype = "float32",
) -> int:
    """Write a base and its LoRA adapter as one plain model, for programs that know no adapters."""
    from klippo.lab.merge import merge

    return merge(source, output, dtype=dtype)
