"""How far two computations of one number may lie apart: derived, never tuned.

A processor adds the terms of a sum in its own order (by the width of its vectors and the number of
threads), and each order rounds differently. A tolerance that was tried out on one machine fails on
another. So a test does one of three things:

- Models and learners compute in float64, and results agree to `FLOAT64`: rounding is then a million
  times smaller than any mistake worth catching. The toys are float64 (toys.py), and code of others
  that would narrow to float32 runs inside `NoFloat32`.
- Few float32 operations are compared with `float32(n, largest)`, a bound from the number of
  roundings on the way to a result.
- What must be equal bit by bit (a resumed run, two processes) is compared on one machine.

Source: N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 2002, chapters 2 to 4.
"""

import torch
from torch.overrides import TorchFunctionMode

FLOAT64 = {"atol": 1e-9, "rtol": 1e-9}
"""For `assert_close` of float64 results.

A toy step chains at most 10^4 roundings (2 layers, sums of at most 64 terms, 20 tokens, 12 steps of
the optimizer), each of at most 1.1e-16 of numbers below 10^2: 1e-10 if all of them point the same
way. A wrong term, sign or mask changes results by 1e-6 or more.
"""
FLOAT64_APPROX = {"abs": FLOAT64["atol"], "rel": FLOAT64["rtol"]}
"""The same for `pytest.approx`."""


class NoFloat32(TorchFunctionMode):
    """Inside, code that narrows numbers to float32, by name or by default, keeps them in float64.

    transformers computes norms and attention weights in float32 even if the weights are float64,
    and scores and rollouts hold float32, which would bring its rounding back into a comparison.
    """

    def __enter__(self):
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_default_dtype(self.default)
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        elif args and isinstance(args[0], torch.Tensor) and func is not torch.Tensor.view:

            def widened(x):
                return torch.float64 if x is torch.float32 else x

            args = [widened(x) for x in args]
            kwargs = {name: widened(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)


def gamma(num_roundings: int, dtype: torch.dtype = torch.float32) -> float:
    """The relative error after `num_roundings` operations, at most, in any order.

        gamma_n = n u / (1 - n u),    u = half the distance from 1 to the next number

    Higham, lemma 3.1. A sum of n terms has n - 1 roundings, and its error is relative to the sum of
    the terms' absolute values.
    """
    unit = torch.finfo(dtype).eps / 2
    return num_roundings * unit / (1 - num_roundings * unit)


def float32(num_roundings: int, largest: float = 1.0) -> dict[str, float]:
    """For `assert_close`: float32 results, `num_roundings` away from numbers up to `largest`."""
    return {"atol": gamma(num_roundings) * largest, "rtol": gamma(num_roundings)}


def float32_approx(num_roundings: int, largest: float = 1.0) -> dict[str, float]:
    """The same for `pytest.approx`."""
    return {"abs": gamma(num_roundings) * largest, "rel": gamma(num_roundings)}
