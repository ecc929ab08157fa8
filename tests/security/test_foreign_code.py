"""Code and pickles that come with a model do not run, unless config and flag both say so."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from klippo import PPOTrainer
from klippo.config.load import load_config
from klippo.errors import ConfigError, PreflightError
from tests.security.conftest import Trap, edit

REFUSED = "needs Python code of its own"


def reward_of(model: Path, **more: object) -> dict[str, object]:
    return {"kind": "classifier", "model": str(model), "label": "POSITIVE"} | more


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_a_policys_code_is_not_run(cli, write_config, own_policy, canary, tmp_path, option) -> None:
    code, _, err = cli("train", write_config(policy={"model": str(own_policy)}), *option)
    assert code == 3
    assert f"{own_policy}: {REFUSED}" in err
    assert "trust_remote_code: true" in err
    assert "--trust-remote-code" in err
    assert not canary.exists()
    assert not (tmp_path / "run").exists()


def test_nobody_is_asked(cli, write_config, own_policy, canary, monkeypatch) -> None:
    """Left to itself, transformers asks whoever sits at the terminal whether to run the code."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert cli("train", write_config(policy={"model": str(own_policy)}))[0] == 3
    assert not canary.exists()


def test_the_code_of_a_reward_model_is_not_run(cli, write_config, own_reward, canary) -> None:
    for reward in (
        reward_of(own_reward),
        {"kind": "ensemble", "members": [str(own_reward), "demo:gold"], "standardize": "none"},
        {"kind": "sum", "parts": {"a": {"reward": reward_of(own_reward)}}},
    ):
        code, _, err = cli("train", write_config(reward=reward))
        assert (code, REFUSED in err) == (3, True), err
    code, _, err = cli("train", write_config(gold=reward_of(own_reward)))
    assert (code, REFUSED in err) == (3, True), err
    critic = {"kind": "separate", "model": str(own_reward)}
    code, _, err = cli("train", write_config(critic=critic))
    assert (code, REFUSED in err) == (3, True), err
    assert not canary.exists()


def test_the_code_of_a_tokenizer_is_not_run(cli, write_config, gpt2, tmp_path, canary) -> None:
    folder = tmp_path / "own-tokenizer"
    shutil.copytree(gpt2, folder)
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]},
    )
    cli("train", write_config(policy={"model": str(folder)}))
    assert not canary.exists()


def test_commands_without_a_config_never_run_it(
    cli, own_policy, own_reward, reward_file, tmp_path, canary
) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"prompt": "the movie", "answers": ["was good", "was bad"]}))
    commands = [
        ("generate", own_policy, "--prompt", "the movie"),
        (
            "compare",
            own_policy,
            own_policy,
            "--prompts",
            samples,
            "--reward",
            f"{reward_file}:good",
        ),
        ("merge", own_policy, tmp_path / "merged"),
        ("best-of-n", "--samples", samples, "--proxy", own_reward, "--output", tmp_path / "best"),
    ]
    for command in commands:
        code, _, err = cli(*command)
        assert code in (2, 3), (command, err)
    assert not canary.exists()


@pytest.mark.parametrize("command", ["sft", "reward-model"])
def test_earlier_stages_do_not_run_it(cli, own_policy, tmp_path, canary, command) -> None:
    rows = [
        {"prompt": "the movie", "response": "was good", "chosen": "was good", "rejected": "bad"}
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    config = tmp_path / "stage.yaml"
    config.write_text(
        json.dumps(
            {
                "output_dir": str(tmp_path / "out"),
                "model": {"name": str(own_policy)},
                "data": {"train": str(tmp_path / "rows.jsonl")},
            }
        )
    )
    code, _, err = cli(command, config)
    assert (code, REFUSED in err) == (3, True), err
    code, _, err = cli(command, config, "--trust-remote-code")
    assert (code, "model in the config has trust_remote_code: true" in err) == (2, True), err
    code, _, err = cli(command, config, "model.trust_remote_code=true")
    assert (code, "model.trust_remote_code=true lets" in err) == (2, True), err
    assert not canary.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_that_a_config_names_are_not_fetched(
    cli, write_config, gpt2, tmp_path, monkeypatch, key
) -> None:
    from transformers.integrations import hub_kernels

    asked: list[str] = []
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda name, **_: asked.append(name))
    folder = tmp_path / "kernels"
    shutil.copytree(gpt2, folder)
    edit(folder / "config.json", **{key: "somebody/kernel"})
    code, _, err = cli("train", write_config(policy={"model": str(folder)}))
    assert (code, "somebody/kernel" in err) == (3, True), err
    assert asked == []


def test_a_class_that_is_known_needs_no_code(cli, write_config, with_code, gpt2, canary) -> None:
    folder = with_code(gpt2, "GPT2Config", "GPT2LMHeadModel", known=True)
    code, _, err = cli("train", write_config(policy={"model": str(folder)}))
    assert code == 0, err
    assert not canary.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trust-remote-code"], "no model in the config has trust_remote_code: true"),
        (["policy.trust_remote_code=true"], "pass --trust-remote-code as well"),
        (["policy.trust_remote_code=true", "--dry-run"], "pass --trust-remote-code as well"),
    ],
)
def test_one_of_config_and_flag_is_not_enough(
    cli, write_config, own_policy, canary, tmp_path, words, said
) -> None:
    code, _, err = cli("train", write_config(policy={"model": str(own_policy)}), *words)
    assert code == 2
    assert said in err
    assert "trust_remote_code" in err
    assert "--trust-remote-code" in err
    assert not canary.exists()
    assert not (tmp_path / "run").exists()


def test_config_and_flag_together_run_the_code_of_that_model_alone(
    cli, write_config, own_policy, own_reward, canary, tmp_path
) -> None:
    trusted = {"model": str(own_policy), "trust_remote_code": True}
    config = write_config(policy=trusted, reward=reward_of(own_reward))
    code, _, err = cli("train", config, "--trust-remote-code")
    assert (code, f"{own_reward}: {REFUSED}" in err) == (3, True), err
    code, _, err = cli("train", write_config(policy=trusted), "--trust-remote-code")
    assert code == 0, err
    assert canary.exists()
    resolved = load_config(tmp_path / "run/config.yaml").config
    with pytest.raises(ConfigError, match="pass --trust-remote-code as well"):
        PPOTrainer(resolved)  # the folder of a run does not agree for whoever gets it


def test_what_was_trusted_once_is_not_trusted_in_the_next_run(write_config, own_policy) -> None:
    config = {"policy": {"model": str(own_policy), "trust_remote_code": True}}
    given = json.loads(write_config(**config).read_text())
    PPOTrainer(given, quiet=True, trust_remote_code=True)
    del given["policy"]["trust_remote_code"]
    with pytest.raises(PreflightError, match=REFUSED):
        PPOTrainer(given, quiet=True)


def test_a_trap_in_pickled_weights_does_not_go_off(
    cli, write_config, pickled, gpt2, roberta, adapter, canary
) -> None:
    base = {"model": str(gpt2)}
    sections = [
        {"policy": {"model": str(pickled(gpt2, trap=True))}},
        {"reward": reward_of(pickled(roberta, trap=True))},
        {"policy": base | {"tuning": "lora", "adapter": str(pickled(adapter, trap=True))}},
    ]
    for section in sections:
        code, _, err = cli("train", write_config(**section))
        assert code == 3, err
        assert "pickled-" in err
        assert "safetensors" in err
    assert not canary.exists()
    folder = Path(sections[0]["policy"]["model"])
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert canary.exists()  # the trap works


def test_honest_pickled_weights_load_and_safetensors_go_first(
    cli, write_config, pickled, gpt2, canary, tmp_path
) -> None:
    code, _, err = cli("train", write_config(policy={"model": str(pickled(gpt2, trap=False))}))
    assert code == 0, err
    shutil.rmtree(tmp_path / f"pickled-{gpt2.name}")
    both = pickled(gpt2, trap=True, keep_safe=True)
    code, _, err = cli("train", write_config(policy={"model": str(both)}), "--overwrite")
    assert code == 0, err
    assert not canary.exists()


def test_broken_files_are_an_error_and_no_bug(
    cli, write_config, gpt2, roberta, adapter, tmp_path
) -> None:
    def broken(source: Path) -> str:
        folder = tmp_path / f"broken-{source.name}"
        shutil.copytree(source, folder)
        (file,) = folder.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:100])
        return str(folder)

    garbled = tmp_path / "broken-tokenizer"
    shutil.copytree(gpt2, garbled)
    (garbled / "tokenizer.json").write_text('{"model": {"type": "nothing"}}')
    lora = {"model": str(gpt2), "tuning": "lora", "adapter": broken(adapter)}
    for section in (
        {"policy": {"model": broken(gpt2)}},
        {"reward": reward_of(Path(broken(roberta)))},
        {"policy": lora},
        {"policy": {"model": str(garbled)}},
    ):
        code, _, err = cli("train", write_config(**section))
        assert (code, "broken-" in err) == (3, True), err


def test_pickles_in_a_run_folder_are_not_opened_on_resuming(
    cli, write_config, canary, tmp_path
) -> None:
    config = write_config(checkpoint={"every": 1, "keep_when_done": True})
    assert cli("train", config)[0] == 0
    run = tmp_path / "run"
    (checkpoint,) = (run / "checkpoints").iterdir()
    manifest = {}
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        file = checkpoint / name
        if name != "state.json":
            torch.save(Trap(canary), file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        manifest[name] = {"bytes": file.stat().st_size, "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = cli("train", config, "ppo.num_steps=4", "--resume")
    assert (code, "safetensors cannot be read" in err) == (2, True), err
    assert not canary.exists()
