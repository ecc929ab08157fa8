"""Which sharding a run gets from its config, and from the variables of accelerate's launcher."""

import json
import os

import pytest

from klippo.config.load import config_from_mapping
from klippo.errors import PreflightError
from klippo.ranks import Ranks
from klippo.train.launch import choose_sharding, sharding_note

TWO = Ranks(0, 2)
KEEPS = "FSDP2 that keeps gathered weights"
FULL = "a full model in every process"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in os.environ:
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)


@pytest.fixture
def accelerate(monkeypatch):
    """Sets variables as accelerate's launcher does."""

    def set_variables(kind: str, **variables: str) -> None:
        monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
        prefix = {"DEEPSPEED": "ACCELERATE_DEEPSPEED_", "FSDP": "FSDP_"}[kind]
        for name, value in variables.items():
            monkeypatch.setenv(prefix + name.upper(), value)

    return set_variables


def config(sharding="auto", **policy):
    sections = {
        "policy": {"model": "demo:policy", **policy},
        "data": {"train": "demo:prompts"},
        "reward": {"kind": "length", "max_tokens": 4},
        "sharding": sharding,
    }
    return config_from_mapping(sections).config


@pytest.mark.parametrize(
    ("stage", "sharding", "runs_as"),
    [
        ("0", "none", FULL),
        ("1", "shard_grad_op", KEEPS),
        ("2", "shard_grad_op", KEEPS),
        ("3", "fsdp", "FSDP2"),
    ],
)
def test_each_stage_of_deepspeed_runs_and_one_line_says_as_what(
    accelerate, stage, sharding, runs_as, tmp_path
):
    names = f"accelerate's config file names DeepSpeed ZeRO-{stage}; Klippo runs it as {runs_as}"
    accelerate("DEEPSPEED", zero_stage=stage, offload_param_device="none")
    assert choose_sharding(config(), TWO) == sharding
    assert sharding_note(config(), TWO) == names
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": int(stage)}}))
    accelerate("DEEPSPEED", zero_stage="2", config_file=str(file))
    assert choose_sharding(config(), TWO) == sharding
    assert sharding_note(config(), TWO) == names


def test_a_deepspeed_file_that_cannot_be_read_is_named(accelerate):
    accelerate("DEEPSPEED", config_file="/nowhere.json")
    with pytest.raises(
        PreflightError, match=r"deepspeed_config_file: /nowhere\.json, which cannot"
    ):
        choose_sharding(config(), TWO)


@pytest.mark.parametrize(
    ("variables", "sharding", "runs_as"),
    [
        ({"version": "2", "reshard_after_forward": "true"}, "fsdp", None),
        ({"version": "2", "reshard_after_forward": "false"}, "shard_grad_op", None),
        ({"version": "1", "reshard_after_forward": "FULL_SHARD"}, "fsdp", "FSDP2"),
        ({"version": "1", "sharding_strategy": "SHARD_GRAD_OP"}, "shard_grad_op", KEEPS),
        ({"version": "1", "sharding_strategy": "3"}, "none", FULL),
        ({"version": "2", "offload_params": "true"}, "fsdp", "FSDP2, without CPU offload"),
        (
            {"version": "2", "activation_checkpointing": "true"},
            "fsdp",
            "FSDP2; for activation checkpointing set policy.gradient_checkpointing=true",
        ),
    ],
)
def test_every_kind_of_fsdp_runs_and_a_line_names_what_is_different(
    accelerate, variables, sharding, runs_as
):
    accelerate("FSDP", **variables)
    assert choose_sharding(config(), TWO) == sharding
    note = sharding_note(config(), TWO)
    assert note == (
        runs_as
        and f"accelerate's config file names FSDP version {variables['version']}; "
        f"Klippo runs it as {runs_as}"
    )


def test_the_runs_own_config_comes_first_and_one_process_has_no_shards(accelerate):
    accelerate("DEEPSPEED", zero_stage="3", offload_optimizer_device="cpu")
    assert choose_sharding(config("none"), TWO) == "none"
    assert sharding_note(config("none"), TWO) is None
    assert choose_sharding(config("fsdp"), Ranks()) == "none"
    assert sharding_note(config(), TWO).endswith("FSDP2, without CPU offload")


def test_4_bit_weights_are_held_in_full(accelerate):
    accelerate("FSDP", version="2", reshard_after_forward="true")
    four_bit = config(quantize_4bit=True, tuning="lora")
    assert choose_sharding(four_bit, TWO) == "none"
    assert sharding_note(four_bit, TWO) == (
        f"accelerate's config file names FSDP with 4-bit weights; Klippo runs it as {FULL}"
    )


def test_without_any_word_of_it_every_process_has_the_full_model():
    assert choose_sharding(config(), TWO) == "none"
    assert sharding_note(config(), TWO) is None
