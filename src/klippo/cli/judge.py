"""`klippo judge test` and `klippo judge score`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from klippo.cli.ending import ending
from klippo.errors import ConfigError
from klippo.hub import DEMO_PREFIX

if TYPE_CHECKING:
    from klippo.judge.settings import JudgeSettings

judge_app = typer.Typer(
    help="An LLM judge: try it, or score a file with it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Provider = Annotated[
    str | None,
    typer.Option(help="openai, anthropic, gemini, vllm, ollama or local (OpenAI's chat format)."),
]
Model = Annotated[str | None, typer.Option(help="The judge's name, as its server calls it.")]
BaseUrl = Annotated[str | None, typer.Option("--base-url", help="As in http://127.0.0.1:8000/v1.")]
KeyEnv = Annotated[
    str | None,
    typer.Option("--api-key-env", help="Name of the environment variable with the key."),
]
Rubric = Annotated[
    str | None, typer.Option(help="general, sycophancy, pairwise, or a file of your own.")
]
Mode = Annotated[
    Literal["absolute", "difference", "pairwise"] | None,
    typer.Option(help="Alone, minus the reference's score, or compared with it."),
]
ReferenceColumn = Annotated[
    str | None, typer.Option("--reference-column", help="Column with the reference answer.")
]
Rationale = Annotated[
    bool, typer.Option("--rationale", help="Let the judge say why before it scores.")
]


@judge_app.command("test")
@ending
def try_judge(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG]",
            help="A recipe, a run's config, or a YAML file with a reward section.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of a run's.")
    ] = None,
    provider: Provider = None,
    model: Model = None,
    base_url: BaseUrl = None,
    api_key_env: KeyEnv = None,
    rubric: Rubric = None,
    prompt_price: Annotated[
        float | None, typer.Option("--prompt-price", min=0, help="USD per million tokens read.")
    ] = None,
    completion_price: Annotated[
        float | None,
        typer.Option("--completion-price", min=0, help="USD per million tokens written."),
    ] = None,
) -> int:
    """A few real calls: what the judge can do, what it falls for, and what it costs."""
    from klippo.lab.judge_scores import judge_test

    api = {
        "provider": provider,
        "model": model,
        "base_url": base_url,
        "api_key_env": api_key_env,
        "usd_per_million_prompt_tokens": prompt_price,
        "usd_per_million_completion_tokens": completion_price,
    }
    return judge_test(_settings(config, overrides, api, {"rubric": rubric}))


@judge_app.command("score")
@ending
def score(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="JSON, JSONL, CSV or Parquet; or demo:posts.")
    ],
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward", "--config", help="A recipe, a run's config, or a YAML file with a judge."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="A .jsonl or .json file; default: FILE with .judged.jsonl."
        ),
    ] = None,
    prompt_column: Annotated[str, typer.Option("--prompt-column")] = "prompt",
    response_column: Annotated[str, typer.Option("--response-column")] = "response",
    reference_column: ReferenceColumn = None,
    score_column: Annotated[
        str, typer.Option("--score-column", help="Where the reward goes, -1 to 1.")
    ] = "reward",
    mode: Mode = None,
    rubric: Rubric = None,
    rationale: Rationale = False,
    provider: Provider = None,
    model: Model = None,
    base_url: BaseUrl = None,
    api_key_env: KeyEnv = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output of another judge.")
    ] = False,
) -> int:
    """Score the responses in a file.

    Resumes an earlier command with the same --output; nothing is paid twice.
    """
    from klippo.lab.judge_scores import ScoreFile, judge_score

    api = {
        "provider": provider,
        "model": model,
        "base_url": base_url,
        "api_key_env": api_key_env,
    }
    own = {"rubric": rubric, "mode": mode, "reference_column": reference_column}
    settings = _settings(reward, None, api, own | {"rationale": rationale or None})
    return judge_score(
        ScoreFile(
            file=file,
            settings=settings,
            output=output or Path(file.removeprefix(DEMO_PREFIX)).with_suffix(".judged.jsonl"),
            prompt_column=prompt_column,
            response_column=response_column,
            score_column=score_column,
            overwrite=overwrite,
        )
    )


def _settings(
    config: str | None,
    overrides: list[str] | None,
    api: dict[str, Any],
    own: dict[str, Any],
) -> JudgeSettings:
    """A judge from a config, with the options that were given on top; or from options alone."""
    from klippo.lab.judge_scores import find_judge, judge_of

    api = {key: value for key, value in api.items() if value is not None}
    own = {key: value for key, value in own.items() if value is not None}
    if config is None:
        if "model" not in api:
            raise ConfigError(
                "which judge? Name a config, or --provider and --model, as in --provider openai "
                "--model gpt-4o-mini"
            )
        return judge_of(own | {"api": api})
    found = find_judge(config, overrides or ())
    if not api and not own:
        return found
    given = found.model_dump(exclude_unset=True)
    return judge_of(given | own | {"api": given["api"] | api})
