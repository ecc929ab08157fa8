"""Direct preference optimisation of a causal LM (Rafailov et al. 2023, eq. 7), by TRL's DPOTrainer.

loss = -log sigmoid(margin), margin = r(chosen) - r(rejected), with the implicit reward
r(y) = beta * (log pi(y) - log pi_start(y)) summed over the response's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from klippo.supervised.sft import NOT_LEARNT, Example, nats_per_token
from klippo.supervised.training import Report, Training, train_causal

Pair = tuple[Example, Example]
"""Chosen and rejected, with the same prompt."""


def optimize_preferences(
    model: Any,
    start: Any | None,
    tokenizer: Any,
    pairs: Sequence[Pair],
    training: Training,
    report: Report,
    *,
    beta: float,
) -> Any:
    """The model trained on the pairs, against the frozen `start`.

    A PeftModel needs no `start`: TRL keeps a frozen copy of its adapter as it is now. Raises
    DivergedError when training fails.
    """
    from trl import DPOConfig, DPOTrainer

    class TokenizedDPOTrainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # token ids already, as PPO reads them

    return train_causal(
        TokenizedDPOTrainer,
        DPOConfig,
        model,
        tokenizer,
        columns(pairs),
        training,
        report,
        options={"beta": beta},
        ref_model=start,
    )


def columns(pairs: Sequence[Pair]) -> dict[str, list[list[int]]]:
    """What TRL's collator reads: prompt_ids, chosen_ids and rejected_ids."""
    lengths = [chosen.labels.count(NOT_LEARNT) for chosen, _ in pairs]
    return {
        "prompt_ids": [c.input_ids[:n] for (c, _), n in zip(pairs, lengths, strict=True)],
        "chosen_ids": [c.input_ids[n:] for (c, _), n in zip(pairs, lengths, strict=True)],
        "rejected_ids": [r.input_ids[n:] for (_, r), n in zip(pairs, lengths, strict=True)],
    }


def log_ratios(model: Any, pairs: Sequence[Pair], batch_size: int) -> list[float]:
    """log pi(chosen) - log pi(rejected) of each pair, nats."""
    chosen, rejected = (
        [
            -nats * (len(example.labels) - example.labels.count(NOT_LEARNT))
            for nats, example in zip(nats_per_token(model, side, batch_size), side, strict=True)
        ]
        for side in ([c for c, _ in pairs], [r for _, r in pairs])
    )
    return [c - r for c, r in zip(chosen, rejected, strict=True)]
