"""The share of repeated n-grams, against counting them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klippo.tensors.estimators import repeated_share
from tests.tolerance import float32_approx


def counted(ids, ngram):
    grams = [tuple(ids[i : i + ngram]) for i in range(len(ids) - ngram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from([1, 50_000]),
)
def test_it_is_what_counting_gives_whatever_stands_in_the_padding(rows, ngram, scale):
    width = max(1, *map(len, rows))
    ids = torch.full((len(rows), width), 1)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    found = repeated_share(ids * scale, mask, ngram)
    assert found.tolist() == pytest.approx(
        [counted(row, ngram) for row in rows], **float32_approx(2)
    )
