"""`klippo best-of-n`: how gold moves as more samples are picked from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from klippo.data.rows import data_of, rows_kept
from klippo.data.sampler import pick
from klippo.errors import ConfigError
from klippo.evaluation.best_of_n import (
    curves,
    default_ns,
    fit_figures,
    fit_gold,
    kl_of_best_of,
    points,
)
from klippo.evaluation.history import Floats
from klippo.lab import fingerprints
from klippo.lab.arms import Standardize, arms_named, reward_key
from klippo.lab.reward_names import check_reward, reward_label, reward_named
from klippo.lab.sample_storage import (
    PROMPTS_FILE,
    SAMPLES_FILE,
    SCORES_DIR,
    Samples,
    drawn_samples,
    samples_in,
    score_samples,
    show_progress,
    store_prompts,
)
from klippo.ranks import choose_device
from klippo.report.best_of_n import draw_best_of_n
from klippo.rollouts.collate import decode
from klippo.rollouts.sampling import Sampling, response_seeds
from klippo.runs.folder import append_lines, complete_lines, read_object, write_text, writing
from klippo.runs.models import UNNAMED, OpenModel, open_model
from klippo.runs.progress import LiveLine
from klippo.types import Prompt

REQUEST_FILE = "sampling.json"
RESULT_FILE = "best_of_n.json"
FIGURE = "best_of_n"
NUMBERS_PER_PROMPT = 2**32
"""Response number of sample s of prompt p: p * 2**32 + s, where p is the prompt's row."""


@dataclass(kw_only=True)
class BestOfN:
    """One command: sample or read, score, combine; write best_of_n.json and the figures."""

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

    def run(self) -> int:
        """Returns the exit code."""
        if (self.policy is None) == (self.samples is None):
            raise ConfigError("give either POLICY to sample from, or --samples FILE with samples")
        if self.temperature <= 0:
            raise ConfigError(
                f"temperature={self.temperature} draws the same response every time; use 1"
            )
        arms = arms_named(self.proxies, self.ensembles, self.standardize)
        rewards = {key: settings for arm in arms for key, settings in arm.members}
        gold_reward = None if self.gold is None else reward_named(self.gold)
        if gold_reward is not None:
            rewards[reward_key(gold_reward)] = gold_reward
        for settings in rewards.values():
            check_reward(settings)
        if self.policy is not None:
            self._check_ns(self.num_samples)
        samples = self._samples()
        order = np.argsort(samples.prompt_of_sample, kind="stable")
        counts = np.bincount(samples.prompt_of_sample, minlength=len(samples.prompts))
        groups = np.split(order, np.cumsum(counts)[:-1])  # the sample numbers of every prompt
        self._check_ns(int(counts.min()))
        scores = score_samples(
            samples, rewards, self.output / SCORES_DIR, self._console, choose_device("auto")
        )
        gold, label = samples.gold, None
        if gold_reward is not None:
            gold, label = scores[reward_key(gold_reward)], reward_label(gold_reward)
        elif gold is not None:
            self._console.print("Gold scores are those in the file.")
        self._write({arm.name: arm.score(scores) for arm in arms}, gold, label, groups)
        return 0

    @cached_property
    def _console(self) -> Console:
        return Console()

    def _check_ns(self, num_samples: int) -> None:
        if any(n < 1 for n in self.ns):
            raise ConfigError(f"n={min(self.ns)}: the best of n needs n >= 1")
        most = max(self.ns, default=0)
        if most > num_samples:
            raise ConfigError(
                f"n={most} is more than the {num_samples} samples per prompt; leave it out, or "
                f"take more samples (--num-samples {most})"
            )

    def _samples(self) -> Samples:
        """All samples; the folder begins when all is checked."""
        request = self._request()
        resumes = self._resumes(request)
        if self.samples is not None:
            samples = samples_in(self.samples)
            if not resumes:
                self._begin(request)
            num = len(samples.prompt_of_sample)
            self._console.print(f"{num:,} samples of {len(samples.prompts):,} prompts")
            return samples
        if not resumes:
            prompts = self._chosen_prompts()
            self._begin(request)
            store_prompts(self.output, prompts)
        samples = drawn_samples(self.output, self.num_samples)
        self._draw_missing(samples.prompts, len(samples.prompt_of_sample))
        return samples

    def _draw_missing(self, prompts: Sequence[Prompt], total: int) -> None:
        """Sample what is missing; every batch is on disk before the next one starts."""
        file = self.output / SAMPLES_FILE
        num_done = complete_lines(file)
        if num_done >= total:
            self._console.print("Every sample is there already.")
            return
        opened = self._opened
        engine = opened.engine(Sampling(temperature=self.temperature))
        length = self.response_length or opened.max_tokens
        with LiveLine(self._console, num_lines=10, num_done=num_done) as line:
            for start in range(num_done, total, self.batch_size):
                numbers = range(start, min(start + self.batch_size, total))
                asked = [prompts[i % len(prompts)] for i in numbers]
                ranks = [i // len(prompts) for i in numbers]
                keys = [p.id * NUMBERS_PER_PROMPT + s for p, s in zip(asked, ranks, strict=True)]
                seeds = response_seeds(self.seed, keys)
                completions = engine.generate(asked, [length] * len(asked), seeds)
                responses = decode([c.token_ids for c in completions], opened.tokenizer)
                rows = [
                    {
                        "prompt_id": prompt.id,
                        "sample": rank,
                        "prompt": prompt.text,
                        "response": response,
                        "response_ids": drawn.token_ids,
                        "finished": drawn.finished,
                    }
                    for prompt, rank, response, drawn in zip(
                        asked, ranks, responses, completions, strict=True
                    )
                ]
                append_lines(file, rows)
                show_progress(line, "sampled", numbers.stop, total)

    @cached_property
    def _opened(self) -> OpenModel:
        assert self.policy is not None
        return open_model(self.policy, choose_device("auto"))

    def _chosen_prompts(self) -> list[Prompt]:
        data = self._opened.data
        if self.prompts is not None:
            data = data_of(self.prompts, data)
        elif data.train == UNNAMED.train:
            raise ConfigError(f"{self.policy} is no run folder; say which prompts: --prompts FILE")
        length = self.response_length or self._opened.max_tokens
        rows = rows_kept(data, self._opened.data_seed)
        prompts = self._opened.prompts(rows, data, length, self.seed)
        return pick(prompts, self.num_prompts, self.seed)

    def _request(self) -> dict[str, Any]:
        """What decides the samples; all but their number, which can grow."""
        if self.samples is not None:
            if not self.samples.is_file():
                raise ConfigError(f"{self.samples}: there is no such file; check the path")
            digest = fingerprints.of_files([self.samples])
            return {"samples": str(self.samples), "content": digest}
        assert self.policy is not None
        prompts = None if self.prompts is None else Path(self.prompts)
        return {
            "policy": self.policy,
            "weights": fingerprints.of_model(self.policy),
            "prompts": self.prompts,
            "content": fingerprints.of_files([prompts]) if prompts and prompts.is_file() else None,
            "num_prompts": self.num_prompts,
            "response_length": self.response_length,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    def _resumes(self, request: Mapping[str, Any]) -> bool:
        """Whether the folder holds samples of the same request.

        Raises ConfigError if it holds those of another, unless `overwrite`, or something else.
        """
        folder, file = self.output, self.output / REQUEST_FILE
        if not file.is_file():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ConfigError(
                    f"output={folder} exists and holds no samples of Klippo ({REQUEST_FILE}); "
                    "choose another --output"
                )
            return False
        known = read_object(file)
        changed = [
            f"{key} is {known.get(key)} there and {request.get(key)} here"
            for key in dict.fromkeys([*known, *request])
            if known.get(key) != request.get(key)
        ]
        if changed and not self.overwrite:
            raise ConfigError(
                f"output={folder} holds samples of another request: {'; '.join(changed)}. Choose "
                "another --output, or add --overwrite to remove them"
            )
        has_prompts = self.samples is not None or (folder / PROMPTS_FILE).is_file()
        return not self.overwrite and has_prompts

    def _begin(self, request: Mapping[str, Any]) -> None:
        """An empty folder for this request."""
        with writing(self.output):
            shutil.rmtree(self.output / SCORES_DIR, ignore_errors=True)
            for name in (SAMPLES_FILE, PROMPTS_FILE, REQUEST_FILE, RESULT_FILE):
                (self.output / name).unlink(missing_ok=True)
        write_text(self.output / REQUEST_FILE, json.dumps(request, indent=1) + "\n")

    def _write(
        self,
        arms: Mapping[str, Floats],
        gold: Floats | None,
        gold_label: str | None,
        groups: Sequence[NDArray[np.intp]],
    ) -> None:
        """Results from the scores (M,) of every arm and of gold."""
        num_samples = min(len(group) for group in groups)
        ns = sorted(set(self.ns)) or default_ns(num_samples)
        fitted_ns = sorted({1, *ns})
        shown = [fitted_ns.index(n) for n in ns]
        figures: dict[str, dict[str, Any]] = {}
        fits, unscored = {}, {}
        for name, scores in arms.items():
            of_arm = curves(scores, gold, groups, fitted_ns)
            figures[name] = {"proxy": points(of_arm.proxy[:, shown])}
            if of_arm.num_unscored:
                unscored[name] = of_arm.num_unscored
            if of_arm.gold is not None:
                figures[name]["gold"] = points(of_arm.gold[:, shown])
                if (law := fit_gold(of_arm.gold, fitted_ns)) is not None:
                    fits[name] = law
        result = {
            "policy": self.policy or str(self.samples),
            "num_prompts": len(groups),
            "num_samples": num_samples,
            "gold": gold_label,
            "ns": ns,
            "kl_bound": [kl_of_best_of(n) for n in ns],
            "arms": figures,
            "fits": {name: fit_figures(law) for name, law in fits.items()},
            "unscored": unscored,
        }
        write_text(self.output / RESULT_FILE, json.dumps(result, indent=1) + "\n")
        draw_best_of_n(result, fits, self.output / FIGURE)
        self._console.print(_table(result))
        for name, number in unscored.items():
            self._console.print(Text(f"{name}: {number} samples without a score are left out."))
        self._console.print(f"Results: {self.output / RESULT_FILE}", soft_wrap=True)


def _table(result: Mapping[str, Any]) -> Table:
    title = f"Best of n, {result['num_prompts']} prompts, {result['num_samples']} samples of each"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("picked by")
    for name in ("n", "KL ≤", "reward (95%)", "gold (95%)"):
        table.add_column(name, justify="right")
    for name, arm in result["arms"].items():
        for i, n in enumerate(result["ns"]):
            cells = [_cell(arm[key][i]) if key in arm else "" for key in ("proxy", "gold")]
            kl = f"{result['kl_bound'][i]:.2f}"
            table.add_row(Text(name if i == 0 else ""), str(n), kl, *cells)
    return table


def _cell(point: Mapping[str, float | None]) -> str:
    if point["mean"] is None:
        return "unscored"
    if point["low"] is None:
        return f"{point['mean']:+.2f}"
    return f"{point['mean']:+.2f} ({point['low']:+.2f} to {point['high']:+.2f})"
