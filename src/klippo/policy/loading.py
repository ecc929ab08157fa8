"""From settings to a policy, its critic, its reference and its tokenizer."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from klippo.errors import ConfigError, PreflightError
from klippo.hub import load_model, load_tokenizer, with_fused_activations
from klippo.policy.actor_critic import (
    ActorCritic,
    CausalLM,
    Critic,
    LoraCritic,
    Reference,
    SeparateCritic,
)
from klippo.policy.adapters import (
    REFERENCE,
    PeftModel,
    add_adapters,
    quiet_peft,
    using_adapter,
    with_lean_adapters,
)
from klippo.policy.blocks import FrozenBlocks, decoder_blocks
from klippo.policy.norms import with_lean_norms
from klippo.policy.settings import CriticSettings, PolicySettings, Sharding
from klippo.policy.sharding import shard
from klippo.ranks import Ranks
from klippo.types import HFModel, TokenBatch, Tokenizer

ONE_PROCESS = Ranks()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPolicy:
    policy: ActorCritic
    reference: Reference
    tokenizer: Tokenizer


def load_policy(
    settings: PolicySettings,
    critic: CriticSettings,
    device: torch.device,
    *,
    model: HFModel | None = None,
    tokenizer: Tokenizer | None = None,
    sharding: Sharding = "none",
    ranks: Ranks = ONE_PROCESS,
) -> LoadedPolicy:
    """Load (or wrap a given Hugging Face `model` and `tokenizer`) as the settings say.

    With `sharding` every process must call it. Each reads the full model into the CPU's memory, and
    keeps its shard of the weights on the device.

    Raises PreflightError for a model, tokenizer or machine that cannot do it.
    """
    tokenizer = tokenizer or load_tokenizer(settings.model, settings.revision)
    load_on = device if sharding == "none" else torch.device("cpu")
    model = model or load_causal_lm(settings, load_on)
    turn_dropout_off(with_lean_norms(with_fused_activations(model)))
    value: Critic | None = None
    if critic.kind == "separate":
        value = _separate_critic(settings, critic, model)
    peft_model: PeftModel | None = None
    if settings.tuning == "lora":
        peft_model = add_adapters(settings, critic, model)
        model = with_lean_adapters(peft_model.get_base_model())
        turn_dropout_off(model)
        lm = _causal_lm(settings, model).to(load_on)
        start = None if settings.adapter is None else REFERENCE
        reference = Reference(lm, partial(using_adapter, peft_model, start))
        if critic.kind == "lora":
            value = LoraCritic(lm, peft_model)
    else:
        if settings.tuning == "last_layers":
            freeze_below(model, settings.num_unfrozen_layers)
        # The reference shares the weights that do not train.
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        frozen = copy.deepcopy(model, shared).requires_grad_(False).eval()
        lm = _causal_lm(settings, model).to(load_on)
        reference = Reference(_causal_lm(settings, frozen).to(load_on))
    value = value or Critic(lm.hidden_size, lm.model.dtype)
    policy = ActorCritic(lm, value.to(load_on), peft_model)
    if settings.gradient_checkpointing:
        _checkpoint_gradients(policy)
    policy.eval()
    check_head(lm)
    check_frozen(lm, reference.lm)
    shard(sharding, policy, reference, device, ranks)
    return LoadedPolicy(policy=policy, reference=reference, tokenizer=tokenizer)


def load_causal_lm(settings: PolicySettings, device: torch.device) -> HFModel:
    """The causal LM of a model folder or hub name, weights in the settings' dtype."""
    from transformers import AutoModelForCausalLM

    options: dict[str, object] = {"dtype": getattr(torch, settings.dtype)}
    if settings.quantize_4bit:
        options |= _four_bit(device)
    model: HFModel = load_model(AutoModelForCausalLM, settings.model, settings.revision, **options)
    return model


def turn_dropout_off(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that the sampler and the update see one policy.

    That is modules, float attributes of modules (attention, layer drop), and the config that inner
    modules read while they run; the config that is saved stays as it was.
    """
    config = getattr(model, "config", None)
    quiet = copy.deepcopy(config)
    _zero_dropout(quiet)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_dropout(module)
        if module is not model and config is not None and vars(module).get("config") is config:
            vars(module)["config"] = quiet


def _zero_dropout(holder: object) -> None:
    """Set the float attributes of an object that are named after dropping to 0."""
    for name, value in list(getattr(holder, "__dict__", {}).items()):
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)


def freeze_below(model: HFModel, num_unfrozen: int) -> None:
    """Leave only the last blocks trainable; embeddings, final norm and LM head freeze too."""
    blocks = decoder_blocks(model)
    if num_unfrozen > len(blocks):
        raise ConfigError(
            f"policy.num_unfrozen_layers={num_unfrozen}: the model has {len(blocks)} layers; "
            f"give at most {len(blocks)}"
        )
    model.requires_grad_(False)
    for block in list(blocks)[len(blocks) - num_unfrozen :]:
        block.requires_grad_(True)


def check_head(lm: CausalLM) -> None:
    """Make sure that trunk plus head gives the model's own log-probs.

    Raises PreflightError for an architecture that does something else to its logits.
    """
    batch = _trial_batch(lm, torch.ones(1, 4, dtype=torch.bool), num_prompt=1)
    ids = torch.cat([batch.prompt_ids, batch.response_ids], 1)
    with torch.no_grad():
        ours, _ = lm.logprobs(batch, lm.hidden(batch), 1.0, with_entropy=False)
        mask = torch.ones_like(ids[:, :-1])
        output = lm.model(input_ids=ids[:, :-1], attention_mask=mask, use_cache=False)
    log_probs = output.logits.to(ours.dtype).log_softmax(-1)
    theirs = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    if not torch.allclose(ours, theirs, atol=0.1 if lm.is_half else 1e-3):
        raise PreflightError(
            f"{type(lm.model).__name__} computes its logits in a way that Klippo does not know "
            f"(log-probs differ by {float((ours - theirs).abs().max()):.3g} nats); "
            "please report the architecture"
        )


def check_frozen(*lms: CausalLM) -> None:
    """Make sure that leaving frozen blocks out changes nothing; else run them, with a warning."""
    if lms[0].frozen is None:
        return
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 0] = mask[1, 5] = False  # padding on both sides
    batch = _trial_batch(lms[0], mask, num_prompt=3)
    tolerance = 0.05 if lms[0].is_half else 1e-5
    with torch.no_grad():
        expected = [lm.hidden(batch) for lm in lms]
        try:
            known = lms[0].with_frozen_states(batch)
            for lm in lms:
                lm.hidden(batch.rows(torch.tensor([1])))  # blocks may remember another batch
            is_same = all(
                torch.allclose(lm.hidden(known), hidden, atol=tolerance, rtol=tolerance)
                for lm, hidden in zip(lms, expected, strict=True)
            )
        except Exception:  # a model's code may do anything with blocks that are not its own
            is_same = False
    if not is_same:
        warnings.warn(
            f"{type(lms[0].model).__name__}: its frozen layers cannot be run once per rollout "
            "batch; they run in every pass, which takes longer and changes no number",
            stacklevel=2,
        )
        for lm in lms:
            lm.frozen = None


def _trial_batch(lm: CausalLM, mask: Tensor, num_prompt: int) -> TokenBatch:
    """Tokens 1, 2, ... in the shape of a mask (B, S)."""
    vocab_size = lm.model.config.get_text_config().vocab_size
    ids = torch.arange(1, mask.numel() + 1).view(mask.shape) % vocab_size
    return TokenBatch(
        prompt_ids=ids[:, :num_prompt],
        prompt_mask=mask[:, :num_prompt],
        response_ids=ids[:, num_prompt:],
        response_mask=mask[:, num_prompt:],
    ).to(lm.model.get_output_embeddings().weight.device)


def _causal_lm(settings: PolicySettings, model: HFModel) -> CausalLM:
    """The model split into trunk and head, with its frozen blocks if there are any."""
    frozen = None
    if settings.tuning == "last_layers":
        blocks = decoder_blocks(model)
        if num_frozen := len(blocks) - settings.num_unfrozen_layers:
            frozen = FrozenBlocks(blocks, num_frozen)
    return CausalLM(model, autocast=settings.autocast, frozen=frozen)


def _separate_critic(
    settings: PolicySettings, critic: CriticSettings, model: HFModel
) -> SeparateCritic:
    """A critic model: a copy of the policy's trunk, or another model's trunk and reward head."""
    from transformers import AutoModelForSequenceClassification

    if critic.model is None:
        trunk = copy.deepcopy(model.base_model).requires_grad_(True)
        return SeparateCritic(trunk, autocast=settings.autocast)
    classifier: HFModel = load_model(
        AutoModelForSequenceClassification, critic.model, dtype=torch.float32, num_labels=1
    )
    vocabularies = [x.config.get_text_config().vocab_size for x in (classifier, model)]
    if vocabularies[0] != vocabularies[1]:
        raise PreflightError(
            f"critic.model={critic.model} has a vocabulary of {vocabularies[0]}, the policy one of "
            f"{vocabularies[1]}: a critic must read the policy's tokens"
        )
    turn_dropout_off(with_lean_norms(classifier))
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear):
        raise PreflightError(
            f"critic.model={critic.model} ({type(classifier).__name__}) has no per-token `score` "
            "head; give a reward model of a causal architecture"
        )
    return SeparateCritic(classifier.base_model, head, autocast=settings.autocast)


def _four_bit(device: torch.device) -> dict[str, object]:
    """Options of from_pretrained for a 4-bit base, or a PreflightError if that is impossible."""
    if device.type != "cuda":
        raise PreflightError(
            f"policy.quantize_4bit=true needs a CUDA GPU, and the device here is {device.type}; "
            "set it to false"
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise PreflightError(
            "policy.quantize_4bit=true needs bitsandbytes: pip install 'klippo[quantize]'"
        ) from error
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantization, "device_map": {"": device.index or 0}}


def _checkpoint_gradients(policy: ActorCritic) -> None:
    """Recompute activations in the backward pass."""
    options: dict[str, object] = {"use_reentrant": False}
    with quiet_peft():
        if isinstance(policy.critic, SeparateCritic):
            policy.critic.trunk.gradient_checkpointing_enable(options)
        if policy.peft_model is not None:
            model = policy.peft_model
            # Recomputation uses the adapter of the forward pass.
            options["context_fn"] = lambda: (
                nullcontext(),
                using_adapter(model, model.active_adapter),
            )
        policy.lm.model.gradient_checkpointing_enable(options)
