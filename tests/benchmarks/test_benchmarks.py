"""The benchmark's own arm runs, and its page says what the results files say."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A byte-level tokenizer without merges: every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(
        models.BPE(vocab={text: i for i, text in enumerate(special + alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("critic", ["trunk", "separate"])
def test_klippo_arm_runs_the_whole_workload_in_miniature(critic, tokenizer_folder):
    import klippo_ppo
    from workload import Shape, Workload

    tiny = Workload(
        shape=Shape(num_layers=1, width=16, num_heads=2, context=128),
        batch_size=8,
        response_length=6,
        num_epochs=2,
        num_minibatches=2,
        num_threads=1,
    )

    result = klippo_ppo.run(tiny, tokenizer_folder, critic=critic, updates=2)

    assert len(result["seconds"]) == 2
    assert result["response_length"] == [6.0], "responses are of full length, as in TRL's arm"
    assert result["optimizer_steps_per_update"] == [4.0]
    assert result["response_tokens_per_s"] > 0
    assert set(result["phase_medians_s"]) == {"generate", "forward", "score", "update"}


def test_benchmark_page_says_what_the_results_files_say():
    import page

    assert page.PAGE.read_text(encoding="utf-8") == page.render(page.load_results())


def test_every_round_compares_like_with_like():
    import page

    comparisons = [one for one in page.load_results() if one["kind"] in ("ppo", "large_model")]

    assert comparisons
    for result in comparisons:
        length = result["workload"]["response_length"]
        for done in result["rounds"]:
            for arm in done.values():
                assert arm["response_length"] == [length]
                assert arm["optimizer_steps_per_update"] == [4.0]
                assert arm["num_threads"] == 2
                assert set(arm["phase_medians_s"]) == {"generate", "forward", "score", "update"}


def test_ensembles_score_as_their_members_do_alone(tmp_path, monkeypatch, capsys):
    """The script on its smallest case: it measures what it says, and the scores agree."""
    import json

    import ensemble_scoring

    monkeypatch.setattr(ensemble_scoring, "SHAPES", ((16, 1),))
    monkeypatch.setattr(ensemble_scoring, "BATCHES", (4,))
    monkeypatch.setattr(sys, "argv", ["x", "--pairs", "2", "--out", str(tmp_path / "r.json")])
    ensemble_scoring.main()
    (case,) = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert case["stacked"]
    assert case["largest_difference"] <= 1e-5
    assert case["ensemble_ms"] > 0
    assert "ratio" in capsys.readouterr().out


def test_smollm_page_says_what_its_results_file_says():
    import importlib.util
    import json

    script = BENCHMARKS.parent / "experiments" / "smollm" / "run.py"
    spec = importlib.util.spec_from_file_location("smollm_run", script)
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)

    results = json.loads(run.RESULTS.read_text(encoding="utf-8"))

    assert run.README.read_text(encoding="utf-8") == run.render(results)


@pytest.mark.slow
def test_judging_while_sampling_takes_less_than_three_quarters_of_the_time():
    import judge_overlap

    case = {"response_length": [4, 40], "generation_batch_size": 8}
    result = judge_overlap.measure(case, repeats=3)

    assert result["sampled_ratio"] < 0.75, result
