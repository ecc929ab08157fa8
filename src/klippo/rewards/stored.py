"""What a reward model's folder says about it beside its weights: `klippo_reward.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from klippo.errors import ConfigError, PreflightError
from klippo.hub import find_file
from klippo.rewards.settings import ClassifierSettings

STORED_FILE = "klippo_reward.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredReward:
    """How a reward model was trained to read, and the scale of its scores."""

    template: str | None = None
    """The text that it was trained on, as in the setting `template`."""
    mean: float | None = None
    """Mean score of the reference responses; None if not measured."""
    sd: float | None = None
    """Standard deviation of these scores."""
    num_samples: int | None = None
    """How many reference responses."""
    policy: str | None = None
    """Which policy they came from."""
    seed: int | None = None
    """Seed of the training: head, order of the data, bagging."""


def read(name: str, revision: str | None = None) -> StoredReward | None:
    """What is stored with a model (folder or hub name), None if nothing is.

    Raises PreflightError when the file is there and cannot be understood.
    """
    path = find_file(name, STORED_FILE, revision)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(StoredReward)}
        stored = StoredReward(**{key: content[key] for key in known & content.keys()})
        if stored.sd is not None and not stored.sd > 0:
            raise ValueError(f"sd={stored.sd} must be above 0")
    except (ValueError, TypeError, AttributeError) as error:
        raise PreflightError(
            f"{name}: {STORED_FILE} cannot be read ({error}); train the model again with "
            "klippo reward-model, or remove the file"
        ) from error
    return stored


def template_of(settings: ClassifierSettings, of_class: str | None) -> str:
    """The text given to a model: as set, as stored with it, or as belongs to its class."""
    known = read(settings.model, settings.revision) or StoredReward()
    return settings.template or known.template or of_class or "{prompt}{response}"


def moments_of(settings: ClassifierSettings) -> tuple[float, float]:
    """A member's stored mean and standard deviation. Raises ConfigError without them."""
    known = read(settings.model, settings.revision) or StoredReward()
    if known.mean is None or known.sd is None:
        raise ConfigError(
            f"ensemble member {settings.model} has no stored mean and standard deviation, and "
            "members on different scales cannot be compared; train it with klippo reward-model "
            "and `reference`, set standardize: start to measure them when a run begins, or "
            "standardize: none"
        )
    return known.mean, known.sd


def write(folder: Path, stored: StoredReward) -> None:
    """Put the file beside the weights."""
    text = json.dumps(asdict(stored), indent=2) + "\n"
    (folder / STORED_FILE).write_text(text, encoding="utf-8")
