"""How far two computations of one number may lie apart: derived, never tuned.

A processor adds the terms of a sum in an order of its own (the width of its vectors, the number of
threads), and each order rounds otherwise. A tolerance that was tried out on one machine therefore
fails on another. So tests do one of two things:

- Models and learners compute in float64 (`gpt2().double()`, `oracle(...)`), and results agree to
  `FLOAT64`. Rounding is then a million times smaller than any mistake worth finding.
- What is float32 on purpose, on few operations, is compared with float64 and `float32(...)`, a
  bound from the number of roundings (N. Higham, Accuracy and Stability of Numerical Algorithms,
  2nd ed., 2002, chapters 2-4).

What must be equal bit by bit (a resumed run, two processes of one run) is compared on one machine.
"""

import torch

FLOAT64 = {"atol": 1e-9, "rtol": 1e-9}
"""For `assert_close` of float64 results.

A toy step chains about 10^4 roundings (2 layers, sums of at most 24 terms, 14 tokens, up to 12
optimizer steps), each of at most 1.1e-16 of numbers below 10^2: 1e-10 if all of them point the same
way. AdamW multiplies a gradient's error by at most learning rate / eps = 10^3 where gradients
vanish, but there the numbers are below 1e-3. A wrong term, sign or mask shows at 1e-6 or more.
"""
FLOAT64_APPROX = {"abs": 1e-9, "rel": 1e-9}
"""The same for `pytest.approx`."""


def gamma(num_roundings: int, dtype: torch.dtype = torch.float32) -> float:
    """Bound on the relative error of a product of `num_roundings` factors 1 + d, |d| <= u.

        gamma_n = n u / (1 - n u),    u = half the distance from 1 to the next number

    Higham, lemma 3.1. It holds for every order of the operations.
    """
    unit = torch.finfo(dtype).eps / 2
    return num_roundings * unit / (1 - num_roundings * unit)
