"""From settings to a policy, its critic, its reference and its tokenizer."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from klippo.errors import ConfigError, PreflightError
from klippo.hub import (
    LOADING_ERRORS,
    find_file,
    load_model,
    load_tokenizer,
    not_loaded,
    resolve,
    with_fused_activations,
)
from klippo.policy.actor_critic import ActorCritic, CausalLM, Reference
from klippo.policy.adapters import (
    CRITIC,
    POLICY,
    REFERENCE,
    checkpoint_contexts,
    finding_layers,
    using_adapter,
)
from klippo.policy.blocks import decoder_blocks
from klippo.policy.critic import LoraCritic, SeparateCritic, TrunkCritic
from klippo.policy.frozen import FrozenBlocks
from klippo.policy.lora import with_lean_adapters
from klippo.policy.norms import with_lean_norms
from klippo.policy.settings import CriticSettings, LoraSettings, PolicySettings, Sharding
from klippo.policy.sharding import shard
from klippo.ranks import Ranks
from klippo.types import TokenBatch, Tokenizer

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
    model: Any | None = None,
    tokenizer: Tokenizer | None = None,
    sharding: Sharding = "none",
    ranks: Ranks = ONE_PROCESS,
) -> LoadedPolicy:
    """Load (or wrap a given Hugging Face `model` and `tokenizer`) as the settings say.

    With `sharding` each process keeps its part of the weights; all must call it, and each reads the
    whole model, into the CPU's memory.

    Raises PreflightError where the model, its tokenizer or this machine cannot do it.
    """
    from transformers import AutoModelForSequenceClassification

    tokenizer = tokenizer or load_tokenizer(settings.model, settings.revision)
    place = device if sharding == "none" else torch.device("cpu")
    model = model or load_causal_lm(settings, place)
    critic_model = None
    if critic.model is not None:
        critic_model = load_model(
            AutoModelForSequenceClassification, critic.model, dtype=torch.float32, num_labels=1
        )
    loaded = assemble(settings, critic, place, model, critic_model, tokenizer)
    if sharding == "none":
        with_lean_adapters(loaded.policy.lm.model)
    check_head(loaded.policy.lm)
    check_frozen(loaded.policy.lm, loaded.reference.lm)
    shard(sharding, loaded.policy, loaded.reference, device, ranks)
    return loaded


def assemble(
    settings: PolicySettings,
    critic: CriticSettings,
    device: torch.device,
    model: Any,
    critic_model: Any | None,
    tokenizer: Tokenizer,
) -> LoadedPolicy:
    """Policy, critic and reference of a causal LM, and of the classifier behind `critic.model`."""
    turn_dropout_off(with_lean_norms(with_fused_activations(model)))
    separate = None
    if critic.kind == "separate":
        separate = _separate_critic(settings, critic, model, critic_model)
    if settings.tuning == "full":
        reference_model = _frozen_copy(model)
        peft_model = None
    elif settings.tuning == "last_layers":
        freeze_below(model, settings.num_unfrozen_layers)
        reference_model = _frozen_copy(model)
        peft_model = None
    else:
        with warnings.catch_warnings():
            # peft calls transformers by names that are about to go: no news for users.
            warnings.simplefilter("ignore", FutureWarning)
            peft_model = _with_adapters(settings, critic, model)
        model = reference_model = peft_model.get_base_model()
    lm = _causal_lm(settings, model).to(device)
    if peft_model is None:
        reference = Reference(_causal_lm(settings, reference_model).to(device))
    else:
        start = None if settings.adapter is None else REFERENCE
        reference = Reference(lm, partial(using_adapter, peft_model, start))
    critic_module: nn.Module
    if separate is not None:
        critic_module = separate
    elif critic.kind == "lora":
        assert peft_model is not None
        critic_module = LoraCritic(lm, partial(using_adapter, peft_model, CRITIC), CRITIC)
        for parameter in critic_module.own_parameters():
            parameter.requires_grad_(True)
    else:
        critic_module = TrunkCritic(lm)
    policy = ActorCritic(lm, critic_module.to(device), peft_model)
    if settings.gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            _checkpoint_gradients(policy)
    return LoadedPolicy(policy=policy.eval(), reference=reference, tokenizer=tokenizer)


def load_causal_lm(settings: PolicySettings, device: torch.device) -> Any:
    """The causal LM of a model folder or hub name, weights in the settings' dtype."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype)}
    if settings.quantize_4bit:
        options |= _four_bit(device)
    return load_model(AutoModelForCausalLM, settings.model, settings.revision, **options)


def turn_dropout_off(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that the sampler and the update see one policy.

    That is modules, float attributes of modules (attention, layer drop), and the config that inner
    modules read while they run; the config that is saved stays as it was.
    """
    config = getattr(model, "config", None)
    quiet: Any = copy.deepcopy(config)
    _zero_dropout(quiet)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_dropout(module)
        if module is not model and config is not None and vars(module).get("config") is config:
            module.config = quiet


def _zero_dropout(holder: object) -> None:
    """Set the float attributes of an object that are named after dropping to 0."""
    for name, value in list(getattr(holder, "__dict__", {}).items()):
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)


def freeze_below(model: Any, num_unfrozen: int) -> None:
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
    device = lm.model.get_output_embeddings().weight.device
    ids = torch.arange(1, 5, device=device)[None] % lm.model.config.get_text_config().vocab_size
    real = torch.ones_like(ids, dtype=torch.bool)
    batch = TokenBatch(
        prompt_ids=ids[:, :1],
        prompt_mask=real[:, :1],
        response_ids=ids[:, 1:],
        response_mask=real[:, 1:],
    )
    with torch.no_grad():
        ours, _ = lm.logprobs(batch, lm.hidden(batch), 1.0, with_entropy=False)
        inputs = {"input_ids": ids[:, :-1], "attention_mask": real[:, :-1].long()}
        logits = lm.model(**inputs, use_cache=False).logits.to(ours.dtype)
    theirs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    tolerance = 1e-3 if lm.model.dtype == torch.float32 and not lm.autocast else 0.1
    if not torch.allclose(ours, theirs, atol=tolerance):
        raise PreflightError(
            f"{type(lm.model).__name__} computes its logits in a way that Klippo does not know "
            f"(log-probs differ by {float((ours - theirs).abs().max()):.3g} nats); "
            "please report the architecture"
        )


def check_frozen(*lms: CausalLM) -> None:
    """Make sure that leaving frozen blocks out changes nothing; else run them, with a warning."""
    if lms[0].frozen is None:
        return
    device = lms[0].model.get_output_embeddings().weight.device
    ids = torch.arange(1, 13, device=device).view(2, 6)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, 0] = real[1, 5] = False  # padding on both sides
    batch = TokenBatch(
        prompt_ids=ids[:, :3] % lms[0].model.config.get_text_config().vocab_size,
        prompt_mask=real[:, :3],
        response_ids=ids[:, 3:] % lms[0].model.config.get_text_config().vocab_size,
        response_mask=real[:, 3:],
    )
    tolerance = 1e-5 if lms[0].model.dtype == torch.float32 and not lms[0].autocast else 0.05
    with torch.no_grad():
        plain = [lm.hidden(batch) for lm in lms]
        try:
            known = lms[0].with_frozen_states(batch)
            for lm in lms:
                lm.hidden(batch.rows(torch.tensor([1])))  # what blocks remember is of another batch
            same = all(
                torch.allclose(lm.hidden(known), hidden, atol=tolerance, rtol=tolerance)
                for lm, hidden in zip(lms, plain, strict=True)
            )
        except Exception:  # what a model's code makes of blocks that are not its own
            same = False
    if not same:
        warnings.warn(
            f"{type(lms[0].model).__name__}: its frozen layers cannot be run once per rollout "
            "batch; they run in every pass, which takes longer and changes no number",
            stacklevel=2,
        )
        for lm in lms:
            lm.frozen = None


def _causal_lm(settings: PolicySettings, model: Any) -> CausalLM:
    """The model taken apart, with its frozen blocks where whole blocks are frozen."""
    frozen = None
    if settings.tuning == "last_layers":
        blocks = decoder_blocks(model)
        if num_frozen := len(blocks) - settings.num_unfrozen_layers:
            frozen = FrozenBlocks(blocks, num_frozen)
    return CausalLM(model, autocast=settings.autocast, frozen=frozen)


def _frozen_copy(model: Any) -> Any:
    """A frozen copy that shares the weights which do not train."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def _with_adapters(settings: PolicySettings, critic: CriticSettings, model: Any) -> Any:
    """A PeftModel with the policy's adapter and, as needed, the reference's and the critic's."""
    from peft import PeftModel, get_peft_model

    if settings.adapter is None:
        config = _lora_config(settings.lora, model)
        with finding_layers("policy.lora", settings.lora.target_modules):
            peft_model = get_peft_model(model, config, adapter_name=POLICY)
    else:
        path = resolve(settings.adapter)
        _check_adapter(settings.adapter)
        try:
            peft_model = PeftModel.from_pretrained(
                model, path, adapter_name=POLICY, is_trainable=True
            )
            peft_model.load_adapter(path, adapter_name=REFERENCE, is_trainable=False)
        except LOADING_ERRORS as error:
            told = str(error)
            if "size mismatch" in told or "Target modules" in told:
                raise PreflightError(
                    f"policy.adapter={settings.adapter} is for another base than "
                    f"policy.model={settings.model}: its matrices do not fit "
                    f"({told.strip().splitlines()[-1].strip()}); name the base that it was "
                    "trained on"
                ) from error
            raise not_loaded(f"policy.adapter={settings.adapter}", error) from error
        # What the adapter's maker called the base need not be found here, nor by who loads the run.
        for config in peft_model.peft_config.values():
            config.base_model_name_or_path = model.name_or_path or config.base_model_name_or_path
    if critic.kind == "lora":
        with finding_layers("critic.lora", critic.lora.target_modules):
            peft_model.add_adapter(CRITIC, _lora_config(critic.lora, model))
    peft_model.set_adapter(POLICY)
    turn_dropout_off(peft_model)
    return peft_model


def _check_adapter(name: str) -> None:
    """Raise PreflightError for a folder or repository without an adapter's files."""
    if find_file(name, "adapter_config.json") is None:
        raise PreflightError(
            f"policy.adapter={name} has no adapter_config.json; name a folder or a hub repository "
            "that peft's save_pretrained wrote"
        )
    weights = ("adapter_model.safetensors", "adapter_model.bin")
    if all(find_file(name, file) is None for file in weights):
        raise PreflightError(
            f"policy.adapter={name} has no adapter weights ({' or '.join(weights)}); save the "
            "adapter again with save_pretrained"
        )


def _lora_config(settings: LoraSettings, model: Any) -> Any:
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=settings.target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def _separate_critic(
    settings: PolicySettings, critic: CriticSettings, model: Any, classifier: Any | None
) -> SeparateCritic:
    """A critic model: a copy of the policy's trunk, or another model's trunk and reward head."""
    if classifier is None:
        trunk = copy.deepcopy(model.base_model).requires_grad_(True)
        return SeparateCritic(trunk, autocast=settings.autocast)
    vocabulary = classifier.config.get_text_config().vocab_size
    if vocabulary != model.config.get_text_config().vocab_size:
        raise PreflightError(
            f"critic.model={critic.model} has a vocabulary of {vocabulary}, the policy one of "
            f"{model.config.get_text_config().vocab_size}: a critic must read the policy's tokens"
        )
    turn_dropout_off(with_lean_norms(classifier))
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear):
        raise PreflightError(
            f"critic.model={critic.model} ({type(classifier).__name__}) has no per-token `score` "
            "head; give a reward model of a causal architecture"
        )
    return SeparateCritic(classifier.base_model, head, autocast=settings.autocast)


def _four_bit(device: torch.device) -> dict[str, Any]:
    """Options of from_pretrained for a 4-bit base, or a PreflightError where that cannot be."""
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
    """Recompute activations in the backward pass, under the adapter of the forward pass."""
    options: dict[str, Any] = {"use_reentrant": False}
    if policy.peft_model is not None:
        options["context_fn"] = partial(checkpoint_contexts, policy.peft_model)
    policy.lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if isinstance(policy.critic, SeparateCritic):
        policy.critic.trunk.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
