"""Less memory, same numbers: checkpointed activations, also under adapters; bfloat16 autocast."""

import pytest

from tests.tolerance import FLOAT64
from tests.toys import assert_same_tensors, weights

LORA = {"tuning": "lora", "lora": {"rank": 4, "alpha": 8}}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("model", [{}, LORA], ids=["full", "lora"])
def test_checkpointed_gradients_train_the_same_model(model, gpt2, train):
    kept, _ = train(gpt2, model=model, learning_rate=1e-3, batch_size=40)
    again, _ = train(
        gpt2, model=model, learning_rate=1e-3, batch_size=40, gradient_checkpointing=True
    )
    assert_same_tensors(weights(kept.model), weights(again.model), **FLOAT64)
    assert again.model.config.use_cache


def test_autocast_trains_weights_that_stay_float32(gpt2, train):
    import torch

    member, steps = train(gpt2, autocast=True, num_epochs=6)
    assert {p.dtype for p in member.model.parameters()} == {torch.float32}
    assert steps[-1][2]["accuracy"] == 1
