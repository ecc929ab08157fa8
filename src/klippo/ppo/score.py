"""What happens to a score between the reward source and the last token.

B sequences. The order is fixed: missing end-of-sequence, running normalisation, scale, whitening,
clip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klippo.ppo.settings import ScoreSettings
from klippo.tensors.masked import AllSum, local, whiten
from klippo.tensors.moments import RunningMoments


def shape_scores(
    settings: ScoreSettings,
    scores: Tensor,
    finished: Tensor,
    moments: RunningMoments,
    all_sum: AllSum = local,
) -> Tensor:
    """Shaped scores (B,) float32; NaN stays NaN and enters no statistic.

    scores (B,) with NaN for "unscored"; finished (B,) is False where the length limit cut the
    response. `moments` takes in the batch when running normalisation is on.
    """
    if settings.missing_eos == "replace":
        value = torch.full_like(scores, settings.missing_eos_value)
        scores = torch.where(finished | scores.isnan(), scores, value)
    elif settings.missing_eos == "subtract":
        scores = torch.where(finished, scores, scores - settings.missing_eos_value)
    if settings.normalize:
        moments.update(scores[~scores.isnan()], all_sum)
        scores = moments.standardize(scores)
    scores = scores * settings.scale
    if settings.whiten:
        scored = ~scores.isnan()
        whitened = whiten(scores.nan_to_num(0.0), scored, shift_mean=False, all_sum=all_sum)
        scores = torch.where(scored, whitened, scores)
    if settings.clip is not None:
        scores = scores.clamp(-settings.clip, settings.clip)
    return scores
