"""How much memory a run needs: counts against numbers worked out by hand, and trial steps."""

import ctypes
import json
import mmap
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from klippo.config.load import load_config
from klippo.config.schema import RunConfig
from klippo.errors import OutOfMemoryError, PreflightError
from klippo.runs.folder import METRICS_FILE, STATUS_FILE
from klippo.runs.memory import GIB, peak_memory, reset_peak, used_memory
from klippo.train import trial
from klippo.train.memory import (
    FRAMEWORK,
    PASSES,
    cache_bytes,
    model_weights,
    num_stored,
    stored_estimate,
)
from klippo.train.trainer import PPOTrainer
from klippo.train.trial import Trial, phase_rows
from tests.small_models import WORDS, word_tokenizer
from tests.toys import CPU, assert_same_tensors, gpt2, llama, weights

Cli = Callable[..., tuple[int, str, str]]

# GPT-2: V=50 tokens, 20 positions, width D=8, 2 layers, 2 heads of 4, tied head.
# Embeddings (50 + 20) * 8 = 560. A block: two norms 2 * 16, attention 8 * 24 + 24 + 8 * 8 + 8,
# MLP 8 * 32 + 32 + 32 * 8 + 8; 872. The last norm 16.
EMBEDDINGS, BLOCK, NORM, HEAD = 560, 872, 16, 9
NUMBERS = EMBEDDINGS + 2 * BLOCK + NORM


def small() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=20, n_embd=8, n_layer=2, n_head=2))


def config(policy: Any = None, critic: Any = None, **more: Any) -> RunConfig:
    sections = {
        "policy": {"model": "toy"} | (policy or {}),
        "critic": critic or {},
        "data": {"train": "demo:prompts"},
        "rollout": {"response_length": 6},
        "ppo": {"batch_size": 4},
        "evaluation": {"num_prompts": 0},
        "reward": {"kind": "length", "max_tokens": 9},
    }
    return RunConfig.model_validate(sections | more)


def estimate(run: RunConfig, model: Any = None, peaks: Any = None) -> Any:
    """The phases with a prompt of 5 tokens; 7 bytes are in use beside the weights."""
    tokenizer, prompts = word_tokenizer(pad=False), ["the movie was good and"]
    session = PPOTrainer(run, model or small(), prompts=prompts, tokenizer=tokenizer).session
    measuring = Trial(session)
    measuring._used = 7 + sum(model_weights(session.policy, session.reference).values())
    return measuring.estimate(peaks or {}).phases


@pytest.mark.parametrize(
    ("policy", "critic", "expected"),
    [
        # policy, critic, reference, trained: how many numbers
        ({}, {}, (NUMBERS, HEAD, NUMBERS, NUMBERS + HEAD)),
        # The reference copies the block that trains alone.
        (
            {"tuning": "last_layers", "num_unfrozen_layers": 1},
            {},
            (NUMBERS, HEAD, BLOCK, BLOCK + HEAD),
        ),
        ({}, {"kind": "separate"}, (NUMBERS, NUMBERS + HEAD, NUMBERS, 2 * NUMBERS + HEAD)),
        # Rank 2 on 4 products of each block: 2 * (8+24 + 8+8 + 8+32 + 32+8) = 256.
        (
            {"tuning": "lora", "lora": {"rank": 2}},
            {},
            (NUMBERS + 2 * 256, HEAD, 0, 2 * 256 + HEAD),
        ),
        (
            {"tuning": "lora", "lora": {"rank": 2}},
            {"kind": "lora", "lora": {"rank": 2}},
            (NUMBERS + 4 * 256, HEAD, 0, 4 * 256 + HEAD),
        ),
    ],
)
def test_weights_gradients_and_adam_moments_are_counted_once(policy: Any, critic: Any, expected):
    update = estimate(config(policy, critic))["update"]
    assert [update[name] for name in ("policy", "critic", "reference")] == [
        4 * number for number in expected[:3]
    ]
    assert update["optimizer states"] == 2 * 4 * expected[3]
    assert update["gradients"] == 4 * expected[3]
    assert update[FRAMEWORK] == 7


def test_bfloat16_halves_weights_and_moments():
    update = estimate(config({"dtype": "bfloat16"}), small().bfloat16())["update"]
    assert update["policy"] == 2 * NUMBERS
    assert update["optimizer states"] == 2 * (2 * NUMBERS + 4 * HEAD)


def test_what_is_measured_beyond_the_components_belongs_to_the_passes():
    phases = estimate(config(), peaks={"update": 10**6, "forward": 10})
    assert sum(phases["update"].values()) == 10**6
    assert phases["forward"][PASSES] == 0


@pytest.mark.parametrize("model", [gpt2(), llama()], ids=["gpt2", "llama"])
def test_the_cache_holds_keys_and_values_of_every_token(model: Any):
    # 2 layers, keys and values, 3 rows, 20 tokens, 4 bytes; width 16, or 2 of 4 heads of 4.
    width = 16 if model.config.model_type == "gpt2" else 8
    assert cache_bytes(model, 3, 20, 4) == 2 * 2 * 3 * 20 * width * 4


def test_a_sliding_window_bounds_the_cache():
    model = mistral(window=8)
    assert cache_bytes(model, 3, 20, 2) == cache_bytes(model, 3, 8, 2) == 2 * 2 * 3 * 8 * 16 * 2


def test_files_tell_what_full_tuning_holds(tmp_path: Path):
    small().save_pretrained(tmp_path)
    found = stored_estimate(config({"model": str(tmp_path)}), CPU).phases["update"]
    trunk = estimate(config())["update"]
    for name in ("policy", "reference"):
        assert found[name] == trunk[name]
    assert found["optimizer states"] == 2 * found["gradients"] == 2 * 4 * NUMBERS
    lora = stored_estimate(config({"model": str(tmp_path), "tuning": "lora"}), CPU)
    assert lora.phases["update"]["gradients"] == lora.phases["update"]["reference"] == 0
    four = {"model": str(tmp_path), "tuning": "lora", "quantize_4bit": True}
    assert stored_estimate(config(four), CPU).phases["update"]["policy"] == NUMBERS / 2


def test_files_in_shards_are_added_up_and_other_files_count_as_nothing(tmp_path: Path):
    small().save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    assert num_stored(str(tmp_path / "shards")) == NUMBERS
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert num_stored(str(tmp_path)) == num_stored(str(tmp_path / "none")) == 0


def test_members_of_an_ensemble_count_together(roberta: Path, tmp_path: Path):
    shutil.copytree(roberta, tmp_path / "other")
    members = [str(roberta), str(tmp_path / "other")]
    reward = {"kind": "ensemble", "members": members, "standardize": "none"}
    phases = stored_estimate(config(reward=reward), CPU).phases
    assert phases["update"]["reward ensemble of 2"] == 2 * 4 * num_stored(str(roberta))


def test_a_budget_of_tokens_counts_as_the_rows_that_fill_it():
    def rows(**ppo: Any) -> dict[str, int]:
        return phase_rows(config(ppo={"batch_size": 8} | ppo), 1, num_tokens=11)

    # In the update two micro-batches, so that gradients add up.
    assert rows(micro_batch_tokens=23) | {"forward": 2, "update": 4} == rows(micro_batch_tokens=23)
    assert rows(micro_batch_tokens=1) == rows(micro_batch_size=1)
    assert rows(micro_batch_tokens=999) == rows()
    assert rows(minibatch_size=2) | {"forward": 8, "update": 2} == rows(minibatch_size=2)


def mistral(window: int) -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=len(WORDS) + 2, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, head_dim=4, sliding_window=window,
            max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral whose window is shorter than a prompt with its response, as Zephyr's may be."""
    folder = tmp_path_factory.mktemp("mistral")
    mistral(window=5).save_pretrained(folder)
    word_tokenizer(pad=False).save_pretrained(folder)
    return folder


def test_a_model_with_a_sliding_window_is_measured_and_trains(
    write_config: Callable[..., Path], cli: Cli, sliding: Path
):
    file = write_config(policy={"model": str(sliding)})
    code, out, _ = cli("train", file, "--dry-run")
    assert code == 0
    assert "generate" in out
    assert "time, an estimate" in out
    assert cli("train", file, "--quiet")[0] == 0


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A GPT-2 whose passes over long rows take tens of MiB."""
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(WORDS) + 2, n_positions=256, n_embd=128, n_layer=4, n_head=2,
            bos_token_id=0, eos_token_id=0,
        )
    ).save_pretrained(tmp_path / "wide")  # fmt: skip
    word_tokenizer(pad=False).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_the_trial_step_measures_what_micro_batches_save_and_stays_below_the_bound(
    write_config: Callable[..., Path], wide: Path
):
    def measured(micro: int | None) -> tuple[float, float]:
        sections = {
            "policy": {"model": str(wide)},
            "rollout": {"response_length": 200},
            "ppo": {"batch_size": 16, "micro_batch_size": micro},
            "evaluation": {"num_prompts": 0},
        }
        session = PPOTrainer(load_config(write_config(**sections)), quiet=True).session
        with suppress(AttributeError):  # what the allocator has kept must not hide the need
            ctypes.CDLL(None).malloc_trim(0)
        measuring = Trial(session)
        return measuring.measured().phases["update"][PASSES], measuring.bound

    (small, _), (whole, bound) = measured(1), measured(None)
    # Each layer keeps at least 16 widths a token: attention's 5, the MLP's 9, norms and residuals.
    assert whole - small > 4 * 16 * 128 * 4 * 13 * 200 / 2
    assert whole < bound


def test_the_peak_is_that_since_it_was_reset():
    reset_peak(CPU)
    before = used_memory(CPU)
    assert peak_memory(CPU) < before + 2**24
    with mmap.mmap(-1, 2**26) as block:  # from the system, whatever the allocator keeps
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    assert peak_memory(CPU) > before + 2**25
    reset_peak(CPU)
    assert peak_memory(CPU) < before + 2**25


@pytest.mark.parametrize(
    "policy",
    [{}, {"tuning": "last_layers", "num_unfrozen_layers": 1}, {"tuning": "lora"}],
    ids=["full", "last_layers", "lora"],
)
def test_a_trial_step_leaves_no_trace(
    policy: Any, write_config: Callable[..., Path], gpt2: Path, roberta: Path, monkeypatch: Any
):
    """The run is bit-equal with and without it: weights, metrics, and the reward's statistics."""
    classifier = {"kind": "classifier", "model": str(roberta), "label": "POSITIVE"}
    reward = {"kind": "sum", "parts": {"one": {"reward": classifier, "normalize": True}}}
    file = write_config(policy={"model": str(gpt2)} | policy, reward=reward)
    measured, trials = Trial.measured, list[int]()
    monkeypatch.setattr(Trial, "measured", lambda self: trials.append(1) or measured(self))
    trained, steps = [], []
    for share, num_trials in {0.0: 1, 1.0: 1}.items():  # of the memory, above which it is made
        monkeypatch.setattr(trial, "CLEARLY_ENOUGH", share)
        trainer = PPOTrainer(load_config(file), quiet=True, overwrite=True)
        start = {name: p.clone() for name, p in trainer.session.policy.named_parameters()}
        state = torch.get_rng_state()
        trial.check_memory(trainer.session)
        assert len(trials) == num_trials
        assert torch.equal(state, torch.get_rng_state())
        for name, parameter in trainer.session.policy.named_parameters():
            assert torch.equal(start[name], parameter)
            assert parameter.grad is None
        monkeypatch.setattr(trial, "CLEARLY_ENOUGH", 1.0)
        trainer.train()
        trained.append(weights(trainer.session.policy))
        lines = (trainer.output_dir / METRICS_FILE).read_text().splitlines()
        steps.append([_timeless(json.loads(line)) for line in lines])
    assert_same_tensors(trained[0], trained[1], atol=0)
    assert steps[0] == steps[1]


def _timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in metrics.items()
        if not key.startswith(("time/", "throughput/", "memory/"))
    }


def test_a_run_with_clearly_enough_memory_makes_no_trial_step(
    write_config: Callable[..., Path], monkeypatch: Any
):
    monkeypatch.setattr(Trial, "measured", None)
    PPOTrainer(load_config(write_config(max_memory_gib=64)), quiet=True).train()


def test_a_run_whose_trial_step_takes_too_much_is_refused_before_its_folder_exists(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: Any
):
    trainer = PPOTrainer(load_config(write_config(max_memory_gib=64)), quiet=True)
    monkeypatch.setattr(trial, "CLEARLY_ENOUGH", 0.0)
    monkeypatch.setattr(trial, "peak_memory", lambda _: 65 * GIB)
    with pytest.raises(PreflightError, match=f"(?s)allows 64.00 GiB.*{PASSES}") as raised:
        trainer.train()
    assert "rollout.generation_batch_size (below 16)" in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_an_offline_run_is_measured_without_sampling(tmp_path: Path, gpt2: Path):
    rows = [{"prompt": "the movie was", "response": w, "score": i} for i, w in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "output_dir": str(tmp_path / "run"),
        "policy": {"model": str(gpt2)},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "offline": {"num_passes": 1, "behavior": "unknown"},
        "reward": {"kind": "column", "column": "score"},
        "kl": {"placement": "exact"},
        "ppo": {"batch_size": 4},
    }
    session = PPOTrainer(run, quiet=True).session
    assert set(Trial(session).measured().phases) == {"forward", "score", "update"}


def test_a_run_that_cannot_fit_is_refused_before_it_starts(
    write_config: Callable[..., Path], cli: Cli, tmp_path: Path
):
    code, _, err = cli("train", write_config(max_memory_gib=0.01))
    assert code == 3
    assert "max_memory_gib allows 0.01 GiB" in err
    assert "Python, PyTorch and data" in err
    assert "ppo.micro_batch_size (below 8)" in err
    assert not (tmp_path / "run").exists()


def test_the_dry_run_of_one_that_does_not_fit_measures_no_time(
    write_config: Callable[..., Path], cli: Cli
):
    code, out, _ = cli("train", write_config(max_memory_gib=0.01), "--dry-run")
    assert code == 0
    assert "optimizer states" in out
    assert "The run needs about" in out
    assert "time, an estimate" not in out


REMEDY = {
    "generate": "rollout.generation_batch_size (below 16)",
    "score": "a shorter rollout.response_length",
    "forward": "ppo.micro_batch_size (below 8)",
    "update": "ppo.micro_batch_size (below 8); or policy.gradient_checkpointing=true",
}
SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError("no more"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
]


@pytest.mark.parametrize("phase", REMEDY)
@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_is_explained(
    phase: str, error: Exception, write_config: Callable[..., Path], monkeypatch: Any
):
    trainer = PPOTrainer(load_config(write_config(evaluation={"num_prompts": 0})), quiet=True)
    session = trainer.session

    def fails(*_: Any) -> Any:
        raise error

    if phase == "generate":
        monkeypatch.setattr(session.source, "next", fails)
    elif phase == "score":
        monkeypatch.setattr(session.reward, "score", fails)
    else:
        name = "forward" if phase == "forward" else "learn"
        monkeypatch.setattr(session.learner, name, fails)
    with pytest.raises(OutOfMemoryError) as raised:
        trainer.train()
    text = str(raised.value)
    assert raised.value.exit_code == 3
    assert f"(phase {phase})" in text
    assert REMEDY[phase] in text
    assert "Weights alone are policy 0.00 GiB" in text
    status = json.loads((trainer.output_dir / STATUS_FILE).read_text())
    assert status["state"] == "failed"
    assert "ran out of memory" in status["reason"]


def test_other_errors_stay_as_they_are(write_config: Callable[..., Path], monkeypatch: Any):
    trainer = PPOTrainer(load_config(write_config(evaluation={"num_prompts": 0})), quiet=True)

    def fails() -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(trainer.session.source, "next", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.train()
