"""`klippo gold-eval`: gold for recorded samples, never twice, never at the cost of a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2ForSequenceClassification

from klippo.runs.folder import read_rows, write_rows
from tests.small_models import word_tokenizer

SECOND = "def length(responses):\n    return [float(len(r.split())) for r in responses]\n"


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> Path:
    """A reward model with one output."""
    folder = tmp_path_factory.mktemp("reward") / "gold"
    tokenizer = word_tokenizer(pad=True, classifier=True)
    torch.manual_seed(3)
    GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2,
            num_labels=1, pad_token_id=1, initializer_range=0.3,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def row(step: int, prompt: int, **more: object) -> dict:
    """A row as klippo train writes it."""
    return {
        "step": step,
        "episodes": step * 16,
        "prompt_id": prompt,
        "prompt": f"the film {prompt}",
        "response": "good " * (prompt % 3 + step) + "dull",
        "response_ids": [1, 2],
        "length": 2,
        "finished": True,
        "proxy": float(prompt + step),
        "kl_k1_nats": 0.1,
        "kl_exact_nats": 0.5 * step,
        "columns": {"prompt": f"the film {prompt}", "weight": prompt},
    } | more


@pytest.fixture
def recorded(tmp_path) -> Path:
    """The evaluations of a run of two steps, 20 prompts each."""
    for step in (0, 2):
        write_rows(tmp_path / f"run/eval/step-{step}.jsonl", [row(step, p) for p in range(20)])
    return tmp_path / "run"


@pytest.fixture
def counting(tmp_path) -> Path:
    """Counts "good" and writes down how many responses it was asked about."""
    path = tmp_path / "counting.py"
    path.write_text(
        "from pathlib import Path\n"
        "def good(responses):\n"
        "    with Path(__file__).with_name('calls').open('a') as file:\n"
        "        file.write(f'{len(responses)}\\n')\n"
        "    return [float(r.split().count('good')) for r in responses]\n" + SECOND
    )
    return path


def calls(counting: Path) -> list[int]:
    file = counting.with_name("calls")
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def test_gold_goes_into_the_same_rows_with_the_name_of_its_model(cli, recorded, counting):
    before = read_rows(recorded / "eval/step-2.jsonl")
    code, out, err = cli("gold-eval", recorded, f"{counting}:good")
    assert code == 0, err
    after = read_rows(recorded / "eval/step-2.jsonl")
    assert [r["gold"] for r in after] == [2 + p % 3 for p in range(20)]
    assert {r.pop("gold_model") for r in after} == {f"{counting}:good"}
    assert [{k: v for k, v in r.items() if k != "gold"} for r in after] == before
    # Gold rises by 2 with the step, for every prompt alike; 19 / 20 is the mean of p % 3.
    assert "+0.950" in out
    assert "+2.950" in out
    assert "Improved. Gold changed by +2.00 (95%: +2.00 to +2.00)" in out


def test_the_eval_folder_will_do_and_nothing_is_scored_twice(cli, recorded, counting, monkeypatch):
    assert cli("gold-eval", recorded / "eval", f"{counting}:good")[0] == 0
    assert calls(counting) == [20, 20]
    code, out, _ = cli("gold-eval", recorded, f"{counting}:good")
    assert code == 0
    assert "already" in out
    rows = read_rows(recorded / "eval/step-2.jsonl")
    write_rows(recorded / "eval/step-2.jsonl", [rows[0], row(2, 1), *rows[2:]])
    assert cli("gold-eval", recorded, f"{counting}:good")[0] == 0
    assert calls(counting) == [20, 20, 1]
    (recorded / "run_status.json").write_text('{"state": "running"}')
    monkeypatch.chdir(recorded / "eval")
    assert "still going on" in cli("gold-eval", ".", f"{counting}:good")[1]


def test_a_reward_model_reads_batches_through_a_template(cli, recorded, reward_model):
    assert cli("gold-eval", recorded, reward_model)[0] == 0
    plain = [r["gold"] for r in read_rows(recorded / "eval/step-0.jsonl")]
    code, _, err = cli("gold-eval", recorded, reward_model, "--is-alpacafarm-rm")
    assert code == 2
    assert f"gold score by {reward_model}, and scores by {reward_model} (template: alpaca)" in err
    assert "--overwrite" in err
    code, _, err = cli(
        "gold-eval", recorded, reward_model, "--is-alpacafarm-rm", "--batch-size", 3, "--overwrite"
    )
    assert code == 0, err
    alpaca = [r["gold"] for r in read_rows(recorded / "eval/step-0.jsonl")]
    assert all(a != b for a, b in zip(plain, alpaca, strict=True))


def test_a_function_reads_the_columns_that_the_rows_hold(cli, recorded, tmp_path):
    path = tmp_path / "columns.py"
    path.write_text("def own(weight, prompts):\n    return [w + 0.5 for w in weight]\n")
    assert cli("gold-eval", recorded, f"{path}:own")[0] == 0
    rows = read_rows(recorded / "eval/step-0.jsonl")
    assert [r["gold"] for r in rows] == [p + 0.5 for p in range(20)]
    path.write_text("def other(colour):\n    return [0.0 for _ in colour]\n")
    code, _, err = cli("gold-eval", recorded, f"{path}:other", "--overwrite")
    assert code == 2
    assert "needs the argument 'colour', and there are only prompts, responses" in err


def test_a_yaml_file_names_any_reward(cli, recorded, reward_model, tmp_path):
    section = {"kind": "ensemble", "members": [str(reward_model)], "standardize": "none"}
    (tmp_path / "gold.yaml").write_text(yaml.safe_dump(section))
    code, _, err = cli("gold-eval", recorded, tmp_path / "gold.yaml")
    assert code == 0, err
    name = read_rows(recorded / "eval/step-0.jsonl")[0]["gold_model"]
    assert name.startswith(f"mean of {reward_model} #")
    several = {"first": section, "second": {"kind": "length", "max_tokens": 1}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(several))
    code, _, err = cli("gold-eval", recorded, tmp_path / "two.yaml")
    assert code == 2
    assert "holds several rewards (first, second); say which" in err
    code, _, err = cli("gold-eval", recorded, f"{tmp_path / 'two.yaml'}:second", "--overwrite")
    assert code == 0, err
    assert read_rows(recorded / "eval/step-0.jsonl")[0]["gold"] == -1


def test_a_wrong_reward_section_is_reported_with_its_line(cli, recorded, tmp_path):
    (tmp_path / "gold.yaml").write_text("kind: classifier\nmodle: x\n")
    code, _, err = cli("gold-eval", recorded, tmp_path / "gold.yaml")
    assert code == 2
    assert "gold.yaml:2: rewards.gold.modle: unknown key; did you mean model?" in err


def test_a_language_model_is_refused_before_its_weights_are_read(cli, recorded, gpt2):
    code, _, err = cli("gold-eval", recorded, gpt2)
    assert code == 3
    assert "is a language model without a score head (GPT2LMHeadModel)" in err


@pytest.mark.parametrize("name", ["nowhere", "demo:policies", "no_module:f", "nowhere.py:f"])
def test_a_gold_model_that_does_not_exist_changes_nothing(cli, recorded, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = (recorded / "eval/step-0.jsonl").read_bytes()
    code, _, err = cli("gold-eval", recorded, name)
    assert code in (2, 3)
    assert "bug" not in err
    assert (recorded / "eval/step-0.jsonl").read_bytes() == before


def test_a_folder_without_evaluations_is_an_error(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = cli("gold-eval", tmp_path / "empty", "demo:gold")
    assert code == 2
    assert "has no evaluations (step-N.jsonl); give a run's folder" in err
    assert "is not a folder" in cli("gold-eval", tmp_path / "none", "demo:gold")[2]


def test_a_cut_file_is_named_with_its_line(cli, recorded, counting):
    file = recorded / "eval/step-2.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    code, _, err = cli("gold-eval", recorded, f"{counting}:good")
    assert code == 2
    assert f"{file}, line 20: broken JSON; the file was cut while it was written; remove" in err
    assert calls(counting) == []
    file.write_bytes(whole.replace(b'{"step": 2', b"{'step': 2", 1))
    assert f"{file}, line 1: broken JSON; fix" in cli("gold-eval", recorded, f"{counting}:good")[2]


def test_of_a_run_that_goes_on_the_whole_files_are_scored(cli, recorded, counting):
    (recorded / "run_status.json").write_text('{"state": "running"}')
    file = recorded / "eval/step-2.jsonl"
    cut = file.read_bytes()[:-40]
    file.write_bytes(cut)
    code, out, err = cli("gold-eval", recorded, f"{counting}:good")
    assert code == 0, err
    assert "still going on" in out
    assert "line 20 is not complete" in out.replace("\n", "")
    assert calls(counting) == [20]
    assert file.read_bytes() == cut
    assert json.loads((recorded / "run_status.json").read_text()) == {"state": "running"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"members": [1.0]}, "has members, unlike"),
        ({"response_ids": "1 2"}, "response_ids missing or of the wrong type"),
        ({"gold": 1.0}, "by a reward that the rows do not name"),
    ],
)
def test_rows_of_other_runs_and_versions_are_refused(cli, recorded, counting, change, told):
    rows = read_rows(recorded / "eval/step-2.jsonl")
    write_rows(recorded / "eval/step-2.jsonl", [*rows[:4], rows[4] | change, *rows[5:]])
    code, _, err = cli("gold-eval", recorded, f"{counting}:good")
    assert code == 2
    assert "step-2.jsonl, line 5: " in err
    assert told in err
    assert calls(counting) == []


def test_a_kill_loses_no_more_than_a_chunk(recorded, tmp_path):
    write_rows(recorded / "eval/step-0.jsonl", [row(0, p) for p in range(600)])
    write_rows(recorded / "eval/step-2.jsonl", [row(2, p) for p in range(600)])
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\nfrom pathlib import Path\n"
        "def score(responses):\n"
        "    with Path(__file__).with_name('calls').open('a') as file:\n"
        "        file.write(f'{len(responses)}\\n')\n"
        "    if len(Path(__file__).with_name('calls').read_text().split()) == 3:\n"
        "        time.sleep(60)\n"
        "    return [1.0] * len(responses)\n"
    )
    command = [sys.executable, "-m", "klippo", "gold-eval", str(recorded), f"{slow}:score"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 60
    while len(calls(slow)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert calls(slow) == [256, 256, 88]
    scored = [sum("gold" in r for r in read_rows(f)) for f in (recorded / "eval").glob("step-*")]
    assert sorted(scored) == [0, 512]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert calls(slow) == [256, 256, 88, 88, 256, 256, 88]


def test_gold_weights_are_read_after_the_last_step_and_a_typo_before_the_first(
    cli, write_config, reward_model, tmp_path, monkeypatch
):
    from klippo.rewards import classifier

    steps_at_loading = []

    def load(*arguments, original=classifier.load_scorer):
        metrics = tmp_path / "run/metrics.jsonl"
        steps_at_loading.append(len(read_rows(metrics)) if metrics.exists() else 0)
        return original(*arguments)

    monkeypatch.setattr(classifier, "load_scorer", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    gold = {"kind": "classifier", "model": str(reward_model)}
    wrong = gold | {"model": str(reward_model) + "s"}
    code, _, _ = cli("train", write_config(gold=wrong))
    assert code == 3
    assert not (tmp_path / "run").exists()
    assert cli("train", write_config(gold=gold))[0] == 0
    assert steps_at_loading == [3]


def test_a_gold_reward_that_fails_after_training_loses_nothing(cli, write_config, tmp_path):
    path = tmp_path / "late.py"
    path.write_text(
        "from pathlib import Path\n"
        "def gold(responses, colour='red'):\n"
        "    if not Path(__file__).with_name('mended').exists():\n"
        "        raise RuntimeError('the service is down')\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    gold = {"kind": "function", "function": f"{path}:gold"}
    code, _, err = cli("train", write_config(gold=gold))
    assert code == 4
    assert "The run is done and its model is saved" in err
    status = json.loads((tmp_path / "run/run_status.json").read_text())
    assert status["state"] == "done"
    assert "proxy" in status["before_after"]
    assert status["gold"]["state"] == "missing"
    assert "the service is down" in status["gold"]["reason"]
    assert (tmp_path / "run/model/config.json").is_file()
    assert (tmp_path / "run/before_after.md").is_file()
    (tmp_path / "mended").touch()
    command = status["gold"]["command"].split()
    assert command[:2] == ["klippo", "gold-eval"]
    code, _, err = cli(*command[1:])
    assert code == 0, err
    status = json.loads((tmp_path / "run/run_status.json").read_text())
    assert status["gold"] == {"state": "done", "model": f"{path}:gold"}
    assert "gold" in status["before_after"]
    assert "gold" in (tmp_path / "run/before_after.md").read_text()


def test_gold_eval_of_a_run_gives_what_the_run_itself_gives(cli, write_config, tmp_path):
    """With a template and other columns, which rows must hold for it."""
    path = tmp_path / "columns.py"
    path.write_text(
        "def gold(responses, label, instruction):\n"
        "    return [len(r) + 100 * l + len(i) for r, l, i in "
        "zip(responses, label, instruction)]\n"
    )
    data_file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"the film {'good ' * i}", "label": i} for i in range(16)]
    data_file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"train": str(data_file), "prompt_column": "instruction", "template": "I {prompt} was"}
    gold = {"kind": "function", "function": f"{path}:gold"}
    assert cli("train", write_config(data=data, gold=gold))[0] == 0
    file = tmp_path / "run/eval/step-3.jsonl"
    own = read_rows(file)
    assert own[0]["prompt_content"] == rows[own[0]["prompt_id"]]["instruction"]
    write_rows(file, [{k: v for k, v in r.items() if not k.startswith("gold")} for r in own])
    assert cli("gold-eval", tmp_path / "run", f"{path}:gold")[0] == 0
    assert read_rows(file) == own
    write_rows(file, [{k: v for k, v in r.items() if k != "prompt_content"} for r in own])
    code, _, err = cli("gold-eval", tmp_path / "run", f"{path}:gold")
    assert code == 2
    assert "gold would read it twice" in err


def test_a_kill_while_a_run_scores_gold_leaves_it_done(cli, write_config, tmp_path):
    path = tmp_path / "killer.py"
    path.write_text(
        "import os, signal\ndef gold(responses):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    config = write_config(gold={"kind": "function", "function": f"{path}:gold"})
    command = [sys.executable, "-m", "klippo", "train", str(config)]
    done = subprocess.run(command, capture_output=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    status = json.loads((tmp_path / "run/run_status.json").read_text())
    assert status["state"] == "done"
    assert status["gold"]["state"] == "missing"
    path.write_text("def gold(responses):\n    return [1.0 for _ in responses]\n")
    assert cli(*status["gold"]["command"].split()[1:])[0] == 0
    status = json.loads((tmp_path / "run/run_status.json").read_text())
    assert status["gold"]["state"] == "done"
    assert status["before_after"]["gold"]["after"] == 1
