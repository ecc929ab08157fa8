"""Duels, groups and the change of the probabilities, on cases counted by hand."""

import pytest
import torch

from klippo.evaluation.comparison import (
    Answer,
    Match,
    by_group,
    compare_answers,
    duel,
    output_change,
    style_values,
)
from klippo.policy.actor_critic import CausalLM
from tests.tolerance import FLOAT64_APPROX
from tests.toys import RAGGED, dense_logprobs, disturb, gpt2, make_rollout


def answers(scores, groups=None):
    return [
        Answer(prompt_id=i, prompt="", group=groups[i] if groups else "", text="", values={"m": s})
        for i, s in enumerate(scores)
    ]


def test_differences_are_paired_and_leave_out_what_has_no_score() -> None:
    group = compare_answers(answers([1.0, 2.0, None]), answers([2.0, 4.0, 9.0]), {})
    found = group.measures["m"]
    assert (found.before.mean, found.after.mean, found.difference.mean) == (1.5, 3.0, 1.5)
    # Differences 1 and 2: sd 0.7071, t(1 df) = 12.706, half width 12.706 * 0.7071 / sqrt(2).
    assert found.difference.low == pytest.approx(1.5 - 6.353, abs=1e-3)
    assert (group.num_prompts, found.difference.num) == (3, 2)


def test_groups_show_a_change_that_the_whole_hides() -> None:
    kinds = ["right = true", "right = true", "right = false", "right = false"]
    before, after = answers([1.0, 1.0, 0.0, 0.0], kinds), answers([0.0, 0.0, 1.0, 1.0], kinds)
    margins = [Match(margin=m) for m in (-1.0, -1.0, 1.0, 0.0)]
    assert compare_answers(before, after, {}).measures["m"].difference.mean == 0
    found = by_group(before, after, {"d": margins})
    assert {key: one.measures["m"].difference.mean for key, one in found.items()} == {
        "right = false": 1,
        "right = true": -1,
    }
    assert found["right = true"].duels["d"].num_lost == 2
    assert found["right = false"].duels["d"].win_rate.mean == 0.75
    assert by_group(answers([1.0]), answers([1.0]), {}) == {}


def test_a_duel_counts_draws_as_halves_and_orders_that_disagree() -> None:
    found = duel(
        [
            Match(margin=0.4, num_questions=2, num_turned=1),
            Match(margin=0.2, num_questions=2),
            Match(margin=0.0),
            Match(margin=-1.0),
            Match(margin=None),
        ]
    )
    assert found is not None
    assert (found.num_won, found.num_drawn, found.num_lost, found.num_unjudged) == (2, 1, 1, 1)
    assert found.win_rate.mean == 0.625
    assert found.turned_share == 0.25
    assert duel([Match(margin=None)]) is None


def test_length_counts_the_stop_token() -> None:
    values = style_values(make_rollout(RAGGED), 0)
    assert (values["length"], values["finished"]) == (4, 1)


def test_the_change_of_the_probabilities_is_that_of_the_models_own_logits() -> None:
    before, after = gpt2(), gpt2()
    disturb(after.parameters(), 0.05)
    old, new = make_rollout(RAGGED[:2]), make_rollout(RAGGED[2:])
    found = output_change(CausalLM(before), CausalLM(after), old, new, batch_size=1)
    with torch.no_grad():
        kls = [
            (p.exp() * (p - dense_logprobs(before, *row))).sum()
            for row in RAGGED[2:]
            for p in [dense_logprobs(after, *row)]
        ]
        moved = [
            (dense_logprobs(after, *row) - dense_logprobs(before, *row))
            .gather(1, torch.tensor(row[1])[:, None])
            .abs()
            .mean()
            for row in RAGGED[:2]
        ]
    assert found.kl.mean == pytest.approx(float(sum(kls)) / 2, **FLOAT64_APPROX)
    assert found.logprob.mean == pytest.approx(float(sum(moved)) / 2, **FLOAT64_APPROX)
    same = output_change(CausalLM(before), CausalLM(before), old, new, batch_size=2)
    assert same.kl.mean == pytest.approx(0, **FLOAT64_APPROX)
    assert same.logprob.mean == 0
