"""When memory runs out on the way: in which phase, what is big there, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from klippo.errors import OutOfMemoryError
from klippo.hub import code_option
from klippo.runs.memory import GIB
from klippo.train.memory import MemoryEstimate
from klippo.train.memory_check import changes, estimate_on
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
    """Raise OutOfMemoryError in place of what PyTorch or Python raises when memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(explanation(phase, session, error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """True for a GPU's, for Python's, and for PyTorch's on the CPU, which is a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in text or "out of memory" in text
    )


def explanation(phase: str, session: Session, error: BaseException) -> str:
    """The phase, its biggest components as estimated, and what to change."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    estimate = _estimate(session)
    sizes = ""
    if estimate is not None and phase in estimate.phases:
        biggest = estimate.biggest(phase)
        listed = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in biggest)
        total = estimate.total(phase) / GIB
        sizes = f" Estimated there: {total:.2f} GiB, most of it {listed}."
    return (
        f"{session.device} ran out of memory in {DOING.get(phase, phase)}: {first}.{sizes} "
        f"Change {changes(session.config, phase)}"
    )


def _estimate(session: Session) -> MemoryEstimate | None:
    """None where there is none: what went wrong first is what is told."""
    from transformers import AutoModelForCausalLM

    policy, dtype = session.policy, getattr(torch, session.config.policy.dtype)
    online = session.online
    prompts = [] if online is None else [*online.spare_prompts, *online.evaluation_prompts]
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                policy.lm.model.config, dtype=dtype, **code_option(session.config.policy.model)
            )
        longest = max(len(prompt.token_ids) for prompt in prompts)
        return estimate_on(session.config, model, longest, session.device)
    except Exception:
        return None
