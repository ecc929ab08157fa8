"""Several reward models as one conservative reward (Coste et al. 2023, arXiv 2310.02743).

B sequences, K members.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from klippo.errors import ConfigError
from klippo.rewards import stored
from klippo.rewards.classifier import ClassifierReward, score_together
from klippo.rewards.scorers import Stack
from klippo.rewards.settings import EnsembleSettings, MomentsSettings
from klippo.tensors.ensembles import combine, variance
from klippo.types import Prompt, Rollout, Scores


class EnsembleReward:
    """Scores every text with all members, standardises each member, and combines them.

    Members of one architecture and one tokenizer are scored together: the texts are tokenized once
    and the weights stacked into one batched forward. Others are scored in turn, each through its
    own tokenizer and template.
    """

    def __init__(
        self,
        settings: EnsembleSettings,
        *,
        device: torch.device | str = "cpu",
        prompt_column: str = "prompt",
    ) -> None:
        """Load all members.

        Raises what ClassifierReward raises, and ConfigError for a member whose stored mean and
        standard deviation are asked for and missing.
        """
        self.settings = settings
        self.members = [
            ClassifierReward(one, device=device, prompt_column=prompt_column)
            for one in settings.classifiers()
        ]
        self._moments = settings.moments
        if settings.standardize == "none":
            self._moments = None
        elif settings.standardize == "stored" and settings.moments is None:
            means, sds = zip(*map(stored.moments_of, settings.classifiers()), strict=True)
            self._moments = MomentsSettings(mean=list(means), sd=list(sds))
        families: dict[str, list[int]] = {}
        for number, member in enumerate(self.members):
            families.setdefault(member.family, []).append(number)
        self._families = [
            (group, Stack([self.members[k].scorer for k in group], self.members[group[0]].width))
            for group in families.values()
        ]

    @property
    def waits_for_moments(self) -> bool:
        """True until `measure` was called, if the run's start is to standardise the members."""
        return self.settings.standardize == "start" and self._moments is None

    def score(self, rollout: Rollout) -> Scores:
        """reward: (B,) float32; members: (K, B), standardised; part `variance` (B,) over members.

        A text that any member could not score has a NaN reward.
        """
        return self.score_pairs(
            rollout.prompts, rollout.responses, device=rollout.tokens.response_ids.device
        )

    def score_pairs(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        *,
        device: torch.device | str = "cpu",
    ) -> Scores:
        """The same from prompts and decoded responses alone; the scores lie on `device`."""
        assert not self.waits_for_moments, "measure() comes first"
        raw, cut = self._raw(prompts, responses)
        if self._moments is not None:
            mean, sd = torch.tensor([self._moments.mean, self._moments.sd])[..., None]  # (K, 1)
            raw = (raw - mean) / sd
        members, settings = raw.to(device), self.settings
        reward = combine(members, settings.objective, **settings.weights)
        parts = {"variance": variance(members, settings.ddof), "cut": cut.to(device)}
        return Scores(reward=reward, members=members, parts=parts)

    def measure(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> MomentsSettings:
        """Mean and standard deviation of each member on these responses, used from now on.

        Raises ConfigError when a member gives all of them the same score.
        """
        raw, _ = self._raw(prompts, responses)
        scored = raw[:, ~raw.isnan().any(0)].double()
        sd = scored.std(1)
        for member, spread in zip(self.members, sd.tolist(), strict=True):
            if not spread > 0:
                raise ConfigError(
                    f"ensemble member {member.settings.model} gives all {scored.shape[1]} "
                    "reference responses the same score, so it has no scale; remove it, or set "
                    "standardize: none"
                )
        self._moments = MomentsSettings(mean=scored.mean(1).tolist(), sd=sd.tolist())
        return self._moments

    def _raw(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The members' own scores (K, B) on the CPU, and 1 where any member cut the text (B,)."""
        raw = torch.empty(len(self.members), len(responses))
        cut = torch.zeros(len(responses))
        for group, stack in self._families:
            models = [self.members[k] for k in group]
            raw[group], was_cut = score_together(models, stack, prompts, responses)
            cut = torch.maximum(cut, was_cut)
        return raw, cut
