"""A run's state, as checkpoints hold it: taken before a step, put back before the same step."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from klippo.errors import ConfigError, DivergedError
from klippo.ppo.learner import Learner
from klippo.runs.checkpoints import Checkpoint, Checkpoints
from klippo.train.session import Session
from klippo.train.started import versions

REMEDY = {
    "data": "give the data that the run began with",
    "model": "give the model that the run began with (the same revision)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """All of a run between two steps but for its tensors, which stand still until the update."""

    step: int
    state: dict[str, Any]


def take(session: Session, extra: Mapping[str, Any], randoms: list[dict[str, Any]]) -> Moment:
    """The moment before the next step; `randoms` are the random states of every process."""
    return Moment(
        step=session.learner.num_steps_done,
        state={
            "learner": session.learner.state_dict(),
            "parts": {name: part.state_dict() for name, part in session.stateful.items()},
            "random": randoms,
            "fingerprints": dict(session.fingerprints),
            "num_processes": session.ranks.world_size,
            "versions": versions(),
        }
        | dict(extra),
    )


def write(moment: Moment, learner: Learner, checkpoints: Checkpoints) -> None:
    """Write a checkpoint of this moment; every process must call it.

    Raises DivergedError where a weight is not finite: older checkpoints stay, and none is written.
    """
    tensors = learner.tensors()
    learner.ranks.on_main(lambda: _write(moment, tensors, checkpoints))


def _write(
    moment: Moment, tensors: Mapping[str, Mapping[str, Tensor]], checkpoints: Checkpoints
) -> None:
    for name, weight in tensors["weights"].items():
        if not bool(weight.isfinite().all()):
            raise DivergedError(
                f"{name} is not finite after {moment.step} steps; no checkpoint was written of "
                "that, and older ones stay; lower optimizer.learning_rate"
            )
    checkpoints.write(moment.step, tensors, moment.state)


def restore(session: Session, checkpoint: Checkpoint) -> list[str]:
    """Put a session that has just been opened where the checkpoint was taken.

    Returns what may make its numbers differ. Raises ConfigError for another model or other data.
    """
    state = checkpoint.state
    for what, there in state["fingerprints"].items():
        here = session.fingerprints[what]
        if here != there:
            raise ConfigError(
                f"{checkpoint.path} was written with another {what} (fingerprint {there}, now "
                f"{here}); {REMEDY[what]}, or choose another output_dir"
            )
    session.learner.load_tensors({name: checkpoint.tensors(name) for name in state["files"]})
    session.learner.load_state_dict(state["learner"])
    for name, part in session.stateful.items():
        part.load_state_dict(state["parts"][name])
    notes = []
    ranks = session.ranks
    if state["num_processes"] == ranks.world_size:
        set_random_state(state["random"][ranks.rank], session.device)
    else:
        notes.append(
            f"{ranks.world_size} processes go on with what {state['num_processes']} began: the "
            "sums have another order"
        )
    changed = [
        f"{name} {old} -> {versions().get(name)}"
        for name, old in state["versions"].items()
        if versions().get(name) != old
    ]
    if changed:
        notes.append(f"other versions than at the checkpoint: {', '.join(changed)}")
    return notes


def random_state(device: torch.device) -> dict[str, Any]:
    """Of all generators that a reward or a library may use; the run's own have their own seeds."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators where `random_state` was taken."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
