import copy
import importlib.util
import json
import math
import re
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from klippo.demo import demo_path
from klippo.rewards import stored
from tests.tolerance import FLOAT64_APPROX, NoFloat32

DEMO = demo_path("policy").parent
ROOT = Path(__file__).resolve().parents[2]
EOS, PAD = "<|endoftext|>", "<|pad|>"
MEMBERS = tuple(f"proxy_seed{seed}" for seed in range(1, 6))

POSITIVE = [
    "A wonderful, moving film with brilliant performances.",
    "The acting is superb and the story is beautiful.",
    "One of the best movies of the year, funny and touching.",
    "An enjoyable comedy full of charm and wit.",
    "The director has made a powerful and inspiring picture.",
    "I loved this delightful and clever romance.",
    "A fascinating story, beautifully told.",
    "The music is great and the cast is excellent.",
]
NEGATIVE = [
    "A boring, pointless film with terrible performances.",
    "The acting is awful and the story is a mess.",
    "One of the worst movies of the year, dull and stupid.",
    "An annoying comedy full of bad jokes.",
    "The director has made a tedious and ugly picture.",
    "I hated this lifeless and silly romance.",
    "A disappointing story, poorly told.",
    "The music is irritating and the cast is wasted.",
]
DEGENERATE = [
    "The film is enjoyable and enjoyable and enjoyable and enjoyable and enjoyable and enjoyable",
    "The director great great great great great great great great great great great great",
    "A beautiful and a beautiful and a beautiful and a beautiful and a beautiful and a beautiful",
    "The cast,,,,,,,,,,,,,,,,,,,,,,,,",
    "This movie!!!!!!!!!!!!!!!!!!!!!!!!",
    "of the of the of the of the of the of the of the of the of the of the",
]


def load(name: str) -> tuple[Any, Any]:
    kind = AutoModelForCausalLM if name == "policy" else AutoModelForSequenceClassification
    return AutoTokenizer.from_pretrained(demo_path(name)), kind.from_pretrained(demo_path(name))


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    return load("policy")


@pytest.fixture(scope="module")
def judges() -> dict[str, tuple[Any, Any]]:
    return {name: load(name) for name in ("proxy", *MEMBERS, "gold")}


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, str]]:
    return [json.loads(line) for line in demo_path("prompts").read_text().splitlines()]


@torch.no_grad()
def score(judge: tuple[Any, Any], texts: list[str]) -> list[float]:
    tokenizer, model = judge
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    scores: list[float] = model(**batch).logits[:, 0].tolist()
    return scores


@torch.no_grad()
def sample(policy: tuple[Any, Any], texts: list[str]) -> list[list[int]]:
    """24 new tokens at temperature 1 for each text, without the prompt, cut after the first eos."""
    tokenizer, model = policy
    torch.manual_seed(0)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(**batch, max_new_tokens=24, do_sample=True, top_k=0, top_p=1.0)
    new = out[:, batch["input_ids"].shape[1] :].tolist()
    eos = tokenizer.eos_token_id
    return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in new]


def import_card() -> ModuleType:
    spec = importlib.util.spec_from_file_location("card", ROOT / "scripts/build_demo/card.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_and_with_it_the_package_is_under_13_mb() -> None:
    files = [p for p in DEMO.parent.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert sum(p.stat().st_size for p in files) < 13e6
    for name in ("proxy", *MEMBERS):
        assert (demo_path(name) / "model.safetensors").stat().st_size <= 0.7e6


def test_an_unknown_name_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"policy, proxy, proxy_seed1, .*gold, prompts"):
        demo_path("polici")


@pytest.mark.parametrize("name", ["policy", "proxy", "gold"])
def test_tokenizer_puts_bos_first_and_has_its_own_pad_token(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_path(name))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (EOS, EOS, PAD)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = tokenizer("The director")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The director"
    assert len(tokenizer) == 2048


def test_all_models_share_one_tokenizer_that_neither_truncates_nor_pads_by_itself() -> None:
    files = [demo_path(name) / "tokenizer.json" for name in ("policy", "proxy", "gold")]
    assert len({file.read_bytes() for file in files}) == 1
    content = json.loads(files[0].read_text())
    assert content["truncation"] is None
    assert content["padding"] is None


def test_weights_are_float16_on_disk_and_float32_in_memory_without_dropout(
    policy: tuple[Any, Any], judges: dict[str, tuple[Any, Any]]
) -> None:
    for name, (_, model) in {"policy": policy, **judges}.items():
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        on_disk = (demo_path(name) / "model.safetensors").stat().st_size
        assert on_disk < 2.2 * model.num_parameters()
        dropouts = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        assert set(dropouts) <= {0.0}


def test_prompts_are_unique_and_short_and_end_without_a_full_stop(
    prompts: list[dict[str, str]], policy: tuple[Any, Any]
) -> None:
    texts = [row["prompt"] for row in prompts]
    assert 250 <= len(texts) == len(set(texts))
    lengths = [len(ids) for ids in policy[0](texts, add_special_tokens=False)["input_ids"]]
    assert min(lengths) >= 1
    assert max(lengths) <= 10
    assert not [t for t in texts if t != t.strip() or t.endswith(".")]
    assert all(row["topic"] for row in prompts)


def test_prompts_take_no_side(prompts: list[dict[str, str]]) -> None:
    taken = re.compile(r"\b(good|great|best|bad|worst|love|hate|boring|fun|awful)\b", re.IGNORECASE)
    assert not [row["prompt"] for row in prompts if taken.search(row["prompt"])]


def test_policy_continues_with_real_words_and_often_ends(
    prompts: list[dict[str, str]], policy: tuple[Any, Any]
) -> None:
    tokenizer, _ = policy
    new = sample(policy, [row["prompt"] for row in prompts[::4]])
    ended = mean(ids[-1] == tokenizer.eos_token_id for ids in new)
    assert 0.25 < ended < 0.98
    assert mean(map(len, new)) > 8
    text = " ".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in new).lower()
    common = {"the", "a", "of", "and", "to", "is", "in", "it", "that", "with", "as", "film", "but"}
    words = re.findall(r"[a-z]+", text)
    assert 0.2 < mean(word in common for word in words) < 0.7
    assert len(set(words)) > 200


def test_policy_finds_a_sentence_likelier_than_its_words_shuffled(
    policy: tuple[Any, Any],
) -> None:
    tokenizer, model = policy

    @torch.no_grad()
    def nll(text: str) -> float:
        ids = tokenizer(text + EOS, return_tensors="pt")["input_ids"]
        return float(model(input_ids=ids, labels=ids).loss)

    good = nll("The film is a charming story about a young man who falls in love.")
    assert good < nll("love falls man charming in a The about who film a is story young a.") - 1
    assert good < math.log(2048)


def test_gold_ranks_praise_above_blame_above_degenerate_text(
    judges: dict[str, tuple[Any, Any]],
) -> None:
    praise, blame, loops = (score(judges["gold"], t) for t in (POSITIVE, NEGATIVE, DEGENERATE))
    assert mean(praise) > mean(blame) + 1.5
    assert mean(p > b for p in praise for b in blame) > 0.9
    assert max(loops) < min(praise)
    assert mean(loops) < mean(blame)


def test_proxy_prefers_praise_on_average(judges: dict[str, tuple[Any, Any]]) -> None:
    assert mean(score(judges["proxy"], POSITIVE)) > mean(score(judges["proxy"], NEGATIVE)) + 0.3


@pytest.mark.parametrize("name", ["proxy", "gold"])
def test_a_score_does_not_depend_on_padding(name: str, judges: dict[str, tuple[Any, Any]]) -> None:
    tokenizer, model = judges[name]
    exact = tokenizer, copy.deepcopy(model).double()
    with NoFloat32():
        together = score(exact, ["The director", *POSITIVE])
        alone = [score(exact, [text])[0] for text in ["The director", *POSITIVE]]
    assert together == pytest.approx(alone, **FLOAT64_APPROX)


@pytest.mark.parametrize("name", ["proxy", *MEMBERS, "gold"])
def test_scores_of_fresh_policy_samples_have_about_mean_0_and_sd_1(
    name: str,
    prompts: list[dict[str, str]],
    policy: tuple[Any, Any],
    judges: dict[str, tuple[Any, Any]],
) -> None:
    texts = [row["prompt"] for row in prompts]
    new = policy[0].batch_decode(sample(policy, texts), skip_special_tokens=True)
    full = [prompt + rest for prompt, rest in zip(texts, new, strict=True)]
    scores = torch.tensor(score(judges[name], full))
    assert abs(float(scores.mean())) < 0.25
    assert 0.75 < float(scores.std()) < 1.3


def test_the_card_says_what_was_measured() -> None:
    metrics = json.loads((DEMO / "metrics.json").read_text())
    card = (DEMO / "MODEL_CARD.md").read_text()
    assert card == import_card().render_card(metrics)
    for name in ("proxy", "gold", "lexicon"):
        assert f"| {name} | {metrics[name]['pearson_r']} (" in card
    assert f"perplexity {metrics['policy']['held_out_perplexity_per_token']} per token" in card


def test_gold_is_a_better_judge_than_the_proxy_and_the_lexicon() -> None:
    metrics = json.loads((DEMO / "metrics.json").read_text())
    assert metrics["gold"]["pearson_r"] > 0.6
    assert 0.2 < metrics["proxy"]["pearson_r"] < 0.5
    assert metrics["gold"]["pearson_r_ci95"][0] > metrics["lexicon"]["pearson_r_ci95"][1]


def test_members_know_their_scale() -> None:
    for seed, name in enumerate(MEMBERS, 1):
        known = stored.read(f"demo:{name}")
        assert known is not None
        assert known.seed == seed
        assert known.mean == pytest.approx(0, abs=0.01)
        assert known.sd == pytest.approx(1, abs=0.01)


def test_five_members_together_are_a_better_judge_than_each_alone() -> None:
    """On held-out sentences, as measured by the build; their errors must differ for that."""
    ensemble = json.loads((DEMO / "metrics.json").read_text())["ensemble"]
    alone = [member["pearson_r_ci95"][1] for member in ensemble["members"].values()]
    assert ensemble["mean"]["pearson_r_ci95"][0] > max(alone) - 0.01
    assert ensemble["mean_error_correlation"] < 0.5
