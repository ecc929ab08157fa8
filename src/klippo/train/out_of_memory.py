"""When memory runs out in a run: in which phase, what is big in it, and what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from klippo.errors import OutOfMemoryError
from klippo.lengths import longest
from klippo.policy.sharding import is_sharded
from klippo.runs.memory import GIB, used_memory
from klippo.train.memory import MemoryEstimate, Sizes, changes, loaded_estimate
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
        raise OutOfMemoryError(_explanation(phase, session, error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """True for a GPU's, for Python's, and for PyTorch's on the CPU, which is a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in text or "out of memory" in text
    )


def _explanation(phase: str, session: Session, error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    need = estimate_session(session, measured={})
    of_phase = phase if phase in need.phases else "forward"
    listed = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in need.biggest(of_phase, 3))
    return (
        f"{session.device} ran out of memory in {DOING.get(phase, phase)}: {first}. Before any "
        f"activations this phase needs {need.total(of_phase) / GIB:.2f} GiB, most of it {listed}. "
        f"Change {changes(session.config, phase)}"
    )


def estimate_session(
    session: Session, *, used: int | None = None, measured: Mapping[str, int] | None = None
) -> MemoryEstimate:
    """The need of every phase with the longest prompts and responses, as `loaded_estimate`."""
    return loaded_estimate(
        session.config,
        session.policy,
        session.reference,
        longest_sizes(session),
        used=used_memory(session.device) if used is None else used,
        num_shards=session.ranks.world_size if is_sharded(session.policy) else 1,
        measured=measured,
    )


def longest_sizes(session: Session) -> Sizes:
    """The rows of each phase, and their longest prompt and response."""
    if session.online is not None:
        prompts = [*session.online.train_prompts, *session.online.spare_prompts]
        response = longest(session.config.rollout.response_length)
    else:
        assert session.offline is not None
        prompts = [one.prompt for one in session.offline.train]
        response = max(len(one.completion.token_ids) for one in session.offline.train)
    prompt = max(len(one.token_ids) for one in prompts)
    return Sizes.of(session.config, session.ranks.world_size, prompt, response)
