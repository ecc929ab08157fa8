"""Rewards by the names that a command line gives them, and what can be checked without weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from klippo import hub
from klippo.config.load import config_error, load_config, read_text
from klippo.config.located import Located, read_yaml
from klippo.config.problems import describe
from klippo.errors import ConfigError, PreflightError
from klippo.judge.judging import judge_label
from klippo.judge.rubric import check_settings
from klippo.judge.security import read_key
from klippo.judge.settings import JudgeSettings
from klippo.rewards import stored
from klippo.rewards.classifier import find_label
from klippo.rewards.function import FunctionReward, load_function
from klippo.rewards.reading import Reader
from klippo.rewards.settings import (
    ClassifierSettings,
    EnsembleSettings,
    FunctionSettings,
    RewardSettings,
    SumSettings,
    leaves,
)
from klippo.settings import Settings

_YAML = re.compile(r"(.+\.ya?ml)(?::([^:/]+))?")
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
NO_MATTER = {"kind", "model", "batch_size", "trust_remote_code"}
"""What does not change a classifier's scores, or stands in its name already."""


class _Sections(Settings):
    rewards: dict[str, RewardSettings]


def reward_named(
    name: str, *, is_alpacafarm: bool = False, batch_size: int | None = None
) -> RewardSettings:
    """The settings of a reward by name.

    `name` is a model (folder, hub or demo: name), a function (`file.py:function` or
    `module:function`), or a YAML file with a reward section (`gold.yaml`); `FILE.yaml:KEY` is the
    section under a key, also in a run's config.yaml. `batch_size` and AlpacaFarm's template replace
    what the section says. Raises ConfigError for a name that can be none of these.
    """
    file = _YAML.fullmatch(name)
    is_folder = Path(name).is_dir()
    settings: RewardSettings
    if file is not None and not is_folder:
        settings = _section(Path(file[1]), file[2])
    elif ":" in name and not name.startswith(hub.DEMO_PREFIX) and not is_folder:
        settings = FunctionSettings(kind="function", function=name)
    else:
        settings = ClassifierSettings(kind="classifier", model=name)
    if batch_size is not None and isinstance(settings, ClassifierSettings | EnsembleSettings):
        settings = settings.model_copy(update={"batch_size": batch_size})
    if is_alpacafarm:
        if not isinstance(settings, ClassifierSettings):
            raise ConfigError(
                f"{name}: AlpacaFarm's template (--is-alpacafarm-rm) is for one reward model, and "
                f"this is a reward of kind {settings.kind}; leave the option out"
            )
        settings = settings.model_copy(update={"template": "alpaca"})
    return settings


def rewards_in(path: Path) -> dict[str, RewardSettings]:
    """The reward sections of a YAML file by name; a file that is one section is named after itself.

    Of a run's config these are `reward` and `gold`. Raises ConfigError with every problem's line.
    """
    tree, problems = read_yaml(read_text(path), lambda line: f"{path}:{line}")
    if problems:
        raise config_error(problems)
    if not isinstance(tree.value, dict) or not tree.value:
        raise ConfigError(f"{path}: holds no reward section; write kind: classifier and model: …")
    if "policy" in tree.value:
        config = load_config(path).config
        return {"reward": config.reward} | ({} if config.gold is None else {"gold": config.gold})
    if "kind" in tree.value:
        tree = Located({path.stem: tree}, tree.origin)
    sections = Located({"rewards": tree}, tree.origin)
    try:
        return _Sections.model_validate(sections.plain()).rewards
    except ValidationError as error:
        raise config_error(describe(error, sections, _Sections)) from None


def _section(path: Path, key: str | None) -> RewardSettings:
    sections = rewards_in(path)
    names = ", ".join(sections)
    if key is None and len(sections) > 1:
        raise ConfigError(f"{path}: holds several rewards ({names}); say which, as in {path}:NAME")
    if key is not None and key not in sections:
        raise ConfigError(f"{path}:{key}: there is no reward section {key!r}; there are {names}")
    return sections[next(iter(sections)) if key is None else key]


def reward_label(settings: RewardSettings) -> str:
    """A short name for people; equal exactly for settings that give equal scores."""
    if isinstance(settings, FunctionSettings):
        return settings.function
    if isinstance(settings, JudgeSettings):
        return judge_label(settings)
    if isinstance(settings, ClassifierSettings):
        given = settings.model_dump(exclude_defaults=True, exclude=NO_MATTER)
        options = ", ".join(f"{key}: {value}" for key, value in given.items())
        return settings.model + (f" ({options})" if options else "")
    name: str = settings.kind
    if isinstance(settings, EnsembleSettings):
        name = f"{settings.objective} of {', '.join(m.model for m in settings.classifiers())}"
    if isinstance(settings, SumSettings):
        name = f"sum of {', '.join(settings.parts)}"
    return f"{name} #{digest_of(settings)}"


def digest_of(settings: RewardSettings) -> str:
    """Eight hex digits of everything in the settings but batch sizes."""
    text = json.dumps(settings.model_dump(mode="json"), sort_keys=True)
    text = re.sub(r'"batch_size": \d+, ', "", text)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def classifiers_in(settings: RewardSettings) -> Iterator[ClassifierSettings]:
    """Every model that a reward reads."""
    for one in leaves(settings):
        if isinstance(one, EnsembleSettings):
            yield from one.classifiers()
        elif isinstance(one, ClassifierSettings):
            yield one


def judges_in(settings: RewardSettings) -> list[JudgeSettings]:
    """Every judge that a reward asks."""
    return [one for one in leaves(settings) if isinstance(one, JudgeSettings)]


def check_reward(settings: RewardSettings, columns: Iterable[str] | None = None) -> None:
    """Whatever can go wrong with a reward, as far as that shows without loading any weights.

    `columns` are the data's, if they are known. Raises ConfigError or PreflightError.
    """
    _check_scale(settings)
    for one in leaves(settings):
        if isinstance(one, FunctionSettings):
            source = FunctionReward(load_function(one.function), one.function)
            if columns is not None:
                source.check_columns(columns)
        elif isinstance(one, JudgeSettings):
            check_settings(one, columns)
            read_key(one.api.key_variable)
    for model in classifiers_in(settings):
        _check_model(model)
    if not isinstance(settings, EnsembleSettings) or settings.moments is not None:
        return
    if settings.standardize == "start":
        raise ConfigError(
            "standardize=start: members are measured only when a run begins, for its training "
            "reward; use stored or none, or write down moments"
        )
    for member in settings.classifiers() if settings.standardize == "stored" else ():
        stored.moments_of(member)


def _check_scale(settings: RewardSettings) -> None:
    for name, part in settings.parts.items() if isinstance(settings, SumSettings) else ():
        if part.normalize:
            raise ConfigError(
                f"part {name}: normalize=true moves the scale from batch to batch, and scores that "
                "are compared need one scale; set normalize: false"
            )
        _check_scale(part.reward)


def _check_model(settings: ClassifierSettings) -> None:
    """Config, weights' files, tokenizer, label and template of a reward model."""
    from transformers import AutoConfig

    from klippo.rewards import published

    name, revision = settings.model, settings.revision
    content = hub.load_config(name, revision)
    kind = published.KINDS.get(str(content.get("model_type")))
    architectures = [str(one) for one in content.get("architectures") or []]
    wrong = [one for one in architectures if one.endswith(_LANGUAGE_MODELS)]
    if kind is None and wrong and wrong == architectures:
        raise PreflightError(
            f"{name}: is a language model without a score head ({wrong[0]}), so it scores nothing; "
            "give a reward model or classifier (…ForSequenceClassification)"
        )
    folder = Path(hub.resolve(name))
    if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise PreflightError(f"{name}: the folder has no weights (*.safetensors); copy them there")
    if kind is None:
        try:
            config = AutoConfig.from_pretrained(
                hub.resolve(name), revision=revision, **hub.code_option(name)
            )
        except hub.LOADING_ERRORS as error:
            raise hub.not_loaded(name, error) from error
        find_label(settings.label, config, name)
    Reader(
        name,
        hub.load_tokenizer(name, revision),
        template=stored.template_of(settings, None if kind is None else kind.template),
        response_only=settings.reads == "response",
    )
