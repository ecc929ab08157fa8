"""Masked-language-model pretraining of the gold model's encoder."""

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from corpus import PAD_ID, VOCAB_SIZE
from torch import nn
from training import Ids, Optimizer, autocast, length_batches, pad
from transformers import ModernBertForSequenceClassification

MASK_RATE = 0.2


def pretrain_encoder(
    model: ModernBertForSequenceClassification, passes: Sequence[Sequence[Ids]], seed: int
) -> None:
    """Guess hidden tokens from both sides; the guessing layer is dropped afterwards.

    A hidden token is shown as the pad id, which attention reads like any other id, so the
    vocabulary needs no mask token; a tenth of the hidden ones keep their own id.
    """
    rng = random.Random(seed)
    guess = nn.Linear(model.config.hidden_size, VOCAB_SIZE)
    guess.weight = model.model.embeddings.tok_embeddings.weight  # tied
    plan = [(pool, batch) for pool in passes for batch in length_batches(pool, 32, rng)]
    optimizer = Optimizer(model, len(plan), lr=1.5e-3)
    model.train()
    for pool, batch in plan:
        ids, mask = pad([pool[i] for i in batch])
        hidden = (torch.rand(ids.shape) < MASK_RATE) & (mask == 1)
        hidden[:, 0] = False
        shown = ids.masked_fill(hidden & (torch.rand(ids.shape) < 0.9), PAD_ID)
        with autocast():
            states = model.model(input_ids=shown, attention_mask=mask).last_hidden_state
            logits = guess(model.head(states[hidden]))
        optimizer.step(F.cross_entropy(logits.float(), ids[hidden]))
    model.eval()
