"""Reward models of published systems, from files laid out as their authors' code wrote them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from klippo.errors import PreflightError
from klippo.rewards.classifier import ClassifierReward
from klippo.rewards.settings import ClassifierSettings
from tests.rewards.conftest import make_rollout, make_tokenizer
from tests.tolerance import FLOAT64

IN_FLOAT64 = pytest.mark.usefixtures("in_float64")

INSTRUCTIONS = ["Name a river.", "Say something about the film."]
RESPONSES = ["The river is long.", "It was loud!"]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:{}"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n{}"
    "\n\n### Input:\n{}\n\n### Response:{}"
)


def reward(folder, **settings):
    return ClassifierReward(ClassifierSettings(kind="classifier", model=str(folder), **settings))


class AlpacaFarm:
    """A small random one: the folder, and its parts for an independent forward."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300, max_position_embeddings=400, hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=1,
            initializer_range=0.3,
        )  # fmt: skip
        self.backbone = LlamaForCausalLM(config).eval()
        self.head = nn.Linear(16, 1)
        self.folder, backbone_folder = root / "reward-model-human", root / "sft10k"
        self.backbone.save_pretrained(backbone_folder)
        make_tokenizer(
            ["<s>", "</s>"], before="<s>", vocab_size=300, bos_token="<s>", eos_token="</s>"
        ).save_pretrained(self.folder)
        content = {
            "architectures": ["RewardModel"],
            "backbone_model_name_or_path": str(backbone_folder),
            "model_type": "reward_model",
            "torch_dtype": "float32",
            "transformers_version": "4.26.1",
        }
        (self.folder / "config.json").write_text(json.dumps(content))
        self._save_weights()
        self.backbone.double()
        self.head.double()

    def _save_weights(self) -> None:
        """In two pickled shards with an index, as that version of transformers wrote them."""
        state = {f"backbone_model.{k}": v for k, v in self.backbone.state_dict().items()}
        state |= {f"reward_head.{k}": v for k, v in self.head.state_dict().items()}
        state["backbone_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        names = sorted(state)
        shards = [names[: len(names) // 2], names[len(names) // 2 :]]
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"pytorch_model-{number:05}-of-00002.bin"
            torch.save({name: state[name] for name in shard}, self.folder / file)
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (self.folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    @torch.no_grad()
    def expected(self, texts):
        """Left-padded, read at the last position: as AlpacaFarm's own forward does."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder, padding_side="left")
        tokenizer.pad_token = tokenizer.eos_token
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        hidden = self.backbone.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=positions,
        ).last_hidden_state
        return self.head(hidden[:, -1])[:, 0]


@pytest.fixture(scope="module")
def alpaca_farm(tmp_path_factory):
    return AlpacaFarm(tmp_path_factory.mktemp("alpaca_farm"))


@IN_FLOAT64
def test_alpacafarms_reward_model_scores_its_own_format(alpaca_farm):
    scores = reward(alpaca_farm.folder).score(make_rollout(RESPONSES, prompts=INSTRUCTIONS))
    texts = [ALPACA.format(i, r) for i, r in zip(INSTRUCTIONS, RESPONSES, strict=True)]
    torch.testing.assert_close(scores.reward, alpaca_farm.expected(texts), **FLOAT64)
    assert scores.reward.std() > 1e-3


@IN_FLOAT64
def test_alpacafarms_format_has_a_variant_with_input(alpaca_farm):
    metas = [{"instruction": "Name", "input": "rivers"}, {"instruction": "Say", "input": ""}]
    rollout = make_rollout(RESPONSES, prompts=["Name\nrivers", "Say"], metas=metas)
    texts = [
        ALPACA_INPUT.format("Name", "rivers", RESPONSES[0]),
        ALPACA.format("Say", RESPONSES[1]),
    ]
    scores = reward(alpaca_farm.folder).score(rollout)
    torch.testing.assert_close(scores.reward, alpaca_farm.expected(texts), **FLOAT64)


@IN_FLOAT64
def test_a_template_in_the_config_wins_over_the_classs_own(alpaca_farm):
    rollout = make_rollout(RESPONSES, prompts=INSTRUCTIONS)
    scores = reward(alpaca_farm.folder, template="{response}").score(rollout)
    torch.testing.assert_close(scores.reward, alpaca_farm.expected(RESPONSES), **FLOAT64)


def test_a_backbone_that_is_not_there_says_what_to_change(tmp_path):
    farm = AlpacaFarm(tmp_path)
    path = farm.folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"backbone_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(PreflightError, match="backbone_model_name_or_path in the reward model"):
        reward(farm.folder)


def test_missing_weights_of_a_published_class_are_refused(tmp_path):
    farm = AlpacaFarm(tmp_path)
    farm.head = nn.Linear(16, 1, bias=False)
    farm._save_weights()
    with pytest.raises(PreflightError, match=r"lacks weights \(reward_head.bias\)"):
        reward(farm.folder)


class OpenAssistant:
    """A small random reward model of the class that the ensembles' paper used."""

    def __init__(self, folder: Path, pooling: str = "last") -> None:
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=330, max_position_embeddings=128, hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
        )  # fmt: skip
        self.trunk = GPTNeoXModel(config).eval()
        self.head = nn.Linear(16, 1)
        self.folder = folder
        folder.mkdir(parents=True)
        tokenizer = make_tokenizer(
            ["<|endoftext|>", "<|prompter|>", "<|assistant|>"],
            bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        )  # fmt: skip
        tokenizer.save_pretrained(folder)
        content = config.to_dict() | {
            "architectures": ["GPTNeoXRewardModel"],
            "model_type": "gpt_neox_reward_model",
            "pooling": pooling,
        }
        (folder / "config.json").write_text(json.dumps(content, default=str))
        state = {f"gpt_neox.{k}": v for k, v in self.trunk.state_dict().items()}
        state |= {f"out_proj.{k}": v for k, v in self.head.state_dict().items()}
        state["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
        torch.save(state, folder / "pytorch_model.bin")
        self.trunk.double()
        self.head.double()

    @torch.no_grad()
    def expected(self, texts):
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        rows = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
        return torch.cat([self.head(self.trunk(ids).last_hidden_state[0, -1]) for ids in rows])


@IN_FLOAT64
def test_the_ensembles_papers_reward_model_scores_its_own_format(tmp_path):
    model = OpenAssistant(tmp_path / "rm-pythia-44m_seed1")
    scores = reward(model.folder).score(make_rollout(RESPONSES, prompts=INSTRUCTIONS))
    texts = [
        f"<|prompter|>{i}<|endoftext|><|assistant|>{r}<|endoftext|>"
        for i, r in zip(INSTRUCTIONS, RESPONSES, strict=True)
    ]
    torch.testing.assert_close(scores.reward, model.expected(texts), **FLOAT64)
    assert scores.reward.std() > 1e-3


def test_mean_pooling_is_refused_rather_than_read_at_the_last_token(tmp_path):
    model = OpenAssistant(tmp_path / "pooled", pooling="mean")
    with pytest.raises(PreflightError, match="pooling=mean"):
        reward(model.folder)


def test_other_classes_still_load_through_transformers(alpaca_farm, folders):
    expected = AutoModelForSequenceClassification.from_pretrained(folders["llama"])
    assert type(reward(folders["llama"]).scorer.trunk) is type(expected.model)
