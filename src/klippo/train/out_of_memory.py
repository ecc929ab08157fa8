"""When memory runs out in a run: in which phase, what is big, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from klippo.errors import OutOfMemoryError
from klippo.runs.memory import GIB
from klippo.train.memory import changes, model_weights
from klippo.train.session import Session

DOING = {
    "generate": "sampling responses (phase generate)",
    "forward": "log-probs and values of the responses (phase forward)",
    "score": "scoring responses (phase score)",
    "update": "the update (phase update)",
    "evaluate": "an evaluation",
}


@contextmanager
def explaining_memory(phase: str, session: Session) -> Iterator[None]:
    """Raise OutOfMemoryError instead of what PyTorch or Python raises when memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        weights = model_weights(session.policy, session.reference)
        listed = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in weights.items() if size)
        raise OutOfMemoryError(
            f"{session.device} ran out of memory in {DOING.get(phase, phase)}: {first}. Weights "
            f"alone are {listed}; klippo train --dry-run shows all. Change "
            f"{changes(session.config, phase)}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """True for a GPU's, for Python's, and for PyTorch's on the CPU, which is a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in text or "out of memory" in text
    )
