"""How much memory a run needs, against bytes worked out by hand; and what a short run is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from klippo.config.load import load_config
from klippo.config.schema import RunConfig
from klippo.errors import OutOfMemoryError
from klippo.policy.loading import load_policy, shape_policy
from klippo.policy.settings import CriticSettings, PolicySettings
from klippo.policy.tracing import LiveBytes
from klippo.runs.folder import STATUS_FILE
from klippo.train.memory import KEPT, Machine, MemoryEstimate, estimate_memory
from klippo.train.memory_phases import (
    generation_bytes,
    total_bytes,
    update_bytes,
    update_loss,
)
from klippo.train.trainer import PPOTrainer
from tests.toys import NO_TOKENIZER

Cli = Callable[..., tuple[int, str, str]]

# GPT-2: V=50 tokens, 20 positions, width D=8, 2 layers, 2 heads of 4, tied head.
# Embeddings (50 + 20) * 8 = 560. A block: two norms 2 * 16, attention 8 * 24 + 24 + 8 * 8 + 8,
# MLP 8 * 32 + 32 + 32 * 8 + 8; 872. The last norm 16.
EMBEDDINGS, BLOCK, NORM, HEAD = 560, 872, 16, 9
NUMBERS = EMBEDDINGS + 2 * BLOCK + NORM


def shapes() -> Any:
    with torch.device("meta"):
        return GPT2LMHeadModel(small())


def small() -> GPT2Config:
    return GPT2Config(vocab_size=50, n_positions=20, n_embd=8, n_layer=2, n_head=2)


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


def estimate(*args: Any, **more: Any) -> MemoryEstimate:
    return estimate_memory(config(*args, **more), Machine(framework=7), prompt=5, model=shapes())


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
def test_weights_and_adam_states_are_counted_once(policy: Any, critic: Any, expected: Any):
    parts = estimate(policy, critic).phases["update"]
    found = [parts.get(name, 0) for name in ("policy", "critic", "reference")]
    assert found == [4 * number for number in expected[:3]]
    assert parts["optimizer states"] == 2 * 4 * expected[3]
    assert parts["Python, PyTorch and data"] == 7


def test_bfloat16_halves_weights_and_states():
    half = shapes().bfloat16()
    found = estimate_memory(config({"dtype": "bfloat16"}), Machine(), prompt=5, model=half)
    parts = found.phases["update"]
    assert parts["policy"] == 2 * NUMBERS
    assert parts["optimizer states"] == 2 * (2 * NUMBERS + 4 * HEAD)


def test_outputs_of_frozen_blocks_stay_from_the_forward_phase_to_the_update():
    phases = estimate({"tuning": "last_layers", "num_unfrozen_layers": 1}).phases
    # 4 rows, 5 + 6 tokens, width 8, 4 bytes.
    held = {name: parts.get("outputs of frozen blocks") for name, parts in phases.items()}
    assert held.pop("forward") == held.pop("score") == held.pop("update") == 4 * 11 * 8 * 4
    assert not any(held.values())
    assert "outputs of frozen blocks" not in estimate().phases["update"]


def test_frozen_blocks_in_4_bits_need_4_and_an_eighth_bits():
    policy = {"tuning": "lora", "lora": {"rank": 2}, "quantize_4bit": True}
    products = 2 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8)
    # Positions are no product, but a matrix of 20 x 8, and counted with them.
    saved = (products + 160) * (4 - 4.127 / 8)
    parts = estimate(policy).phases["update"]
    assert parts["policy"] == 4 * (NUMBERS + 2 * 256) - round(saved)


def test_the_cache_holds_keys_and_values_of_every_token():
    policy = shape_policy(PolicySettings(model="toy"), CriticSettings(), shapes()).policy
    # 2 layers, keys and values, 4 rows, 2 + 18 - 1 tokens, width 8, 4 bytes.
    assert generation_bytes(policy, 4, 2, 18)["key-value cache"] == 2 * 2 * 4 * 19 * 8 * 4


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shapes_alone_hold_what_a_real_update_holds(tuning: Any, checkpointing: bool):
    """The oracle: the same passes with numbers, all storages alive counted."""
    settings = PolicySettings(model="toy", tuning=tuning, gradient_checkpointing=checkpointing)
    critic = CriticSettings()
    shaped = shape_policy(settings, critic, shapes()).policy
    torch.manual_seed(0)
    device = torch.device("cpu")
    real = load_policy(
        settings, critic, device, model=GPT2LMHeadModel(small()), tokenizer=NO_TOKENIZER
    ).policy
    traced = total_bytes(update_bytes(shaped, 4, 5, 6, parts=1, with_entropy=False))

    from klippo.types import TokenBatch

    prompt_mask = torch.ones(4, 5, dtype=torch.bool)
    prompt_mask[0, 0] = False
    batch = TokenBatch(
        prompt_ids=torch.zeros(4, 5, dtype=torch.long),
        prompt_mask=prompt_mask,
        response_ids=torch.zeros(4, 6, dtype=torch.long),
        response_mask=torch.ones(4, 6, dtype=torch.bool),
    )
    real.train()
    live = LiveBytes(50, [*real.parameters(), *real.buffers()])
    with live:
        torch.autograd.backward(update_loss(real, batch, with_entropy=False))
    assert traced == pytest.approx(total_bytes(live.at_peak), rel=0.1)


def test_smaller_micro_batches_and_checkpointing_hold_less():
    whole = estimate().phases["update"]
    small = estimate(ppo={"batch_size": 4, "micro_batch_size": 1}).phases["update"]
    again = estimate({"gradient_checkpointing": True}).phases["update"]
    assert small["activations"] < whole["activations"] / 2
    assert again["activations"] < whole["activations"]


def test_a_budget_of_tokens_counts_as_the_rows_that_fill_it():
    def update(**ppo: Any) -> Any:
        return estimate(ppo={"batch_size": 4} | ppo).phases["update"]

    # Prompts of 5 and responses of 6: 22 tokens are 2 rows, and 23 may be more than 2.
    assert update(micro_batch_tokens=22) == update(micro_batch_size=2)
    assert update(micro_batch_tokens=23)["activations"] > update(micro_batch_size=2)["activations"]
    assert update(micro_batch_tokens=1) == update(micro_batch_size=1)
    assert update(micro_batch_tokens=999) == update()


def test_what_the_allocator_keeps_is_a_share_of_what_passes():
    machine = Machine(kept_share=0.5)
    found = estimate_memory(config(), machine, prompt=5, model=shapes()).phases["update"]
    passing = found["activations"] + found.get("logits", 0) + found.get("gradients", 0)
    assert found[KEPT] == pytest.approx(passing / 2, abs=1)


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
        object.__setattr__(session, "score", fails)
    else:
        name = "forward" if phase == "forward" else "learn"
        monkeypatch.setattr(session.learner, name, fails)
    with pytest.raises(OutOfMemoryError) as raised:
        trainer.train()
    text = str(raised.value)
    assert raised.value.exit_code == 3
    assert f"(phase {phase})" in text
    assert REMEDY[phase] in text
    assert "Estimated there:" in text
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


def test_sampling_counts_the_weights_that_hold_the_adapter():
    lora = {"tuning": "lora", "lora": {"rank": 2}}
    products = 2 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8)
    held = {name: parts.get("merged weights") for name, parts in estimate(lora).phases.items()}
    assert held.pop("generate") == 4 * products
    assert not any(held.values())
    without = {"response_length": 6, "merge_adapters": False}
    assert "merged weights" not in estimate(lora, rollout=without).phases["generate"]
    half = estimate_memory(
        config(lora | {"dtype": "bfloat16"}), Machine(), prompt=5, model=shapes().bfloat16()
    )
    assert "merged weights" not in half.phases["generate"]
    shards = estimate_memory(config(lora), Machine(num_shards=2), prompt=5, model=shapes())
    assert "merged weights" not in shards.phases["generate"]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_vllm_counts_with_its_merged_weights_and_its_cache(tuning: str) -> None:
    rollout = {"engine": "vllm", "response_length": 6, "vllm": {"kv_cache_gib": 0.5}}
    found = estimate({"tuning": tuning}, rollout=rollout)
    assert "generate" not in found.phases  # it needs no cache of ours
    assert found.phases["update"]["vLLM's weights"] == 4 * NUMBERS
    assert found.phases["update"]["vLLM's key-value cache"] == 2**29


def test_with_servers_a_copy_of_the_weights_waits_to_be_sent() -> None:
    vllm = {"servers": ["http://10.0.0.1:1"]}
    found = estimate({}, rollout={"engine": "vllm", "response_length": 6, "vllm": vllm})
    assert found.phases["update"]["weights for the servers"] == 4 * NUMBERS
    assert "vLLM's weights" not in found.phases["update"]
