"""Ensembles of real small models: together as alone, on one scale, and never half configured."""

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification

from klippo.errors import ConfigError, PreflightError
from klippo.rewards import stored
from klippo.rewards.build import build_reward
from klippo.rewards.classifier import ClassifierReward
from klippo.rewards.combined import Part, SumReward
from klippo.rewards.ensemble import EnsembleReward
from klippo.rewards.resolve import resolve_scores
from klippo.rewards.scorers import Stack
from klippo.rewards.settings import ClassifierSettings, EnsembleSettings
from klippo.rewards.stored import StoredReward
from tests.rewards.conftest import SENTENCES, gpt2, llama, make_rollout, roberta
from tests.tolerance import FLOAT64

IN_FLOAT64 = pytest.mark.usefixtures("in_float64")

RESPONSES = [" and the end was good.", " It rained.", "!", " a river and a road " * 3]
PROMPTS = [SENTENCES[0], SENTENCES[1], "The film", "I liked"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three GPT-2 members of one shape, and members of other architectures and tokenizers."""
    root = tmp_path_factory.mktemp("members")
    found = {}
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        found[f"gpt2_{seed}"] = gpt2(root / f"rm_seed{seed}")
    found["llama"] = llama(root / "llama")
    found["encoder"] = roberta(root / "encoder", labels=("score",))
    return root, found


def ensemble(members, **settings):
    options = {"standardize": "none"} | settings
    return EnsembleReward(
        EnsembleSettings(kind="ensemble", members=[str(m) for m in members], **options)
    )


def alone(folder, **settings):
    one = ClassifierReward(ClassifierSettings(kind="classifier", model=str(folder), **settings))
    return one.score(make_rollout(RESPONSES, prompts=PROMPTS)).reward


@IN_FLOAT64
def test_members_score_together_as_they_do_alone(folders):
    _root, found = folders
    members = [found["gpt2_1"], found["llama"], found["gpt2_2"], found["encoder"], found["gpt2_3"]]
    scores = ensemble(members).score(make_rollout(RESPONSES, prompts=PROMPTS))
    expected = torch.stack([alone(folder) for folder in members])
    torch.testing.assert_close(scores.members, expected, **FLOAT64)
    torch.testing.assert_close(scores.reward, expected.mean(0), **FLOAT64)
    torch.testing.assert_close(scores.parts["variance"], expected.var(0, correction=0), **FLOAT64)


def test_members_of_one_architecture_are_one_batched_forward(folders):
    _root, found = folders
    reward = ensemble([found["gpt2_1"], found["llama"], found["gpt2_2"], found["gpt2_3"]])
    assert [group for group, _ in reward._families] == [[0, 2, 3], [1]]
    assert reward._families[0][1]._vmapped is not None


def test_the_stack_holds_no_weight_twice(folders):
    _root, found = folders
    reward = ensemble([found["gpt2_1"], found["gpt2_2"]])
    stack = reward._families[0][1]
    for name, stacked in stack._parameters.items():
        for k, member in enumerate(stack.members):
            own = member.get_parameter(name)
            assert own.data_ptr() == stacked[k].data_ptr()


@IN_FLOAT64
def test_long_batches_run_in_turn_and_give_the_same_scores(folders, monkeypatch):
    _root, found = folders
    members = [found["gpt2_1"], found["gpt2_2"]]
    together = ensemble(members).score(make_rollout(RESPONSES, prompts=PROMPTS)).members
    monkeypatch.setattr("klippo.rewards.scorers.STACKED_ELEMENTS", 0)
    in_turn = ensemble(members).score(make_rollout(RESPONSES, prompts=PROMPTS)).members
    torch.testing.assert_close(in_turn, together, **FLOAT64)


def test_an_architecture_that_cannot_be_batched_still_works():
    class Stubborn(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(value))

        def forward(self, input_ids, mask):
            if self.weight > 0:  # a decision that depends on the weights
                return (self.weight * mask.sum(1)).float()[:, None]
            return mask.new_zeros(len(mask), 1).float()

    stack = Stack([Stubborn(1.0), Stubborn(-1.0)], width=1)
    mask = torch.tensor([[1, 1, 0]])
    assert stack(mask, mask)[:, 0, 0].tolist() == [2.0, 0.0]


@IN_FLOAT64
@pytest.mark.parametrize("ddof", [0, 1])
def test_uwo_divides_its_variance_by_the_ddof_of_the_settings(folders, ddof):
    _root, found = folders
    members = [str(found[f"gpt2_{seed}"]) for seed in (1, 2, 3)]
    settings = EnsembleSettings.model_validate(
        {
            "kind": "ensemble",
            "members": members,
            "standardize": "none",
            "objective": "UWO",
            "uwo_weight": 10.0,
            "ddof": ddof,
        }
    )
    source = build_reward(settings, device=torch.device("cpu"))
    scores = resolve_scores(source, make_rollout(RESPONSES, prompts=PROMPTS))
    raw = np.stack([alone(folder).double().numpy() for folder in members])
    expected = raw.mean(0) - 10.0 * np.var(raw, axis=0, ddof=ddof)
    other = raw.mean(0) - 10.0 * np.var(raw, axis=0, ddof=1 - ddof)
    np.testing.assert_allclose(scores.reward.numpy(), expected, **FLOAT64)
    assert np.abs(expected - other).max() > 1e-3


@IN_FLOAT64
def test_each_member_reads_text_through_its_own_tokenizer(folders):
    _root, found = folders
    scores = ensemble([found["gpt2_1"], found["llama"]]).score(
        make_rollout(RESPONSES, prompts=PROMPTS)
    )
    torch.testing.assert_close(scores.members[1], alone(found["llama"]), **FLOAT64)


@IN_FLOAT64
def test_a_member_can_be_read_in_its_own_way(folders):
    _root, found = folders
    reward = EnsembleReward(
        EnsembleSettings.model_validate(
            {
                "kind": "ensemble",
                "standardize": "none",
                "template": "{response}",
                "members": [
                    str(found["gpt2_1"]),
                    {"model": str(found["gpt2_2"]), "template": "{prompt} {response}"},
                ],
            }
        )
    )
    scores = reward.score(make_rollout(RESPONSES, prompts=PROMPTS)).members
    expected = [
        alone(found["gpt2_1"], template="{response}"),
        alone(found["gpt2_2"], template="{prompt} {response}"),
    ]
    torch.testing.assert_close(scores, torch.stack(expected), **FLOAT64)


def test_seeds_fill_the_members_names(folders):
    root, _found = folders
    by_seed = ensemble([root / "rm_seed{seed}"], seeds=[1, 3])
    assert [m.settings.model for m in by_seed.members] == [
        str(root / "rm_seed1"),
        str(root / "rm_seed3"),
    ]


@IN_FLOAT64
def test_stored_moments_put_the_members_on_one_scale(folders, tmp_path):
    _root, _found = folders
    members = []
    for k, seed in enumerate((1, 2)):
        folder = gpt2(tmp_path / f"m{seed}")
        stored.write(Path(folder), StoredReward(mean=float(k), sd=2.0 + k))
        members.append(folder)
    scores = ensemble(members, standardize="stored").score(make_rollout(RESPONSES, prompts=PROMPTS))
    expected = torch.stack([alone(members[0]) / 2, (alone(members[1]) - 1) / 3])
    torch.testing.assert_close(scores.members, expected, **FLOAT64)


@IN_FLOAT64
def test_measured_members_have_mean_zero_and_sd_one_on_what_they_were_measured_on(folders):
    _root, found = folders
    reward = ensemble([found["gpt2_1"], found["llama"]], standardize="start")
    assert reward.waits_for_moments
    rollout = make_rollout(RESPONSES, prompts=PROMPTS)
    moments = reward.measure(rollout.prompts, rollout.responses)
    assert not reward.waits_for_moments
    members = reward.score(rollout).members
    torch.testing.assert_close(members.mean(1), torch.zeros(2), **FLOAT64)
    torch.testing.assert_close(members.std(1), torch.ones(2), **FLOAT64)
    again = ensemble(
        [found["gpt2_1"], found["llama"]], standardize="start", moments=moments.model_dump()
    )
    assert not again.waits_for_moments
    torch.testing.assert_close(again.score(rollout).members, members, **FLOAT64)


@IN_FLOAT64
def test_standardised_worst_case_does_not_follow_the_member_with_the_lowest_offset(tmp_path):
    """The same model, once 100 lower, is not the minimum once both are standardised."""
    folders = []
    for offset in (0.0, -100.0):
        torch.manual_seed(1)
        folder = roberta(tmp_path / f"offset{-offset:.0f}", labels=("score",))
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        with torch.no_grad():
            model.classifier.out_proj.bias += offset
        model.save_pretrained(folder)
        stored.write(Path(folder), StoredReward(mean=offset, sd=1.0))
        folders.append(folder)
    rollout = make_rollout(RESPONSES, prompts=PROMPTS)
    raw = ensemble(folders, objective="WCO").score(rollout)
    assert raw.reward.tolist() == raw.members[1].tolist()
    fair = ensemble(folders, objective="WCO", standardize="stored").score(rollout)
    torch.testing.assert_close(fair.members[0], fair.members[1], **FLOAT64)


@IN_FLOAT64
def test_a_sum_passes_its_ensembles_members_on(folders):
    _root, found = folders
    inner = ensemble([found["gpt2_1"], found["gpt2_2"]])
    rollout = make_rollout(RESPONSES, prompts=PROMPTS)
    total = SumReward({"e": Part(source=inner, weight=2.0)}).score(rollout)
    torch.testing.assert_close(total.members, inner.score(rollout).members, **FLOAT64)
    torch.testing.assert_close(total.reward, 2 * inner.score(rollout).reward, **FLOAT64)
    assert set(total.parts) == {"e", "e/variance", "e/cut"}


def test_an_empty_text_is_unscored(folders):
    _root, found = folders
    reward = ensemble([found["gpt2_1"], found["gpt2_2"]], reads="response")
    scores = reward.score(make_rollout(["", " good"], prompts=["a", "b"]))
    assert scores.reward.isnan().tolist() == [True, False]


# Bad input


def problems(**settings):
    with pytest.raises(ValidationError) as error:
        EnsembleSettings.model_validate({"kind": "ensemble"} | settings)
    return str(error.value)


def test_an_unknown_objective_is_refused():
    assert "objective" in problems(members=["a"], objective="WOC")


def test_uwo_without_its_weight_is_refused():
    assert "uwo_weight is missing: objective=UWO" in problems(members=["a"], objective="UWO")


def test_an_unfilled_seed_is_refused():
    text = problems(members=["models/rm_seed{seed}"])
    assert "models/rm_seed{seed}: nothing fills {seed}; add seeds" in text


def test_seeds_that_fill_nothing_are_refused():
    assert "no member's name contains {seed}" in problems(members=["models/rm"], seeds=[1])


def test_the_same_member_twice_is_refused():
    assert "rm_seed1 is there twice" in problems(members=["rm_seed{seed}", "rm_seed1"], seeds=[1])


def test_one_member_has_no_unbiased_variance():
    assert "ddof=1 needs at least 2 members" in problems(members=["a"], ddof=1)


def test_moments_for_another_number_of_members_are_refused():
    text = problems(members=["a", "b"], moments={"mean": [0.0], "sd": [1.0, 1.0]})
    assert "moments.mean must have one number per member, 2" in text


def test_a_member_without_stored_moments_says_what_to_do(folders):
    _root, found = folders
    with pytest.raises(ConfigError, match=re.escape("has no stored mean and standard deviation")):
        ensemble([found["gpt2_1"]], standardize="stored")


def test_a_member_folder_without_weights_is_named(folders, tmp_path):
    _root, found = folders
    empty = tmp_path / "rm_seed9"
    gpt2(empty)
    (empty / "model.safetensors").unlink()
    with pytest.raises(PreflightError, match="rm_seed9"):
        ensemble([found["gpt2_1"], empty])


def test_a_broken_moments_file_is_named(tmp_path):
    folder = gpt2(tmp_path / "m")
    (Path(folder) / stored.STORED_FILE).write_text(json.dumps({"mean": 0.0, "sd": 0.0}))
    with pytest.raises(PreflightError, match=r"sd=0\.0 must be above 0"):
        ensemble([folder])


def test_a_member_without_any_spread_has_no_scale(folders, tmp_path):
    folder = llama(tmp_path / "flat")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.zero_()
    model.save_pretrained(folder)
    rollout = make_rollout(RESPONSES, prompts=PROMPTS)
    with pytest.raises(ConfigError, match="the same score, so it has no scale"):
        ensemble([folder], standardize="start").measure(rollout.prompts, rollout.responses)


def test_stored_files_come_back_as_they_were_written(tmp_path):
    one = StoredReward(template="alpaca", mean=-1.5, sd=0.25, num_samples=7, policy="p", seed=3)
    stored.write(tmp_path, one)
    assert stored.read(str(tmp_path)) == one
    assert copy.copy(one) == one
    assert math.isclose(one.sd or 0, 0.25)
