"""How much a response repeats itself.

B sequences, T response tokens.
"""

import torch
from torch import Tensor


def repeated_share(ids: Tensor, mask: Tensor, ngram: int) -> Tensor:
    """Share of a response's n-grams that occurred in it before, (B,) float32 from 0 to below 1.

        1 - (different n-grams) / (n-grams)

    which is seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319), section 4. ids: (B, T) int64;
    mask: (B, T) bool, real tokens first. A response shorter than one n-gram gets 0.
    """
    width = ids.shape[1] - ngram + 1
    if width < 1:
        return torch.zeros(len(ids), device=ids.device)
    names = ids[:, :width]  # one number per n-gram, equal for equal ones
    for place in range(1, ngram):
        pairs = names * (ids.max() + 1) + ids[:, place : place + width]
        names = torch.unique(pairs, return_inverse=True)[1].reshape(pairs.shape)
    whole = mask[:, ngram - 1 :]
    none_alike = -1 - torch.arange(width, device=ids.device)
    ordered = torch.where(whole, names, none_alike).sort(1).values
    num_repeated = (ordered[:, 1:] == ordered[:, :-1]).sum(1)
    return num_repeated / whole.sum(1).clamp(min=1)
