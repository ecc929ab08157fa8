"""Measure the saved models: everything that the card says."""

import copy
import math
import random
import statistics
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from corpus import EOS_ID, Corpus, encode, lexicon_score
from degenerate import is_repetitive, make_degenerate
from torch import Tensor
from training import Ids, mean_nlls, overoptimise, sample, score, strip_eos
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

NUM_NEW_TOKENS = 24
NUM_RESAMPLES = 300


@torch.no_grad()
def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's r."""
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def pair_accuracy(scores: Tensor, ratings: Tensor) -> float:
    """Share of all pairs with different ratings that the scores put in the same order."""
    order = (ratings[:, None] - ratings[None, :]).sign()
    agree = (scores[:, None] - scores[None, :]).sign() == order
    return float(agree[order != 0].float().mean())


def residual(scores: Tensor, ratings: Tensor) -> Tensor:
    """Scores less their least-squares line over the ratings."""
    centred = ratings - ratings.mean()
    slope = (scores * centred).sum() / (centred**2).sum()
    return scores - scores.mean() - slope * centred


def mean_correlation(rows: Tensor) -> float:
    """Mean of Pearson's r over all pairs of rows (K, N)."""
    table = torch.corrcoef(rows)
    upper = torch.triu(torch.ones_like(table, dtype=torch.bool), diagonal=1)
    return float(table[upper].mean())


def agreement(scores: Tensor, ratings: Tensor, seed: int) -> dict[str, Any]:
    """r and pair accuracy, each with a 95% bootstrap interval over sentences."""
    generator = torch.Generator().manual_seed(seed)
    resamples = [
        torch.randint(len(scores), (len(scores),), generator=generator)
        for _ in range(NUM_RESAMPLES)
    ]
    result: dict[str, Any] = {}
    for name, measure in (("pearson_r", pearson), ("pair_accuracy", pair_accuracy)):
        drawn = sorted(measure(scores[i], ratings[i]) for i in resamples)
        low, high = drawn[int(0.025 * NUM_RESAMPLES)], drawn[int(0.975 * NUM_RESAMPLES)]
        result[name] = round(measure(scores, ratings), 3)
        result[f"{name}_ci95"] = [round(low, 3), round(high, 3)]
    return result


def spread(scores: Tensor) -> dict[str, float]:
    """Mean, sd and the two outer twentieths."""
    low, high = torch.quantile(scores, torch.tensor([0.05, 0.95])).tolist()
    mean, sd = float(scores.mean()), float(scores.std())
    return {k: round(v, 2) for k, v in {"mean": mean, "sd": sd, "p5": low, "p95": high}.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurer:
    """The saved models and everything held out from them."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    policy: GPT2LMHeadModel
    proxy: PreTrainedModel
    gold: PreTrainedModel
    members: dict[str, PreTrainedModel]
    prompts: list[Ids]
    reference: list[Ids]
    unseen_praise: list[str]
    seed: int
    attack_steps: int

    def measure(self) -> dict[str, Any]:
        """All figures, by model."""
        texts = [sentence.text for sentence in self.corpus.test]
        ratings = torch.tensor([sentence.mean_rating for sentence in self.corpus.test])
        ids = encode(self.tokenizer, texts, eos=False)
        lexicon = torch.tensor([lexicon_score(t, self.corpus.lexicon) for t in texts])
        proxy, gold = score(self.proxy, ids), score(self.gold, ids)
        on_samples = [score(m, self.reference) for m in (self.proxy, self.gold)]
        return {
            "num_held_out_sentences": len(texts),
            "policy": self.measure_policy(texts),
            "proxy": {
                "num_parameters": self.proxy.num_parameters(),
                **agreement(proxy, ratings, self.seed),
                "pearson_r_with_gold_on_policy_samples": round(pearson(*on_samples), 3),
                "reference": spread(on_samples[0]),
            },
            "ensemble": self.measure_ensemble(ids, ratings, on_samples[1]),
            "gold": {
                "num_parameters": self.gold.num_parameters(),
                **agreement(gold, ratings, self.seed),
                "reference": spread(on_samples[1]),
                "held_out": self.by_rating(gold, ratings),
                "degenerate": self.measure_degenerate(texts, gold),
            },
            "lexicon": agreement(lexicon, ratings, self.seed),
            "attacks": {
                "on_proxy": self.attack(self.proxy),
                "on_gold": self.attack(self.gold),
            },
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def measure_policy(self, texts: list[str]) -> dict[str, Any]:
        """Held-out perplexity, and what samples look like."""
        held_out = encode(self.tokenizer, texts, eos=True)
        nlls, perplexity = mean_nlls(self.policy, held_out)
        nats = float((nlls * torch.tensor([len(ids) - 1 for ids in held_out])).sum())
        num_words = sum(len(text.split()) + 1 for text in texts)  # the end counts as a word
        generator = torch.Generator().manual_seed(self.seed + 5)
        samples = sample(self.policy, self.prompts, NUM_NEW_TOKENS, generator)
        new = [ids[len(p) :] for ids, p in zip(samples, self.prompts, strict=True)]
        shown = random.Random(self.seed).sample(range(len(samples)), 8)
        return {
            "num_parameters": self.policy.num_parameters(),
            "held_out_perplexity_per_token": round(perplexity, 1),
            "held_out_perplexity_per_word": round(math.exp(nats / num_words), 1),
            "share_ended_within_24_tokens": round(
                statistics.mean(ids[-1] == EOS_ID for ids in new), 2
            ),
            "mean_new_tokens": round(statistics.mean(map(len, new)), 1),
            "samples": [
                {
                    "prompt": self.tokenizer.decode(self.prompts[i][1:]),
                    "continuation": self.tokenizer.decode(new[i], skip_special_tokens=True),
                }
                for i in shown
            ],
        }

    def measure_ensemble(
        self, ids: list[Ids], ratings: Tensor, gold_on_samples: Tensor
    ) -> dict[str, Any]:
        """Each member, their mean, and how alike their errors are."""
        scores = {name: score(model, ids) for name, model in self.members.items()}
        table = torch.stack(list(scores.values()))  # (K, N)
        on_samples = torch.stack([score(model, self.reference) for model in self.members.values()])
        # A member's error: its score less what a line through the ratings says.
        errors = torch.stack([residual(values, ratings) for values in table])
        return {
            "members": {n: agreement(s, ratings, self.seed) for n, s in scores.items()},
            "mean": agreement(table.mean(0), ratings, self.seed),
            "mean_error_correlation": round(mean_correlation(errors), 3),
            "on_policy_samples": {
                "mean_correlation_of_members": round(mean_correlation(on_samples), 3),
                "mean_variance_over_members": round(float(on_samples.var(0, False).mean()), 3),
                "pearson_r_of_mean_with_gold": round(
                    pearson(on_samples.mean(0), gold_on_samples), 3
                ),
            },
        }

    def by_rating(self, gold: Tensor, ratings: Tensor) -> dict[str, Any]:
        """How gold spreads over held-out sentences of low, middle and high ratings."""
        bounds = {"rated below -1": (-5.0, -1.0), "rated -1 to 1": (-1.0, 1.0)}
        bounds["rated above 1"] = (1.0, 5.0)
        return {
            name: spread(gold[(ratings > low) & (ratings <= high)])
            for name, (low, high) in bounds.items()
        }

    def measure_degenerate(self, texts: list[str], gold: Tensor) -> dict[str, Any]:
        """Gold on degenerate text made from held-out sentences, against those sentences."""
        made = make_degenerate(texts, self.unseen_praise, 200, self.seed + 6)
        result: dict[str, Any] = {}
        for name, bad in made.items():
            scores = score(self.gold, encode(self.tokenizer, bad, eos=False))
            below = (scores[:, None] < gold[None, :]).float().mean()
            result[name] = spread(scores) | {"share_below_a_real_sentence": round(float(below), 3)}
        return result

    def attack(self, target: PreTrainedModel) -> dict[str, float]:
        """Optimise the policy for `target` alone; what happens to proxy, gold and lexicon."""
        attacker = copy.deepcopy(self.policy)
        steps = list(
            overoptimise(
                attacker,
                self.prompts,
                lambda s: score(target, s),
                num_steps=self.attack_steps,
                lr=3e-4,
                seed=self.seed + 7,
            )
        )
        result: dict[str, Any] = {"num_steps": self.attack_steps}
        for when, part in (("first", steps[:5]), ("last", steps[-5:])):
            ids = [strip_eos(s) for _, samples, _ in part for s in samples]
            texts = [self.tokenizer.decode(s[1:]) for s in ids]
            words = [lexicon_score(text, self.corpus.lexicon) for text in texts]
            result[when] = {
                "proxy_mean": round(float(score(self.proxy, ids).mean()), 2),
                "gold_mean": round(float(score(self.gold, ids).mean()), 2),
                "lexicon_mean": round(statistics.mean(words), 2),
                "share_repetitive": round(statistics.mean(map(is_repetitive, ids)), 2),
                "mean_tokens": round(statistics.mean(map(len, ids)), 1),
                "example": texts[0],
            }
        return result
