"""`klippo reward-model`: one member per seed, measured alone and together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from klippo.config.load import LoadedConfig, config_from_mapping, load_config, show, to_yaml
from klippo.data.preferences import bag, load_preferences, units_of
from klippo.data.rows import data_of, rows_kept
from klippo.data.sampler import PromptSampler
from klippo.errors import ConfigError
from klippo.evaluation.pairs import (
    PairReport,
    ensemble_differences,
    error_correlation,
    gain,
    report_pairs,
)
from klippo.lengths import longest
from klippo.report.members import (
    ENSEMBLE,
    LEGEND,
    MemberFigures,
    draw_reliability,
    members_table,
    pair_figures,
    together_lines,
)
from klippo.rewards import stored
from klippo.rewards.classifier import ClassifierReward
from klippo.rewards.settings import ClassifierSettings
from klippo.rewards.stored import STORED_FILE, StoredReward
from klippo.rollouts.sampling import Sampling
from klippo.rollouts.settings import RolloutSettings
from klippo.rollouts.sources import Sampler
from klippo.runs.folder import CONFIG_FILE, write_text, writing
from klippo.runs.models import open_model
from klippo.supervised.bradley_terry import train_reward_model
from klippo.supervised.settings import ReferenceSettings, RewardModelConfig
from klippo.supervised.training import (
    Training,
    TrainingLine,
    holds_result,
    new_folder,
    prepare,
    save,
)
from klippo.types import Rollout

METRICS_FILE = "metrics.json"
GENERATION_BATCH = 64
FREE_KEYS = ("device", "num_threads", "output_dir")
"""What may differ between a finished member's config and the present one."""


def reward_model(
    loaded: LoadedConfig[RewardModelConfig], *, overwrite: bool = False, quiet: bool = False
) -> int:
    """Train the members that are missing, measure all of them; returns the exit code."""
    config = loaded.config
    device = prepare("reward-model", config)
    members = _Members(config, device, quiet)
    missing = [seed for seed in config.member_seeds if not members.is_finished(seed, overwrite)]
    if missing and config.reference is not None:
        members.reference = sample_reference(config.reference, device)
    for seed in config.member_seeds:
        if seed in missing:
            members.train(seed)
        else:
            members.say(f"{members.folder(seed)} is there already; --overwrite trains it again")
    members.conclude(loaded.name)
    return 0


class _Members:
    """The members of one command, which share pairs and reference responses."""

    def __init__(self, config: RewardModelConfig, device: torch.device, quiet: bool) -> None:
        """Raises ConfigError for what is wrong with the data."""
        self.config, self.device, self.quiet = config, device, quiet
        self.console = Console(highlight=False)
        self.reference: Rollout | None = None
        self._pairs = load_preferences(config.data)
        content = [[p.prompt.text, p.chosen, p.rejected, p.margin] for p in self._pairs.train]
        self._sha256 = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self._units = [units_of(pair) for pair in self._pairs.held_out]
        self.say(f"{len(self._pairs.train)} training pairs, {len(self._units)} held-out pairs")
        for note in self._pairs.notes:
            self.say(f"  {note}")

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def folder(self, seed: int) -> Path:
        return Path(f"{self.config.output_dir}_seed{seed}")

    def is_finished(self, seed: int, overwrite: bool) -> bool:
        """Whether this very member is there already, and stays.

        Raises ConfigError for a folder that is not a reward model of Klippo, and for one that was
        trained with other settings or on other pairs and may not be replaced.
        """
        folder, files = self.folder(seed), [STORED_FILE, CONFIG_FILE, METRICS_FILE]
        if not holds_result(folder, files, "reward model that Klippo trained") or overwrite:
            return False
        mapping = self._member_config(seed).model_dump(mode="json")
        now = _values(config_from_mapping(mapping, schema=RewardModelConfig))
        then = _values(load_config(folder / CONFIG_FILE, schema=RewardModelConfig))
        other = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        difference = None
        if other:
            key, more = other[0], f", and {len(other) - 1} more" if len(other) > 1 else ""
            difference = f"with other settings ({key}={then.get(key)}, now {now.get(key)}{more})"
        elif _metrics(folder).get("pairs_sha256") != self._sha256:
            difference = f"on other pairs than {self.config.data.train} gives now"
        if difference is not None:
            raise ConfigError(
                f"{folder} was trained {difference}; choose another output_dir, or pass "
                "--overwrite to train it again"
            )
        return True

    def train(self, seed: int) -> None:
        """Train one member; its folder appears when it is complete."""
        config, pairs = self.config, self._pairs.train
        if config.data.bagging:
            pairs = bag(pairs, seed)
        with TrainingLine(self.console, f"seed {seed}", quiet=self.quiet) as line:
            training = Training(config.training, seed, self.device, line.step)
            model, tokenizer, num_cut = train_reward_model(pairs, config, training)
        if num_cut:
            self.say(f"seed {seed}: {num_cut} texts were too long and lost their start")
        with new_folder(self.folder(seed)) as building:
            save(model, tokenizer, building)
            moments = self._moments(building)
            stored.write(building, StoredReward(template=config.template, seed=seed, **moments))
            figures = {
                "seed": seed,
                "num_train_pairs": len(pairs),
                "pairs_sha256": self._sha256,
                "num_cut_texts": num_cut,
                "minutes": line.seconds / 60,
                "held_out": pair_figures(self._measure(building)[1]),
            }
            write_text(building / METRICS_FILE, json.dumps(figures, indent=2) + "\n")
            write_text(building / CONFIG_FILE, to_yaml(self._member_config(seed)))

    def _member_config(self, seed: int) -> RewardModelConfig:
        """What trains this one member."""
        return self.config.model_copy(update={"seed": seed, "seeds": None})

    def _scorer(self, folder: Path) -> ClassifierReward:
        config = self.config
        settings = ClassifierSettings(
            kind="classifier",
            model=str(folder),
            template=config.template,
            max_tokens=config.max_tokens,
        )
        return ClassifierReward(settings, device=self.device, prompt_column=config.prompt_column)

    def _measure(self, folder: Path) -> tuple[list[float], PairReport | None]:
        """Chosen minus rejected score of every held-out pair, and their figures."""
        pairs = self._pairs.held_out
        if not pairs:
            return [], None
        scorer, prompts = self._scorer(folder), [pair.prompt for pair in pairs]
        chosen = scorer.score_pairs(prompts, [pair.chosen for pair in pairs]).reward
        rejected = scorer.score_pairs(prompts, [pair.rejected for pair in pairs]).reward
        differences = (chosen.double() - rejected.double()).tolist()
        return differences, report_pairs(differences, self._units)

    def _moments(self, folder: Path) -> dict[str, Any]:
        """Mean and sd of the member's scores of the reference responses."""
        if self.reference is None or self.config.reference is None:
            return {}
        scores = self._scorer(folder).score(self.reference).reward.double()
        sd = float(scores.std())
        if not sd > 0:
            raise ConfigError(
                f"reference: the member gives all {len(scores)} responses the same score, so it "
                "has no scale; check the template, and raise training.learning_rate or "
                "training.num_epochs"
            )
        return {
            "mean": float(scores.mean()),
            "sd": sd,
            "num_samples": len(scores),
            "policy": self.config.reference.policy,
        }

    def conclude(self, name: str) -> None:
        """Measure all members, alone and together; print and write what came out."""
        folders = {seed: self.folder(seed) for seed in self.config.member_seeds}
        measured = {seed: self._measure(folder) for seed, folder in folders.items()}
        kept = {s: stored.read(str(folder)) or StoredReward() for s, folder in folders.items()}
        members = [
            MemberFigures(
                name=f"seed {seed}",
                folder=folder,
                report=measured[seed][1],
                mean=kept[seed].mean,
                sd=kept[seed].sd,
                minutes=float(_metrics(folder)["minutes"]),
            )
            for seed, folder in folders.items()
        ]
        figures: dict[str, Any] = {
            "name": name,
            "num_train_pairs": len(self._pairs.train),
            "num_held_out_pairs": len(self._units),
            "notes": self._pairs.notes,
            "members": [
                asdict(moments)
                | {"seed": seed, "folder": str(member.folder), "minutes": member.minutes}
                | {"held_out": pair_figures(member.report)}
                for (seed, moments), member in zip(kept.items(), members, strict=True)
            ],
            "ensemble": None,
            "error_correlation": None,
        }
        lines = []
        if len(members) > 1 and self._units:
            sds = [moments.sd for moments in kept.values()]
            differences = [of for of, _ in measured.values()]
            together = ensemble_differences(differences, sds)
            report = report_pairs(together, self._units)
            members.append(MemberFigures(name=ENSEMBLE, report=report))
            correlation = error_correlation(differences)
            better = gain(together, differences, self._units)
            lines = together_lines(correlation, better)
            figures["error_correlation"] = correlation
            figures["ensemble"] = {
                "standardized": None not in sds,
                "accuracy_gain": asdict(better),
                "held_out": pair_figures(report),
            }
        beside = self.config.output_dir
        write_text(Path(f"{beside}_members.json"), json.dumps(figures, indent=2) + "\n")
        self._show(name, members, lines)

    def _show(self, name: str, members: list[MemberFigures], lines: list[str]) -> None:
        """Write and print the table and the lines, and draw the reliability diagram."""
        beside, num, seeds = self.config.output_dir, len(self._units), self.config.member_seeds
        table = members_table(f"{name}: {num} held-out pairs", members)
        text = "\n\n".join([f"# {name}", table.markdown().rstrip(), LEGEND, *lines])
        write_text(Path(f"{beside}_members.md"), text + "\n")
        self.console.print(table.for_terminal())
        if num:
            path = Path(f"{beside}_reliability")
            with writing(path):
                draw_reliability(members, path, f"{name}: {num} pairs")
        else:
            lines.append(
                "Nothing was held out, so nothing says how good they are; "
                "set data.validation_size or data.validation."
            )
        lines.append(
            f"As a reward: {{kind: classifier, model: {beside}_seed{seeds[0]}}}"
            if len(seeds) == 1
            else f"As a reward: {{kind: ensemble, members: ['{beside}_seed{{seed}}'], "
            f"seeds: {seeds}}}"
        )
        for line in lines:
            self.console.print(line, markup=False, soft_wrap=True)


def sample_reference(settings: ReferenceSettings, device: torch.device) -> Rollout:
    """The shared responses of the reference policy. Raises ConfigError or PreflightError."""
    opened = open_model(settings.policy, device)
    asked = {
        name: getattr(settings, name)
        for name in ("template", "format", "cut_tokens")
        if name in settings.model_fields_set
    }
    data = data_of(settings.prompts, opened.data).model_copy(
        update={"prompt_column": settings.prompt_column} | asked
    )
    room = longest(settings.response_length)
    prompts = opened.prompts(rows_kept(data, settings.seed), data, room, settings.seed)
    sampler = Sampler(
        engine=opened.engine(Sampling(temperature=settings.temperature), GENERATION_BATCH),
        tokenizer=opened.tokenizer,
        settings=RolloutSettings(
            response_length=settings.response_length, temperature=settings.temperature
        ),
        device=device,
    )
    asked_prompts = PromptSampler(prompts, settings.num_samples, settings.seed).next()
    return sampler.sample(asked_prompts, settings.seed, range(settings.num_samples))


def _metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    return metrics


def _values(loaded: LoadedConfig[RewardModelConfig]) -> dict[str, Any]:
    return {key: value for key, value, _ in show(loaded) if key not in FREE_KEYS}
