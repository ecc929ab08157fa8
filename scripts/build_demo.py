"""Build the demo models that ship inside the package, from their source texts to their card.

    python scripts/build_demo.py            # under half an hour on two busy cores
    python scripts/build_demo.py --quick    # two minutes, poor models: tries the script only

Downloads the rated sentences of Hutto & Gilbert (2014), trains a tokenizer, a policy, a proxy
reward, five more proxies that form an ensemble, and a gold reward, measures what it saved, and
writes everything under src/klippo/demo.
The same seed on the same machine gives the same files. The texts themselves are not kept.
"""

# ruff: noqa: E402 - the parts can only be imported once their folder is on the path

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().with_suffix("")))  # its parts, beside it

from card import render_card
from corpus import (
    EOS_ID,
    PAD_ID,
    VOCAB_SIZE,
    Corpus,
    Sentence,
    download,
    encode,
    load_corpus,
    train_tokenizer,
)
from degenerate import RATING, is_repetitive, make_degenerate
from masked_lm import pretrain_encoder
from measure import Measurer
from prompts import write_prompts
from training import (
    Ids,
    mean_nlls,
    overoptimise,
    sample,
    score,
    strip_eos,
    train_lm,
    train_pairs,
    train_regression,
)

from klippo.rewards import stored


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much of everything; the defaults are the shipped build."""

    policy_passes: tuple[int, int] = (4, 5)  # over all texts, then over movie sentences alone
    proxy_lm_passes: int = 4
    proxy_sentences: int = 800  # each labelled by one random rater
    proxy_pairs: int = 3000
    proxy_epochs: int = 3
    encoder_passes: int = 2
    gold_passes: tuple[int, int] = (2, 1)
    num_policy_samples: int = 3000
    num_negatives_per_kind: int = 500
    attack_rounds: int = 3
    attack_steps: int = 40
    reference_per_prompt: int = 4
    member_seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    max_sentences: int | None = None  # of each text source


QUICK = Plan(
    policy_passes=(1, 0),
    proxy_lm_passes=1,
    encoder_passes=1,
    gold_passes=(1, 0),
    num_policy_samples=200,
    num_negatives_per_kind=50,
    attack_rounds=1,
    attack_steps=3,
    reference_per_prompt=1,
    max_sentences=800,
)


def gpt2_config(width: int, layers: int, heads: int, dropout: float) -> GPT2Config:
    """A small GPT-2 over the demo's vocabulary, with one output where it classifies."""
    return GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=128,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        num_labels=1,
    )


def texts_of(sentences: list[Sentence]) -> list[str]:
    """The texts alone."""
    return [sentence.text for sentence in sentences]


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write float16 weights, the tokenizer, and a config that loads them as float32, undropped."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config: dict[str, object] = json.loads(path.read_text())
    config["dtype"] = "float32"
    for key in config:
        if key.endswith(("pdrop", "dropout")) and not key.startswith("summary"):
            config[key] = 0.0
    path.write_text(json.dumps(config, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


def build_policy(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, plan: Plan, seed: int
) -> GPT2LMHeadModel:
    """First on editorials, product reviews and movie sentences, then on movie sentences alone."""
    torch.manual_seed(seed)
    movies = encode(tokenizer, texts_of(corpus.train), eos=True)
    others = encode(tokenizer, texts_of(corpus.editorials + corpus.products), eos=True)
    model = GPT2LMHeadModel(gpt2_config(160, 4, 4, dropout=0.1))
    broad, narrow = plan.policy_passes
    train_lm(model, [movies + others] * broad + [movies] * narrow, lr=2e-3, seed=seed)
    return model


def noisy_pairs(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    plan: Plan,
    seed: int,
    label_noise: float = 0.0,
) -> list[tuple[Ids, Ids]]:
    """Pairs (better, worse) of few sentences, each judged by one rater drawn once and for all.

    `label_noise` is the share of pairs that are turned round, beyond the raters' own noise.
    """
    rng = random.Random(seed)
    chosen = rng.sample(corpus.train, plan.proxy_sentences)
    ids = encode(tokenizer, texts_of(chosen), eos=False)
    labels = [rng.choice(sentence.ratings) for sentence in chosen]
    pairs: list[tuple[Ids, Ids]] = []
    while len(pairs) < plan.proxy_pairs:
        a, b = rng.sample(range(len(chosen)), 2)
        if labels[a] != labels[b]:
            pairs.append((ids[a], ids[b]) if labels[a] > labels[b] else (ids[b], ids[a]))
    for i in rng.sample(range(len(pairs)), round(label_noise * len(pairs))):
        pairs[i] = pairs[i][::-1]
    return pairs


def build_proxy(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    plan: Plan,
    seed: int,
    label_noise: float = 0.0,
) -> GPT2ForSequenceClassification:
    """A narrow trunk, first a language model, then Bradley-Terry on few noisy comparisons."""
    torch.manual_seed(seed + 1)
    movies = encode(tokenizer, texts_of(corpus.train), eos=True)
    config = gpt2_config(64, 3, 2, dropout=0.1)
    trunk = GPT2LMHeadModel(config)
    train_lm(trunk, [movies] * plan.proxy_lm_passes, lr=2e-3, seed=seed + 1)
    model = GPT2ForSequenceClassification(config)
    model.transformer.load_state_dict(trunk.transformer.state_dict())
    pairs = noisy_pairs(corpus, tokenizer, plan, seed + 1, label_noise)
    train_pairs(model, pairs, plan.proxy_epochs, lr=1e-3, seed=seed + 1)
    return model


def build_members(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    reference: list[Ids],
    plan: Plan,
    seed: int,
    out: Path,
    label_noise: float = 0.0,
) -> list[str]:
    """Proxies that share their recipe and nothing else; returns their names.

    Each has its own initialisation, its own sentences and its own raters: an ensemble lives on
    members that err in different places. Like the others they are scaled to mean 0 and sd 1 on the
    reference samples, which their klippo_reward.json says.
    """
    names = []
    for member_seed in plan.member_seeds:
        name = f"proxy_seed{member_seed}"
        member = build_proxy(corpus, tokenizer, plan, seed + 100 * member_seed, label_noise)
        normalise(member, reference)
        save(member, tokenizer, out / name)
        scores = score(reload(out / name, GPT2ForSequenceClassification), reference)
        stored.write(
            out / name,
            stored.StoredReward(
                template="{prompt}{response}",
                mean=round(float(scores.mean()), 4),
                sd=round(float(scores.std()), 4),
                num_samples=len(reference),
                policy="demo:policy",
                seed=member_seed,
            ),
        )
        names.append(name)
    return names


def encoder_config() -> ModernBertConfig:
    """A small bidirectional encoder with mean pooling, so that every token has its say."""
    return ModernBertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        global_attn_every_n_layers=1,
        embedding_dropout=0.1,
        mlp_dropout=0.1,
        classifier_dropout=0.1,
        classifier_pooling="mean",
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        cls_token_id=EOS_ID,
        sep_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        num_labels=1,
    )


def build_gold(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    policy: GPT2LMHeadModel,
    prompts: list[Ids],
    praise: list[str],
    plan: Plan,
    seed: int,
) -> ModernBertForSequenceClassification:
    """Sentiment from every mean rating, degenerate text at -3, hardened by attacks on itself.

    A teacher of sentiment alone rates samples of the policy, so that the gold model reads the
    policy's half-fluent sentences as sentences and not as word salad.
    """
    torch.manual_seed(seed + 2)
    rated = corpus.train + corpus.editorials + corpus.products + corpus.tweets
    broad = rate(tokenizer, rated)
    movies = rate(tokenizer, corpus.train)
    start = ModernBertForSequenceClassification(encoder_config())
    pretrain_encoder(start, [[ids for ids, _ in broad]] * plan.encoder_passes, seed=seed + 2)

    num_broad, num_movies = plan.gold_passes
    teacher = copy.deepcopy(start)
    train_regression(teacher, [broad] * num_broad, lr=1e-3, seed=seed + 2)
    generator = torch.Generator().manual_seed(seed + 2)
    drawn = random.Random(seed + 2).choices(prompts, k=plan.num_policy_samples)
    samples = [strip_eos(ids) for ids in sample(policy, drawn, 24, generator)]
    pseudo = list(zip(samples, score(teacher, samples).tolist(), strict=True))

    made = make_degenerate(texts_of(corpus.train), praise, plan.num_negatives_per_kind, seed + 2)
    bad_texts = [text for texts in made.values() for text in texts]
    bad = [(ids, RATING) for ids in encode(tokenizer, bad_texts, eos=False)]
    gold = start
    passes = [broad + pseudo + bad] * num_broad + [movies + pseudo + bad] * num_movies
    train_regression(gold, passes, lr=1e-3, seed=seed + 2)

    for attack in range(plan.attack_rounds):
        found = attack_samples(policy, gold, prompts, plan, seed=seed + 10 + attack)
        bad += [(ids, RATING) for ids in found]
        print(f"  attack {attack + 1}: {len(found)} repetitive samples")
        train_regression(gold, [movies + pseudo + bad], lr=4e-4, seed=seed + 10 + attack)
    return gold


def rate(tokenizer: PreTrainedTokenizerFast, sentences: list[Sentence]) -> list[tuple[Ids, float]]:
    """Ids and mean rating of every sentence."""
    ids = encode(tokenizer, texts_of(sentences), eos=False)
    return list(zip(ids, [sentence.mean_rating for sentence in sentences], strict=True))


def attack_samples(
    policy: GPT2LMHeadModel, gold: PreTrainedModel, prompts: list[Ids], plan: Plan, seed: int
) -> list[Ids]:
    """What a copy of the policy says when it optimises `gold` alone and falls into repetition."""
    attacker = copy.deepcopy(policy)
    steps = overoptimise(
        attacker, prompts, lambda s: score(gold, s), num_steps=plan.attack_steps, lr=1e-3, seed=seed
    )
    ids = [strip_eos(s) for _, samples, _ in steps for s in samples]
    return [s for s in ids if is_repetitive(s)]


@torch.no_grad()
def normalise(model: PreTrainedModel, reference: list[Ids]) -> tuple[float, float]:
    """Fold (score - mean) / sd over `reference` into the last layers; return the raw mean and sd.

    GPT-2's score head has no bias, but the layer norm before it has one and feeds nothing else:
    moving that bias by -mean * w / |w|^2 moves every score by exactly -mean.
    """
    scores = score(model, reference)
    mean, sd = float(scores.mean()), float(scores.std())
    if isinstance(model, GPT2ForSequenceClassification):
        weight = model.score.weight[0]
        model.transformer.ln_f.bias -= mean * weight / weight.dot(weight)
        model.score.weight /= sd
    else:
        model.classifier.bias -= mean
        model.classifier.weight /= sd
        model.classifier.bias /= sd
    return mean, sd


def reload(folder: Path, kind: Any) -> Any:
    """The model as users get it: float16 on disk, float32 in memory."""
    return kind.from_pretrained(folder).eval()


def build(out: Path, source: Path, plan: Plan, seed: int, keep: Sequence[str]) -> None:
    """Every step in order, each timed; the card comes last, from what was measured.

    What `keep` names (policy, proxy, gold, members) is taken from `out` as it is.
    """
    started = time.monotonic()

    def report(stage: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {stage}", flush=True)

    corpus = load_corpus(download(source), seed, plan.max_sentences)
    tokenizer = train_tokenizer(texts_of(corpus.train))
    rows = write_prompts()
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (out / "prompts.jsonl").write_text(lines)
    prompts = encode(tokenizer, [row["prompt"] for row in rows], eos=False)
    report(f"{len(corpus.train)} movie sentences to train on, {len(rows)} prompts")

    if "policy" not in keep:
        save(build_policy(corpus, tokenizer, plan, seed), tokenizer, out / "policy")
    policy = reload(out / "policy", GPT2LMHeadModel)
    held_out = encode(tokenizer, texts_of(corpus.test), eos=True)
    report(f"policy: held-out perplexity {mean_nlls(policy, held_out)[1]:.1f}")

    generator = torch.Generator().manual_seed(seed + 3)
    drawn = prompts * plan.reference_per_prompt
    reference = [strip_eos(ids) for ids in sample(policy, drawn, 24, generator)]
    for ids in reference[:12]:
        print("   ", tokenizer.decode(ids[1:]))

    praise_words = frequent_praise(corpus)
    raw = stored_scales(out) if {"proxy", "gold"} & set(keep) else {}
    if "proxy" not in keep:
        proxy = build_proxy(corpus, tokenizer, plan, seed)
        raw["proxy"] = normalise(proxy, reference)
        save(proxy, tokenizer, out / "proxy")
        report("proxy")
    if "members" not in keep:
        build_members(corpus, tokenizer, reference, plan, seed, out)
        report("members")
    if "gold" not in keep:
        gold = build_gold(corpus, tokenizer, policy, prompts, praise_words[::2], plan, seed)
        raw["gold"] = normalise(gold, reference)
        save(gold, tokenizer, out / "gold")
        report("gold")

    measurer = Measurer(
        corpus=corpus,
        tokenizer=tokenizer,
        policy=policy,
        proxy=reload(out / "proxy", AutoModelForSequenceClassification),
        gold=reload(out / "gold", AutoModelForSequenceClassification),
        members={
            name: reload(out / name, AutoModelForSequenceClassification)
            for name in (f"proxy_seed{member}" for member in plan.member_seeds)
        },
        prompts=prompts,
        reference=reference,
        unseen_praise=praise_words[1::2],
        seed=seed,
        attack_steps=2 * plan.attack_steps,
    )
    metrics = measurer.measure() | {
        "seed": seed,
        "raw_reference": {
            name: {"mean": round(mean, 4), "sd": round(sd, 4)} for name, (mean, sd) in raw.items()
        },
    }
    metrics |= sycophancy_figures(out)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (out / "MODEL_CARD.md").write_text(render_card(metrics))
    report("measured")


def stored_scales(out: Path) -> dict[str, tuple[float, float]]:
    """The raw mean and sd of rewards that an earlier build measured."""
    earlier = json.loads((out / "metrics.json").read_text())["raw_reference"]
    return {name: (values["mean"], values["sd"]) for name, values in earlier.items()}


def sycophancy_figures(out: Path) -> dict[str, Any]:
    """What scripts/build_sycophancy_demo.py measured here before, under its name."""
    path = out / "metrics.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    return {name: earlier[name] for name in ("sycophancy",) if name in earlier}


def frequent_praise(corpus: Corpus) -> list[str]:
    """Strongly positive words of the lexicon that the movie sentences use."""
    used = {word.strip(".,;:!?") for s in corpus.train for word in s.text.lower().split()}
    return sorted(w for w, v in corpus.lexicon.items() if v >= 2 and w.isalpha() and w in used)


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "src/klippo/demo")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(tempfile.gettempdir()) / "klippo-demo-source",
        help="where the source texts are downloaded to, or already are",
    )
    parser.add_argument("--quick", action="store_true", help="poor models in two minutes")
    parser.add_argument(
        "--keep",
        nargs="+",
        choices=("policy", "proxy", "gold", "members"),
        default=(),
        help="take these from --out, built with the same seed, and build the rest",
    )
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    build(args.out, args.source, QUICK if args.quick else Plan(), args.seed, args.keep)


if __name__ == "__main__":
    main()
