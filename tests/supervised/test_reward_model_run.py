"""`klippo reward-model` end to end on tiny models."""

import json

import pytest

from klippo.config.load import load_config
from klippo.rewards import stored
from klippo.rewards.ensemble import EnsembleReward
from klippo.rewards.settings import EnsembleSettings
from klippo.supervised.settings import RewardModelConfig
from tests.supervised.conftest import PAIRS
from tests.tolerance import FLOAT64_APPROX


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


@pytest.fixture
def reward_model(cli, gpt2, pairs_file, prompts_file, tmp_path):
    """Run the command on the toy pairs: (exit code, stdout, stderr)."""

    def run(*arguments, **sections):
        config = {
            "output_dir": str(tmp_path / "rm"),
            "device": "cpu",
            "seeds": [1, 2],
            "model": {"name": str(gpt2)},
            "data": {"train": str(pairs_file), "validation_size": 8},
            "training": {"num_epochs": 4, "batch_size": 16, "learning_rate": 1e-2},
            "reference": {
                "policy": str(gpt2),
                "prompts": str(prompts_file),
                "num_samples": 20,
                "response_length": 6,
            },
        }
        path = tmp_path / "toy.yaml"
        path.write_text(json.dumps(config | sections))
        return cli("reward-model", path, *arguments)

    return run


def test_an_ensemble_is_trained_measured_and_ready_to_be_a_reward(reward_model, tmp_path):
    code, out, err = reward_model()
    assert code == 0, err
    summary = json.loads((tmp_path / "rm_members.json").read_text())
    assert [m["seed"] for m in summary["members"]] == [1, 2]
    assert [m["held_out"]["accuracy"] for m in summary["members"]] == [1, 1]
    assert summary["ensemble"]["held_out"]["accuracy"] == 1
    assert summary["ensemble"]["standardized"]
    assert "| ensemble | 1.000 (" in (tmp_path / "rm_members.md").read_text()
    assert (tmp_path / "rm_reliability.svg").is_file()
    for seed in (1, 2):
        own = stored.read(str(tmp_path / f"rm_seed{seed}"))
        assert (own.seed, own.num_samples, own.template) == (seed, 20, "{prompt}{response}")
        assert own.sd > 0
        metrics = json.loads((tmp_path / f"rm_seed{seed}/metrics.json").read_text())
        assert metrics["held_out"] == summary["members"][seed - 1]["held_out"]
    settings = EnsembleSettings(
        kind="ensemble", members=[str(tmp_path / "rm_seed{seed}")], seeds=[1, 2]
    )
    assert len(EnsembleReward(settings).members) == 2
    assert f"members: ['{tmp_path}/rm_seed{{seed}}'], seeds: [1, 2]" in out


@pytest.mark.usefixtures("in_float64")
def test_the_reference_moments_are_those_of_shared_samples(reward_model, tmp_path):
    from klippo.ranks import choose_device
    from klippo.rewards.classifier import ClassifierReward
    from klippo.rewards.settings import ClassifierSettings
    from klippo.supervised.reward_model import sample_reference

    assert reward_model(training={"batch_size": 16})[0] == 0
    config = load_config(tmp_path / "rm_seed1/config.yaml", schema=RewardModelConfig).config
    first = sample_reference(config.reference, choose_device("cpu"))
    again = sample_reference(config.reference, choose_device("cpu"))
    assert first.responses == again.responses
    assert len(first) == 20
    for seed in (1, 2):
        folder = str(tmp_path / f"rm_seed{seed}")
        reward = ClassifierReward(ClassifierSettings(kind="classifier", model=folder))
        scores = reward.score(first).reward.double()
        own = stored.read(folder)
        assert own.mean == pytest.approx(float(scores.mean()), **FLOAT64_APPROX)
        assert own.sd == pytest.approx(float(scores.std()), **FLOAT64_APPROX)


def test_whole_members_are_kept_and_missing_ones_trained(reward_model, tmp_path):
    quick = {"training": {"batch_size": 16}, "reference": None}
    assert reward_model(seeds=[1], **quick)[0] == 0
    before = (tmp_path / "rm_seed1/model.safetensors").stat().st_mtime_ns
    code, out, err = reward_model(seeds=[1, 2], **quick)
    assert code == 0, err
    assert "rm_seed1 is there already; --overwrite trains it again" in out.replace("\n", "")
    assert (tmp_path / "rm_seed1/model.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "rm_seed2/model.safetensors").is_file()
    assert reward_model("--overwrite", "--quiet", seeds=[1], **quick)[0] == 0
    assert (tmp_path / "rm_seed1/model.safetensors").stat().st_mtime_ns != before


def test_a_member_of_other_settings_or_pairs_is_not_taken_for_this_one(
    reward_model, tmp_path, pairs_file
):
    quick = {"training": {"batch_size": 16}, "reference": None, "seeds": [1]}
    assert reward_model(**quick)[0] == 0
    code, _, err = reward_model("data.label_noise=0.25", **quick)
    assert code == 2
    assert "other settings (data.label_noise=0.0, now 0.25)" in err
    pairs_file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS[::-1]))
    code, _, err = reward_model(**quick)
    assert code == 2
    assert "was trained on other pairs" in err
    assert reward_model("--overwrite", **quick)[0] == 0


def test_a_single_seed_has_a_folder_of_its_own_too(reward_model, tmp_path):
    single = {"training": {"batch_size": 16}, "reference": None, "seeds": None}
    code, out, err = reward_model("seed=7", "data.validation_size=0", **single)
    assert code == 0, err
    assert stored.read(str(tmp_path / "rm_seed7")).mean is None
    assert "Nothing was held out" in out
    assert "{kind: classifier, model:" in out


def test_a_folder_that_is_not_ours_is_left_alone(reward_model, tmp_path):
    (tmp_path / "rm_seed2").mkdir()
    (tmp_path / "rm_seed2/thesis.tex").write_text("years of work")
    for flags in ((), ("--overwrite",)):
        code, _, err = reward_model(*flags)
        assert code == 2
        assert "is not a reward model that Klippo trained" in err
    assert (tmp_path / "rm_seed2/thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "rm_seed1").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seeds=[1, 2, 1]"], "1 is there twice"),
        (["data.label_noise=0.7"], "label_noise"),
        (["data.chosen_column=choosen"], "did you mean 'chosen'?"),
        (["training.micro_batch_size=3"], "must divide batch_size=16; try 2"),
        (["model.name=/nowhere"], "the model cannot be loaded"),
        (["template='{prompt}'"], "does not contain {response}"),
        (["max_tokens=1000"], "reads at most 64 tokens"),
    ],
)
def test_bad_input_is_refused_in_one_clear_error(reward_model, arguments, message, tmp_path):
    code, _, err = reward_model(*arguments, reference=None)
    assert code in (2, 3)
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("rm_*"))
    assert not list(tmp_path.glob(".rm*"))


def test_several_processes_are_refused(reward_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = reward_model()
    assert code == 3
    assert "runs in one process" in err
