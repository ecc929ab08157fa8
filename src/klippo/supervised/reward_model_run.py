"""The stage behind `klippo reward-model`: one member per seed, measured alone and together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from klippo.config.load import LoadedConfig, load_config, show, to_yaml
from klippo.data.preference_rows import Pair
from klippo.data.preferences import Preferences, bag, load_preferences
from klippo.data.prompts import build_prompts
from klippo.data.rows import load_rows
from klippo.data.sampler import PromptSampler
from klippo.errors import ConfigError
from klippo.evaluation.pairs import (
    ensemble_differences,
    error_correlation,
    gain,
    report_pairs,
)
from klippo.evaluation.statistics import Estimate
from klippo.lengths import room_for_prompts
from klippo.ranks import choose_device
from klippo.report.members import (
    ENSEMBLE,
    MemberFigures,
    draw_reliability,
    members_markdown,
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
from klippo.rollouts.sources import OnlineSource
from klippo.runs.folder import CONFIG_FILE, RunFolder, write_text, writing
from klippo.runs.models import open_model
from klippo.supervised.progress import TrainingLine
from klippo.supervised.reward_model import train_reward_model
from klippo.supervised.settings import ReferenceSettings, RewardModelConfig
from klippo.supervised.training import check_one_process
from klippo.types import Rollout

METRICS_FILE = "metrics.json"
GENERATION_BATCH = 64
FREE_KEYS = ("device", "num_threads", "output_dir")
"""What may differ between a finished member's config and the present one."""


def reward_model(
    loaded: LoadedConfig[RewardModelConfig], *, overwrite: bool = False, quiet: bool = False
) -> int:
    """Train the members that are missing, measure all of them; returns the exit code."""
    check_one_process("reward-model")
    config = loaded.config
    device = choose_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    stage = _Stage(config, device, quiet)
    missing = [seed for seed in config.member_seeds if not stage.is_whole(seed, overwrite)]
    stage.load_data()
    if missing and config.reference is not None:
        stage.reference = sample_reference(config.reference, device)
    for seed in config.member_seeds:
        if seed in missing:
            stage.train(seed)
        else:
            stage.say(f"{stage.folder(seed)} is there already; --overwrite trains it again")
    stage.conclude(loaded.name)
    return 0


class _Stage:
    """What the members of one command share."""

    def __init__(self, config: RewardModelConfig, device: torch.device, quiet: bool) -> None:
        self.config = config
        self.device = device
        self.quiet = quiet
        self.console = Console()
        self.reference: Rollout | None = None
        self._pairs = Preferences(train=[], held_out=[])
        self._fingerprint = ""

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def folder(self, seed: int) -> Path:
        return Path(f"{self.config.output_dir}_seed{seed}")

    def load_data(self) -> None:
        """The pairs, the same for every member. Raises ConfigError."""
        self._pairs = load_preferences(self.config.data)
        self._fingerprint = fingerprint(self._pairs.train)
        for seed in self.config.member_seeds:
            self._check_same_pairs(seed)
        self.say(
            f"{len(self._pairs.train)} training pairs, {len(self._pairs.held_out)} held-out pairs"
        )
        for note in self._pairs.notes:
            self.say(f"  {note}")

    def is_whole(self, seed: int, overwrite: bool) -> bool:
        """True where this very member stands already.

        Raises ConfigError for a folder that is not a reward model of Klippo, and for one that was
        trained with other settings and may not be replaced.
        """
        folder = self.folder(seed)
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return False
        if not all((folder / name).is_file() for name in (STORED_FILE, CONFIG_FILE, METRICS_FILE)):
            raise ConfigError(
                f"output_dir: {folder} exists and is not a reward model that Klippo trained (it "
                f"lacks {STORED_FILE}, {CONFIG_FILE} or {METRICS_FILE}), so it is left alone, also "
                "by --overwrite; choose another output_dir"
            )
        if overwrite:
            return False
        self._check_same_settings(folder, seed)
        return True

    def _check_same_settings(self, folder: Path, seed: int) -> None:
        then = _values(load_config(folder / CONFIG_FILE, schema=RewardModelConfig))
        now = _values(_as_loaded(member_config(self.config, seed)))
        other = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        if other:
            key, more = other[0], f", and {len(other) - 1} more" if len(other) > 1 else ""
            raise ConfigError(
                f"{folder} was trained with other settings ({key}={then.get(key)}, now "
                f"{now.get(key)}{more}); choose another output_dir, or pass --overwrite to train "
                "it again"
            )

    def _check_same_pairs(self, seed: int) -> None:
        path = self.folder(seed) / METRICS_FILE
        if not path.is_file():
            return
        then = json.loads(path.read_text(encoding="utf-8")).get("pairs_sha256")
        if then != self._fingerprint:
            raise ConfigError(
                f"{self.folder(seed)} was trained on other pairs than {self.config.data.train} "
                "gives now; choose another output_dir, or remove the folder"
            )

    def train(self, seed: int) -> None:
        """One member, in its folder only when it is whole."""
        config, folder = self.config, self.folder(seed)
        pairs = self._pairs.train
        if config.data.bagging:
            pairs = bag(pairs, seed)
        with TrainingLine(self.console, f"seed {seed}", quiet=self.quiet) as line:
            trained = train_reward_model(
                pairs,
                config.model,
                config.training,
                template=config.template,
                max_tokens=config.max_tokens,
                prompt_column=self._prompt_column,
                seed=seed,
                device=self.device,
                report=line.step,
            )
        if trained.num_cut:
            self.say(f"seed {seed}: {trained.num_cut} texts were too long and lost their start")
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with RunFolder(folder.parent).new_directory(folder.name) as building:
            trained.save(building)
            stored.write(building, StoredReward(template=config.template, seed=seed))
            moments = self._moments(building)
            stored.write(building, StoredReward(template=config.template, seed=seed, **moments))
            figures = {
                "seed": seed,
                "num_train_pairs": len(pairs),
                "pairs_sha256": self._fingerprint,
                "num_cut_texts": trained.num_cut,
                "minutes": line.seconds / 60,
                "held_out": self._report(self._differences(building)),
            }
            write_text(building / METRICS_FILE, json.dumps(figures, indent=2) + "\n")
            write_text(building / CONFIG_FILE, to_yaml(member_config(config, seed)))

    @property
    def _prompt_column(self) -> str:
        column = self.config.data.prompt_column
        return column if isinstance(column, str) else "prompt"

    def _scorer(self, folder: Path) -> ClassifierReward:
        settings = ClassifierSettings(
            kind="classifier", model=str(folder), max_tokens=self.config.max_tokens
        )
        return ClassifierReward(settings, device=self.device, prompt_column=self._prompt_column)

    def _differences(self, folder: Path) -> list[float]:
        """Chosen minus rejected score of every held-out pair."""
        pairs = self._pairs.held_out
        if not pairs:
            return []
        scorer = self._scorer(folder)
        prompts = [pair.prompt for pair in pairs]
        chosen = scorer.score_pairs(prompts, [pair.chosen for pair in pairs]).reward
        rejected = scorer.score_pairs(prompts, [pair.rejected for pair in pairs]).reward
        differences: list[float] = (chosen.double() - rejected.double()).tolist()
        return differences

    def _report(self, differences: Sequence[float]) -> dict[str, Any] | None:
        if not differences:
            return None
        units = [pair.units for pair in self._pairs.held_out]
        return pair_figures(report_pairs(differences, units))

    def _moments(self, folder: Path) -> dict[str, Any]:
        """Mean and sd of the member's scores of the reference responses (algorithm, rule 31)."""
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
        seeds = self.config.member_seeds
        units = [pair.units for pair in self._pairs.held_out]
        differences = [self._differences(self.folder(seed)) for seed in seeds]
        kept = [stored.read(str(self.folder(seed))) or StoredReward() for seed in seeds]
        members = [
            MemberFigures(
                name=f"seed {seed}",
                folder=self.folder(seed),
                report=report_pairs(d, units) if d else None,
                mean=own.mean,
                sd=own.sd,
                minutes=_minutes(self.folder(seed)),
            )
            for seed, d, own in zip(seeds, differences, kept, strict=True)
        ]
        correlation, better = None, None
        if len(seeds) > 1 and units:
            together = ensemble_differences(differences, [own.sd for own in kept])
            members.append(MemberFigures(name=ENSEMBLE, report=report_pairs(together, units)))
            correlation = error_correlation(differences)
            better = gain(together, differences, units)
        self._write(name, members, kept, correlation, better)
        self._show(name, members, together_lines(correlation, better))

    def _write(
        self,
        name: str,
        members: Sequence[MemberFigures],
        kept: Sequence[StoredReward],
        correlation: float | None,
        better: Estimate | None,
    ) -> None:
        seeds = self.config.member_seeds
        figures: dict[str, Any] = {
            "name": name,
            "num_train_pairs": len(self._pairs.train),
            "num_held_out_pairs": len(self._pairs.held_out),
            "notes": self._pairs.notes,
            "members": [
                asdict(own)
                | {
                    "seed": seed,
                    "folder": str(member.folder),
                    "minutes": member.minutes,
                    "held_out": pair_figures(member.report),
                }
                for seed, member, own in zip(seeds, members[: len(seeds)], kept, strict=True)
            ],
            "ensemble": None,
            "error_correlation": correlation,
        }
        if len(members) > len(seeds):
            figures["ensemble"] = {
                "standardized": all(own.sd is not None for own in kept),
                "accuracy_gain": None if better is None else asdict(better),
                "held_out": pair_figures(members[-1].report),
            }
        write_text(self._beside("members.json"), json.dumps(figures, indent=2) + "\n")
        text = f"# {name}\n\n{members_markdown(members)}"
        for line in together_lines(correlation, better):
            text += f"\n{line}\n"
        write_text(self._beside("members.md"), text)
        if self._pairs.held_out:
            path = self._beside("reliability")
            with writing(path):
                draw_reliability(members, path, f"{name}: {len(self._pairs.held_out)} pairs")

    def _beside(self, ending: str) -> Path:
        return Path(f"{self.config.output_dir}_{ending}")

    def _show(self, name: str, members: Sequence[MemberFigures], lines: list[str]) -> None:
        title = f"{name}: {len(self._pairs.held_out)} held-out pairs"
        self.console.print(members_table(title, members))
        if not self._pairs.held_out:
            lines.append(
                "Nothing was held out, so nothing says how good they are; "
                "set data.validation_size or data.validation."
            )
        seeds = self.config.member_seeds
        folder = f"{self.config.output_dir}_seed"
        lines.append(
            f"As a reward: {{kind: classifier, model: {folder}{seeds[0]}}}"
            if len(seeds) == 1
            else f"As a reward: {{kind: ensemble, members: ['{folder}{{seed}}'], seeds: {seeds}}}"
        )
        for line in lines:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def member_config(config: RewardModelConfig, seed: int) -> RewardModelConfig:
    """What trains this one member."""
    return config.model_copy(update={"seed": seed, "seeds": None})


def fingerprint(pairs: Sequence[Pair]) -> str:
    """SHA-256 of the pairs' prompts, responses, order and margins."""
    content = [[p.prompt.text, p.chosen, p.rejected, p.margin] for p in pairs]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sample_reference(settings: ReferenceSettings, device: torch.device) -> Rollout:
    """The shared responses of the reference policy. Raises ConfigError or PreflightError."""
    opened = open_model(settings.policy, device)
    data = opened.data.model_copy(
        update={
            "train": settings.prompts,
            "subset": None,
            "split": "train",
            "validation": None,
            "validation_size": 0,
            "prompt_column": settings.prompt_column,
        }
        | {
            name: getattr(settings, name)
            for name in ("template", "format", "cut_tokens")
            if name in settings.model_fields_set
        }
    )
    rows, _ = load_rows(data, settings.seed)
    room = room_for_prompts(opened.model, settings.response_length, data.max_prompt_tokens)
    prompts = build_prompts(
        rows,
        data,
        opened.tokenizer,
        max_prompt_tokens=room,
        seed=settings.seed,
        source=settings.prompts,
    )
    sampler = PromptSampler(prompts, settings.num_samples, settings.seed)
    engine = opened.engine(Sampling(temperature=settings.temperature))
    engine.batch_size = GENERATION_BATCH
    rollout = RolloutSettings(
        response_length=settings.response_length, temperature=settings.temperature
    )
    source = OnlineSource(
        sampler.next, engine, opened.tokenizer, rollout, seed=settings.seed, device=device
    )
    return source.next()


def _minutes(folder: Path) -> float:
    return float(json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))["minutes"])


def _as_loaded(config: RewardModelConfig) -> LoadedConfig[RewardModelConfig]:
    from klippo.config.load import config_from_mapping

    return config_from_mapping(config.model_dump(mode="json"), schema=RewardModelConfig)


def _values(loaded: LoadedConfig[RewardModelConfig]) -> dict[str, Any]:
    return {key: value for key, value, _ in show(loaded) if key not in FREE_KEYS}
