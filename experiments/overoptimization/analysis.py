"""From run folders to figures with intervals: nothing here knows what should come out."""

import copy
import json
import platform
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from klippo.evaluation.history import History, history
from klippo.evaluation.samples import SampleRow
from klippo.evaluation.scaling import Curve, fit
from klippo.evaluation.statistics import Estimate, estimate
from klippo.evaluation.verdict import judge
from klippo.report.reading import STARTED_FILE
from klippo.rewards.ensemble import EnsembleReward
from klippo.rewards.settings import EnsembleSettings
from klippo.runs.folder import STATUS_FILE, read_rows
from klippo.types import Prompt

ARMS = ("single", "mean", "WCO", "UWO", "single_KL", "mean_KL", "UWO_KL")
MARGIN = 0.1  # sd of gold: "at least as high" allows for this much less
EQUAL_DISTANCES = (1.0, 2.0, 3.0, 4.0)
EARLY = 20  # steps: beyond, gold sits on its floor in the arms without a leash


def evaluations(run: Path) -> dict[int, list[SampleRow]]:
    """Step -> rows."""
    files = {int(f.stem.removeprefix("step-")): f for f in (run / "eval").glob("step-*.jsonl")}
    return {step: read_rows(files[step]) for step in sorted(files)}


def variances(rows: list[SampleRow], ensemble: EnsembleReward) -> list[float]:
    """Variance over all five members of each row, whatever the run was trained on."""
    prompts = [Prompt(id=row["prompt_id"], text=row["prompt"], token_ids=[0]) for row in rows]
    scores = ensemble.score_pairs(prompts, [row["response"] for row in rows])
    values: list[float] = scores.parts["variance"].tolist()
    return values


def analyse(members: dict[str, str], runs: Path, seeds: tuple[int, ...]) -> dict[str, Any]:
    """All figures of the page."""
    torch.set_num_threads(2)
    result: dict[str, Any] = {"minutes": minutes(runs), "seeds": list(seeds), "noises": {}}
    for noise, name in members.items():
        settings = EnsembleSettings(kind="ensemble", members=[name], seeds=[1, 2, 3, 4, 5])
        ensemble = EnsembleReward(settings)
        tables = {
            arm: [Table(runs / noise / arm / f"seed{seed}", ensemble) for seed in seeds]
            for arm in ARMS
        }
        result["noises"][noise] = {
            "arms": {arm: arm_figures(found) for arm, found in tables.items()},
            "claims": {
                str(step): claims(
                    {a: [t.until(step) for t in found] for a, found in tables.items()}
                )
                for step in horizons(tables["single"][0].history.steps)
            },
        }
    result["claims"] = {noise: part["claims"] for noise, part in result["noises"].items()}
    result["early"] = EARLY
    result["margin"] = MARGIN
    result["machine"] = (
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    return result


def minutes(runs: Path) -> float:
    """What the runs took, added up, whenever they ran."""

    def time_of(file: Path, key: str) -> datetime:
        return datetime.fromisoformat(json.loads(file.read_text())[key])

    spans = [
        time_of(folder / STATUS_FILE, "ended") - time_of(folder / STARTED_FILE, "started")
        for folder in runs.glob("*/*/seed*")
        if folder.is_dir()
    ]
    return sum(span.total_seconds() for span in spans) / 60


def horizons(steps: list[int]) -> list[int]:
    """The steps at which arms are compared: early, where there is such an evaluation, and last."""
    return [step for step in (EARLY,) if step in steps[:-1]] + [steps[-1]]


class Table:
    """One run: its history and the members' variance at every evaluation."""

    def __init__(self, run: Path, ensemble: EnsembleReward) -> None:
        found = evaluations(run)
        self.history: History = history(found)
        assert self.history.gold is not None
        self.gold = self.history.gold
        self.variance = np.array([variances(rows, ensemble) for rows in found.values()])
        self.length = np.array([[row["length"] for row in rows] for rows in found.values()])
        lines = [max(rows, key=lambda row: row["proxy"] or -1e9) for rows in found.values()]
        self.example = {"prompt": lines[-1]["prompt"], "response": lines[-1]["response"]}

    def until(self, step: int) -> "Table":
        """The same run as if it had ended at an evaluated step."""
        num = self.history.steps.index(step) + 1
        early = copy.copy(self)
        early.history = History(
            steps=self.history.steps[:num],
            prompt_ids=self.history.prompt_ids,
            proxy=self.history.proxy[:num],
            kl=self.history.kl[:num],
            gold=self.gold[:num],
        )
        early.gold, early.variance, early.length = (
            values[:num] for values in (self.gold, self.variance, self.length)
        )
        return early


def arm_figures(tables: list[Table]) -> dict[str, Any]:
    """Curves (means over seeds and prompts), fit, verdicts, values at equal distance."""
    last = horizons(tables[0].history.steps)[0]
    early = [table.until(last) for table in tables]
    found = fit("rl", [Curve(gold=t.gold, kl=t.history.kl) for t in early])
    per_seed = [
        {
            "sqrt_kl": t.history.sqrt_kl.tolist(),
            "gold": t.gold.mean(1).tolist(),
            "proxy": t.history.proxy.mean(1).tolist(),
            "variance": t.variance.mean(1).tolist(),
            "length": t.length.mean(1).tolist(),
            "verdict": judge(t.history).outcome,
            "reason": judge(t.history).reason,
            "example": t.example,
        }
        for t in tables
    ]
    return {
        "steps": tables[0].history.steps,
        "seeds": per_seed,
        "gold_change": numbers(over_seeds([t.gold[-1] - t.gold[0] for t in tables])),
        "proxy_change": numbers(
            over_seeds([t.history.proxy[-1] - t.history.proxy[0] for t in tables])
        ),
        "gold_change_early": numbers(over_seeds([t.gold[-1] - t.gold[0] for t in early])),
        "peak_gold": float(np.mean([t.gold.mean(1).max() - t.gold[0].mean() for t in tables])),
        "final_sqrt_kl": float(np.mean([t.history.sqrt_kl[-1] for t in tables])),
        "at_equal_distance": [at_distance(tables, d) for d in EQUAL_DISTANCES],
        "fit": None
        if found is None
        else {key: vars_of(getattr(found, key)) for key in ("alpha", "beta", "peak")}
        | {"band": band(found, max(t.history.sqrt_kl.max() for t in early))},
    }


def vars_of(interval: Any) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def band(found: Any, largest: float) -> dict[str, list[float]]:
    """The fitted curve and its band on a grid."""
    d = np.linspace(0.1, largest, 40)
    low, high = found.band(d)
    return {"d": d.tolist(), "mean": found(d).tolist(), "low": low.tolist(), "high": high.tolist()}


def at_distance(tables: list[Table], d: float) -> dict[str, Any] | None:
    """Gold gain where sqrt(KL) first passes d, interpolated prompt by prompt; None out of reach."""
    gains = []
    for t in tables:
        reached = np.flatnonzero(t.history.sqrt_kl >= d)
        if len(reached) == 0 or reached[0] == 0:
            return None
        after = reached[0]
        low, high = t.history.sqrt_kl[after - 1 : after + 1]
        share = (d - low) / (high - low)
        gains.append((1 - share) * t.gold[after - 1] + share * t.gold[after] - t.gold[0])
    return {"d": d, **numbers(over_seeds(gains))}


def over_seeds(per_prompt: list[np.ndarray]) -> tuple[Estimate, list[float]]:
    """The mean over seeds for each prompt, estimated over prompts; and each seed's own mean."""
    return (
        estimate(np.mean(per_prompt, axis=0).tolist()),
        [float(values.mean()) for values in per_prompt],
    )


def numbers(found: tuple[Estimate, list[float]]) -> dict[str, Any]:
    whole, seeds = found
    return {"mean": whole.mean, "low": whole.low, "high": whole.high, "seeds": seeds}


def claims(tables: dict[str, list[Table]]) -> list[dict[str, Any]]:
    """The paper's qualitative claims, each with an interval and a plain answer."""
    single = tables["single"]
    found = [
        above_zero(
            "single: the proxy rises from start to end",
            [t.history.proxy[-1] - t.history.proxy[0] for t in single],
        ),
        above_zero(
            "single: gold falls from its peak to the end",
            [fall_from_peak(t) for t in single],
        ),
    ]
    pairs = [("UWO", "mean"), ("WCO", "mean"), ("mean", "single"), ("UWO", "single")]
    pairs += [("UWO_KL", "mean_KL"), ("mean_KL", "single_KL"), ("UWO_KL", "single_KL")]
    for better, worse in pairs:
        difference = [
            a.gold[-1] - b.gold[-1] for a, b in zip(tables[better], tables[worse], strict=True)
        ]
        names = [arm.replace("_", " + ") for arm in (better, worse)]
        claim = f"{names[0]} ends at least as high in gold as {names[1]}"
        found.append(above_zero(claim, difference, -MARGIN))
    growth = [
        (b.variance[-1] - b.variance[0]) - (a.variance[-1] - a.variance[0])
        for a, b in zip(tables["UWO"], tables["mean"], strict=True)
    ]
    found.append(above_zero("the members' variance grows less under UWO than under mean", growth))
    growth = [
        (b.variance[-1] - b.variance[0]) - (a.variance[-1] - a.variance[0])
        for a, b in zip(tables["UWO"], single, strict=True)
    ]
    found.append(above_zero("the members' variance grows less under UWO than under single", growth))
    return found


def fall_from_peak(table: Table) -> np.ndarray:
    """Gold at its peak minus gold at the end, prompt by prompt; each half picks for the other."""
    gold = table.gold
    order = np.random.default_rng(0).permutation(gold.shape[1])
    halves = np.array_split(order, 2)
    fall = np.empty(gold.shape[1])
    for tested, chosen_by in ((halves[0], halves[1]), (halves[1], halves[0])):
        peak = int(gold[:, chosen_by].mean(1).argmax())
        fall[tested] = gold[peak, tested] - gold[-1, tested]
    return fall


def above_zero(claim: str, per_prompt: list[np.ndarray], bar: float = 0.0) -> dict[str, Any]:
    """yes: the interval lies above the bar, and every seed; no: it lies below; else unclear."""
    whole, seeds = over_seeds(per_prompt)
    answer = "unclear"
    if whole.low > bar and min(seeds) > bar:
        answer = "yes"
    elif whole.high < bar:
        answer = "no"
    return {"claim": claim, "answer": answer, "bar": bar} | numbers((whole, seeds))
