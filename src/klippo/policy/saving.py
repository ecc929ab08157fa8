"""Writing a policy so that from_pretrained reads it, with the critic beside it."""

from __future__ import annotations

import json
from pathlib import Path

from klippo.hub import no_progress_bars
from klippo.policy.actor_critic import ActorCritic, LoraCritic, SeparateCritic
from klippo.policy.adapters import CRITIC, POLICY
from klippo.policy.sharding import full_state
from klippo.types import Tokenizer

VALUE_HEAD_FILE = "value_head.safetensors"


def save_model(policy: ActorCritic, tokenizer: Tokenizer, model_dir: Path) -> None:
    """Model (or adapter) and tokenizer; inside `full_weights`, as `save_policy`."""
    with no_progress_bars():
        if policy.peft_model is None:
            weights = full_state(policy.lm.model)
            policy.lm.model.save_pretrained(model_dir, state_dict=weights)
        else:
            _save_adapter(policy, POLICY, model_dir)
        tokenizer.save_pretrained(model_dir)


def save_policy(
    policy: ActorCritic, tokenizer: Tokenizer, model_dir: Path, critic_dir: Path
) -> None:
    """model_dir: as `save_model`; critic_dir: value head, and the critic's trunk or adapter."""
    from safetensors.torch import save_file

    save_model(policy, tokenizer, model_dir)
    critic = policy.critic
    critic_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(critic, SeparateCritic):
        with no_progress_bars():
            critic.trunk.save_pretrained(critic_dir, state_dict=full_state(critic.trunk))
        stands_on = "this folder's model"
    elif isinstance(critic, LoraCritic):
        _save_adapter(policy, CRITIC, critic_dir)
        stands_on = "the policy's base with this folder's adapter"
    else:
        stands_on = "the policy's trunk"
    head = full_state(critic.head)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in head.items()},
        critic_dir / VALUE_HEAD_FILE,
    )
    note = {"reads": "last hidden state before each response token", "stands_on": stands_on}
    (critic_dir / "critic.json").write_text(json.dumps(note, indent=2) + "\n")


def _save_adapter(policy: ActorCritic, name: str, folder: Path) -> None:
    assert policy.peft_model is not None
    weights = full_state(policy.peft_model)
    policy.peft_model.save_pretrained(folder, selected_adapters=[name], state_dict=weights)
