"""The stage behind `klippo best-of-n`: how gold moves as more samples are picked from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from klippo.errors import ConfigError
from klippo.evaluation.arms import ArmCurves, curves, fit_figures, fit_gold, points
from klippo.evaluation.best_of_n import default_ns, kl_of_best_of
from klippo.evaluation.history import Floats
from klippo.evaluation.scaling import Fit
from klippo.lab import fingerprints
from klippo.lab.best_of_n_plan import Plan, Standardize, plan_of, with_scale
from klippo.lab.held_out import held_out_prompts, own_prompts
from klippo.lab.reward_names import check_reward, reward_label
from klippo.lab.sample_files import (
    PROMPTS_FILE,
    SAMPLES_FILE,
    DrawnSamples,
    FileSamples,
    Samples,
)
from klippo.lab.sample_scores import SCORES_DIR, score_samples
from klippo.ranks import choose_device
from klippo.report.best_of_n import draw_best_of_n
from klippo.rollouts.hf import HFEngine
from klippo.rollouts.sampling import Sampling
from klippo.runs.folder import write_text, writing
from klippo.runs.models import OpenModel, open_model
from klippo.types import Prompt

REQUEST_FILE = "sampling.json"
RESULT_FILE = "best_of_n.json"
FIGURE = "best_of_n"


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """What is asked for."""

    policy: str | None = None
    samples: Path | None = None
    """Instead of a policy: a file of samples."""
    proxies: Sequence[str] = ()
    ensembles: Sequence[str] = ()
    gold: str | None = None
    ns: Sequence[int] = ()
    """Empty: 1, 2, 4, … up to the number of samples."""
    output: Path = Path("runs/best-of-n")
    prompts: str | None = None
    num_prompts: int = 64
    num_samples: int = 64
    response_length: int | None = None
    temperature: float = 1.0
    batch_size: int = 64
    seed: int = 0
    standardize: Standardize = "start"
    overwrite: bool = False


def best_of_n(asked: BestOfN) -> int:
    """Sample or read, score, combine; write best_of_n.json and the figures."""
    console = Console()
    if (asked.policy is None) == (asked.samples is None):
        raise ConfigError("give either POLICY to sample from, or --samples FILE with samples")
    if asked.temperature <= 0:
        raise ConfigError(
            f"temperature={asked.temperature} draws the same response every time; use 1"
        )
    plan = plan_of(asked.proxies, asked.ensembles, asked.gold, asked.standardize)
    for settings in plan.rewards.values():
        check_reward(settings)
    if asked.policy is not None:
        _check_ns(asked.ns, asked.num_samples)
    samples = _samples(asked, console)
    groups = _groups(samples)
    num_samples = min(len(group) for group in groups)
    _check_ns(asked.ns, num_samples)
    scores = score_samples(
        samples, plan.rewards, asked.output / SCORES_DIR, console, device=choose_device("auto")
    )
    gold = None if plan.gold is None else scores[plan.gold]
    if gold is None and samples.gold is not None:
        console.print("Gold scores are those in the file.")
        gold = samples.gold
    ns = sorted(set(asked.ns)) or default_ns(num_samples)
    _write(asked, plan, scores, gold, groups, ns, console)
    return 0


def _samples(asked: BestOfN, console: Console) -> Samples:
    """What there is of the samples, and what is missing; the folder begins when all is checked."""
    request = _request(asked)
    goes_on = _goes_on(asked.output, request, overwrite=asked.overwrite)
    if asked.samples is not None:
        samples = FileSamples(asked.samples)
        if not goes_on:
            _begin(asked.output, request)
        num = len(samples.prompt_of_sample)
        console.print(f"{num:,} samples of {len(samples.prompts):,} prompts")
        return samples
    assert asked.policy is not None
    opened = None
    if not goes_on:
        opened = open_model(asked.policy, choose_device("auto"))
        prompts = _prompts(asked, opened)
        _begin(asked.output, request)
        DrawnSamples.store_prompts(asked.output, prompts)
    drawn = DrawnSamples(asked.output, asked.num_samples)
    if drawn.num_there >= drawn.num:
        console.print("Every sample is there already.")
        return drawn
    opened = opened or open_model(asked.policy, choose_device("auto"))
    sampling = Sampling(temperature=asked.temperature)
    drawn.draw(
        HFEngine(opened.model, stop_ids=opened.stop_ids, sampling=sampling),
        opened.tokenizer,
        response_length=asked.response_length or opened.max_tokens,
        temperature=asked.temperature,
        seed=asked.seed,
        batch_size=asked.batch_size,
        device=opened.device,
        console=console,
    )
    return drawn


def _prompts(asked: BestOfN, opened: OpenModel) -> list[Prompt]:
    data = opened.data if asked.prompts is None else own_prompts(opened.data, asked.prompts)
    if data.train == "prompts":
        raise ConfigError(f"{opened.name} is no run folder; say which prompts: --prompts FILE")
    length = asked.response_length or opened.max_tokens
    return held_out_prompts(opened, data, opened.data_seed, asked.num_prompts, length, asked.seed)


def _request(asked: BestOfN) -> dict[str, Any]:
    """What decides the samples; all but their number, which can grow."""
    if asked.samples is not None:
        if not asked.samples.is_file():
            raise ConfigError(f"{asked.samples}: there is no such file; check the path")
        digest = fingerprints.of_files([asked.samples])
        return {"samples": str(asked.samples), "content": digest}
    assert asked.policy is not None
    prompts = None if asked.prompts is None else Path(asked.prompts)
    return {
        "policy": asked.policy,
        "weights": fingerprints.of_model(asked.policy),
        "prompts": asked.prompts,
        "content": fingerprints.of_files([prompts]) if prompts and prompts.is_file() else None,
        "num_prompts": asked.num_prompts,
        "response_length": asked.response_length,
        "temperature": asked.temperature,
        "seed": asked.seed,
    }


def _goes_on(folder: Path, request: dict[str, Any], *, overwrite: bool) -> bool:
    """True where the folder holds samples of the same request.

    Raises ConfigError where it holds those of another, unless `overwrite`, or something else.
    """
    file = folder / REQUEST_FILE
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"output={folder} exists and holds no samples of Klippo ({REQUEST_FILE}); choose "
                "another --output"
            )
        return False
    known = json.loads(file.read_text(encoding="utf-8"))
    changed = [
        f"{key} is {known.get(key)} there and {request.get(key)} here"
        for key in dict.fromkeys([*known, *request])
        if known.get(key) != request.get(key)
    ]
    if changed and not overwrite:
        raise ConfigError(
            f"output={folder} holds samples of another request: {'; '.join(changed)}. Choose "
            "another --output, or add --overwrite to remove them"
        )
    has_prompts = "policy" not in request or (folder / PROMPTS_FILE).is_file()
    return not overwrite and has_prompts


def _begin(folder: Path, request: dict[str, Any]) -> None:
    """An empty folder for this request."""
    with writing(folder):
        shutil.rmtree(folder / SCORES_DIR, ignore_errors=True)
        for name in (SAMPLES_FILE, PROMPTS_FILE, REQUEST_FILE, RESULT_FILE):
            (folder / name).unlink(missing_ok=True)
    write_text(folder / REQUEST_FILE, json.dumps(request, indent=1) + "\n")


def _check_ns(ns: Sequence[int], num_samples: int) -> None:
    if any(n < 1 for n in ns):
        raise ConfigError(f"n={min(ns)}: the best of n needs n >= 1")
    if ns and max(ns) > num_samples:
        raise ConfigError(
            f"n={max(ns)} is more than the {num_samples} samples per prompt; leave it out, or take "
            f"more samples (--num-samples {max(ns)})"
        )


def _groups(samples: Samples) -> list[np.ndarray]:
    """The sample numbers of every prompt."""
    order = np.argsort(samples.prompt_of_sample, kind="stable")
    counts = np.bincount(samples.prompt_of_sample, minlength=len(samples.prompts))
    return np.split(order, np.cumsum(counts)[:-1])


def _write(
    asked: BestOfN,
    plan: Plan,
    scores: dict[str, Floats],
    gold: Floats | None,
    groups: Sequence[np.ndarray],
    ns: Sequence[int],
    console: Console,
) -> None:
    fitted_ns = sorted({1, *ns})
    shown = [fitted_ns.index(n) for n in ns]
    arms: dict[str, dict[str, Any]] = {}
    fits: dict[str, Fit] = {}
    unscored: dict[str, int] = {}
    for arm in plan.arms:
        scaled = with_scale(arm, plan, scores)
        found = curves(scaled.score(scores), gold, groups, fitted_ns)
        arms[arm.name] = _arm_figures(found, shown)
        if found.num_unscored:
            unscored[arm.name] = found.num_unscored
        law = None if found.gold is None else fit_gold(found.gold, fitted_ns)
        if law is not None:
            fits[arm.name] = law
    result = {
        "policy": asked.policy or str(asked.samples),
        "num_prompts": len(groups),
        "num_samples": min(len(group) for group in groups),
        "gold": None if plan.gold is None else reward_label(plan.rewards[plan.gold]),
        "ns": list(ns),
        "kl_bound": [kl_of_best_of(n) for n in ns],
        "arms": arms,
        "fits": {name: fit_figures(law) for name, law in fits.items()},
        "unscored": unscored,
    }
    write_text(asked.output / RESULT_FILE, json.dumps(result, indent=1) + "\n")
    draw_best_of_n(result, fits, asked.output / FIGURE)
    _tell(result, console)
    console.print(f"Results: {asked.output / RESULT_FILE}", soft_wrap=True)


def _arm_figures(found: ArmCurves, shown: Sequence[int]) -> dict[str, Any]:
    figures: dict[str, Any] = {"proxy": points(found.proxy[:, shown])}
    if found.gold is not None:
        figures["gold"] = points(found.gold[:, shown])
    return figures


def _tell(result: dict[str, Any], console: Console) -> None:
    title = f"Best of n, {result['num_prompts']} prompts, {result['num_samples']} samples of each"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("picked by")
    for name in ("n", "KL ≤", "proxy (95%)", "gold (95%)"):
        table.add_column(name, justify="right")
    for name, arm in result["arms"].items():
        for i, n in enumerate(result["ns"]):
            cells = [_cell(arm[key][i]) if key in arm else "" for key in ("proxy", "gold")]
            table.add_row(
                Text(name if i == 0 else ""), str(n), f"{result['kl_bound'][i]:.2f}", *cells
            )
    console.print(table)
    for name, number in result["unscored"].items():
        console.print(Text(f"{name}: {number} samples without a score are left out."))


def _cell(point: dict[str, float | None]) -> str:
    if point["mean"] is None:
        return "unscored"
    if point["low"] is None:
        return f"{point['mean']:+.2f}"
    return f"{point['mean']:+.2f} ({point['low']:+.2f} to {point['high']:+.2f})"
