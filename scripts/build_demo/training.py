"""Training, sampling and scoring for the demo models.

B sequences, L tokens (right-padded), V vocabulary.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from corpus import EOS_ID, PAD_ID
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

Ids = list[int]
Batch = list[int]  # indices into a pool


def autocast() -> torch.autocast:
    """Matrix products in bfloat16, everything else in float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def pad(sequences: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Right-pad to token ids (B, L) and a mask (B, L) that is 1 on real tokens."""
    length = max(map(len, sequences))
    ids = torch.tensor([s + [PAD_ID] * (length - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences])
    return ids, mask


def length_batches(pool: Sequence[Ids], batch_size: int, rng: random.Random) -> list[Batch]:
    """Batches of sequences of about equal length, in random order."""
    order = sorted(range(len(pool)), key=lambda i: len(pool[i]) + 4 * rng.random())
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


class Optimizer:
    """Muon for the matrices inside the blocks, AdamW for the rest, linear warm-up and cosine decay.

    On this little text Muon reaches a held-out perplexity of 74 where AdamW reaches 92 after the
    same five passes.
    """

    def __init__(self, model: PreTrainedModel, num_steps: int, lr: float) -> None:
        named = list(model.named_parameters())
        inner = [p for n, p in named if p.ndim == 2 and (".h." in n or ".layers." in n)]
        inner_ids = {id(p) for p in inner}
        outer = [p for _, p in named if id(p) not in inner_ids]
        matrices = {"params": [p for p in outer if p.ndim > 1], "weight_decay": 0.1}
        vectors = {"params": [p for p in outer if p.ndim <= 1], "weight_decay": 0.0}
        self.parameters = [p for _, p in named]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inner, lr=10 * lr, weight_decay=0.1),
            torch.optim.AdamW([matrices, vectors], lr=1.5 * lr, betas=(0.9, 0.98)),
        ]

        def factor(step: int) -> float:
            progress = min(1.0, step / num_steps)
            return min(1.0, (step + 1) / 50) * (0.01 + 0.495 * (1 + math.cos(math.pi * progress)))

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in self.optimizers]

    def step(self, loss: Tensor) -> None:
        """One update down the gradient of `loss`."""
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)


def token_losses(model: GPT2LMHeadModel, sequences: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """-log p of every token after the first (B, L-1), and the mask of the real ones."""
    ids, mask = pad(sequences)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses * mask[:, 1:], mask[:, 1:]


def train_lm(model: GPT2LMHeadModel, passes: Sequence[Sequence[Ids]], lr: float, seed: int) -> None:
    """Next-token training, one pool of sequences a pass."""
    rng = random.Random(seed)
    plan = [(pool, batch) for pool in passes for batch in length_batches(pool, 32, rng)]
    optimizer = Optimizer(model, len(plan), lr)
    model.train()
    for pool, batch in plan:
        with autocast():
            losses, mask = token_losses(model, [pool[i] for i in batch])
        optimizer.step(losses.sum() / mask.sum())
    model.eval()


@torch.no_grad()
def mean_nlls(model: GPT2LMHeadModel, pool: Sequence[Ids]) -> tuple[Tensor, float]:
    """Each sequence's mean -log p per token (B,), and the perplexity over all tokens."""
    sums, counts = torch.zeros(len(pool)), torch.zeros(len(pool))
    for batch in length_batches(pool, 64, random.Random(0)):
        losses, mask = token_losses(model, [pool[i] for i in batch])
        sums[batch], counts[batch] = losses.sum(1), mask.sum(1).float()
    return sums / counts, math.exp(float(sums.sum() / counts.sum()))


def regression_batches(
    parts: Sequence[Sequence[tuple[Ids, float]]], rng: random.Random
) -> Iterator[tuple[list[Ids], Tensor]]:
    """One pass over each part in turn: sequences and their target ratings (B,)."""
    for part in parts:
        pool = [ids for ids, _ in part]
        for batch in length_batches(pool, 32, rng):
            yield [pool[i] for i in batch], torch.tensor([part[i][1] for i in batch])


def train_regression(
    model: PreTrainedModel, passes: Sequence[Sequence[tuple[Ids, float]]], lr: float, seed: int
) -> None:
    """Squared error on ratings, one pool of (sequence, rating) a pass.

    Half of the sequences lose their eos and a fifth their end, so that the score reads a text
    that was cut by length as it reads a finished one.
    """
    rng = random.Random(seed)
    plan = list(regression_batches(passes, rng))
    optimizer = Optimizer(model, len(plan), lr)
    model.train()
    for sequences, ratings in plan:
        ids, mask = pad([vary_end(s, rng) for s in sequences])
        with autocast():
            scores = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        optimizer.step(F.mse_loss(scores.float(), ratings))
    model.eval()


def vary_end(ids: Ids, rng: random.Random) -> Ids:
    """Append eos to half of the sequences; cut a fifth somewhere in their second half."""
    choice = rng.random()
    if choice < 0.2 and len(ids) > 8:
        return ids[: rng.randint(len(ids) // 2, len(ids))]
    return [*ids, EOS_ID] if choice < 0.6 else ids


def train_pairs(
    model: PreTrainedModel, pairs: Sequence[tuple[Ids, Ids]], num_epochs: int, lr: float, seed: int
) -> None:
    """Bradley-Terry on (better, worse): -log sigmoid(score(better) - score(worse))."""
    rng = random.Random(seed)
    plan = [
        [pairs[i] for i in batch]
        for _ in range(num_epochs)
        for batch in length_batches([better for better, _ in pairs], 32, rng)
    ]
    optimizer = Optimizer(model, len(plan), lr)
    model.train()
    for batch in plan:
        ids, mask = pad([vary_end(s, rng) for pair in batch for s in pair])
        with autocast():
            scores = model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        optimizer.step(-F.logsigmoid(scores[0::2] - scores[1::2]).mean())
    model.eval()


@torch.no_grad()
def score(model: PreTrainedModel, pool: Sequence[Ids]) -> Tensor:
    """The model's scalar for every sequence (B,)."""
    scores = torch.zeros(len(pool))
    for batch in length_batches(pool, 128, random.Random(0)):
        ids, mask = pad([pool[i] for i in batch])
        scores[batch] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
    return scores


@torch.no_grad()
def sample(
    policy: GPT2LMHeadModel, prompts: Sequence[Ids], num_new: int, generator: torch.Generator
) -> list[Ids]:
    """Continue every prompt at temperature 1, up to eos (kept) or `num_new` tokens."""
    done: list[Ids] = [[] for _ in prompts]
    by_length: dict[int, Batch] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    for rows in by_length.values():
        ids = torch.tensor([prompts[i] for i in rows])
        step, cache = ids, None
        for _ in range(num_new):
            out = policy(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            probabilities = out.logits[:, -1].softmax(-1)
            probabilities[:, PAD_ID] = 0
            step = torch.multinomial(probabilities, 1, generator=generator)
            ids = torch.cat([ids, step], dim=1)
        for row, i in enumerate(rows):
            start, tokens = len(prompts[i]), ids[row].tolist()
            end = tokens.index(EOS_ID, start) + 1 if EOS_ID in tokens[start:] else len(tokens)
            done[i] = tokens[:end]
    return done


def strip_eos(ids: Ids) -> Ids:
    """The text's ids alone: bos stays, a final eos goes."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == EOS_ID else ids


def overoptimise(
    policy: GPT2LMHeadModel,
    prompts: Sequence[Ids],
    reward: Callable[[list[Ids]], Tensor],
    *,
    num_steps: int,
    lr: float,
    seed: int,
) -> Iterator[tuple[int, list[Ids], Tensor]]:
    """Train `policy` in place by REINFORCE without any KL penalty; yield each step's samples.

    A crude attack, no PPO: whitened rewards times log-probs, AdamW. It finds what a reward pays
    for when nothing holds the policy back.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    policy.eval()
    for step in range(num_steps):
        batch = [prompts[i] for i in sorted(rng.sample(range(len(prompts)), 96))]
        samples = sample(policy, batch, 24, generator)
        rewards = reward([strip_eos(s) for s in samples])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        with autocast():
            losses, mask = token_losses(policy, samples)
        new = mask.clone()
        for row, prompt in enumerate(batch):
            new[row, : len(prompt) - 1] = 0
        loss = (losses * new * advantages[:, None]).sum() / new.sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        yield step, samples, rewards
