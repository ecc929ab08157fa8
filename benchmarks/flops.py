"""Floating-point operations of a forward and backward pass, from a model's own shapes.

A product of an (n, i) with an (i, o) matrix is 2 n i o operations. In an update each weight that
trains takes three such products (forward, gradient of the input, gradient of the weight) and each
frozen one two. Attention multiplies queries with keys, and the result with values: two products
forward and four backward, all of (length, length) for every sequence, whatever the mask hides.
The gradient of the first block's input counts too, although nobody needs it under LoRA.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from workload import Workload

TRAINED_PASSES, FROZEN_PASSES = 3, 2
ATTENTION_PRODUCTS = 6


class Product(NamedTuple):
    """`number` weights of one shape, each with `rows` vectors in `passes` products."""

    rows: int
    inputs: int
    outputs: int
    number: int
    passes: int

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs * self.number * self.passes


def trunk_products(trunk: Any, rows: int) -> list[Product]:
    """Products of `rows` positions with every matrix of the blocks; looking up is no product."""
    looked_up = {
        id(module.weight) for module in trunk.modules() if isinstance(module, torch.nn.Embedding)
    }
    found: Counter[tuple[int, int, int]] = Counter()
    for weight in trunk.parameters():
        if weight.dim() == 2 and id(weight) not in looked_up:
            passes = TRAINED_PASSES if weight.requires_grad else FROZEN_PASSES
            found[min(weight.shape), max(weight.shape), passes] += 1
    return [
        Product(rows, small, large, number, passes)
        for (small, large, passes), number in found.items()
    ]


def head_product(weight: Any, rows: int) -> Product:
    """The LM head's product at the positions that emit a response."""
    passes = TRAINED_PASSES if weight.requires_grad else FROZEN_PASSES
    return Product(rows, weight.shape[1], weight.shape[0], 1, passes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """A batch: padded prompts with responses. Blocks see every token but the last, whose successor
    nobody asks for, and the LM head sees the positions that emit a response."""

    number: int
    prompt_length: int
    response_length: int

    @property
    def length(self) -> int:
        return self.prompt_length + self.response_length - 1

    def policy_products(self, model: Any) -> list[Product]:
        """Of a causal LM."""
        head = model.get_output_embeddings().weight
        return [
            *trunk_products(model.base_model, self.number * self.length),
            head_product(head, self.number * self.response_length),
        ]

    def critic_products(self, trunk: Any) -> list[Product]:
        """Of a critic of its own; its head of one output is too small to count."""
        return trunk_products(trunk, self.number * self.length)

    def attention(self, config: Any) -> int:
        """Operations on queries, keys and values in all layers, forward and backward."""
        of_a_product: int = 2 * self.number * self.length**2 * config.hidden_size
        num_layers: int = config.num_hidden_layers
        return ATTENTION_PRODUCTS * of_a_product * num_layers


def rates(
    products: Sequence[Product],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 0.5,
    most_elements: int | None = None,
) -> tuple[float, float]:
    """GFLOP/s (processor time, wall time) of products of these shapes, each for so many seconds.

    Each shape counts by its share of the work. Results have at most `most_elements` numbers: the
    loss, too, runs the LM head in chunks.
    """
    work = cpu_total = wall_total = 0.0
    for product in products:
        rows = product.rows
        if most_elements is not None:
            rows = min(rows, max(most_elements // product.outputs, 1))
        left = torch.randn(rows, product.inputs, dtype=dtype, device=device)
        right = torch.randn(product.outputs, product.inputs, dtype=dtype, device=device)
        out = left @ right.T
        synchronize(device)
        each, repeats = 2.0 * rows * product.inputs * product.outputs, 0
        start, cpu_start = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            torch.mm(left, right.T, out=out)
            synchronize(device)
            repeats += 1
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        work += product.operations
        cpu_total += product.operations * cpu / (repeats * each)
        wall_total += product.operations * wall / (repeats * each)
    return work / cpu_total / 1e9, work / wall_total / 1e9


def of_update(
    workload: Workload,
    prompts: Sequence[str],
    tokenizer: Any,
    policy: Any,
    critic: Any | None,
) -> dict[str, float]:
    """GFLOP of an update's epochs, and GFLOP/s of products of its shapes, measured now.

    `policy` is a causal LM with its adapters, `critic` the trunk of a critic of its own.
    """
    sequences = Sequences(
        number=workload.batch_size,
        prompt_length=max(len(ids) for ids in tokenizer(list(prompts))["input_ids"]),
        response_length=workload.response_length,
    )
    products, attention = sequences.policy_products(policy), sequences.attention(policy.config)
    if critic is not None:
        products += sequences.critic_products(critic)
        attention *= 2
    _, rate = rates(products, dtype=workload.torch_dtype, device=workload.device)
    gflop = workload.num_epochs * (operations(products) + attention) / 1e9
    return {"update_gflop": round(gflop, 1), "matmul_gflops": round(rate, 1)}


def operations(products: Iterable[Product]) -> int:
    return sum(product.operations for product in products)


def synchronize(device: str) -> None:
    """Wait for the GPU, where there is one to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()
