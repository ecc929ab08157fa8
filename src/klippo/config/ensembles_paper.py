"""Configs with the names of github.com/tlc4418/llm_optimization, the code of "Reward Model
Ensembles Help Mitigate Overoptimization" (Coste et al. 2023, arXiv 2310.02743), in Klippo's names.

There, entries hold `rank_config` (the reward models), `gold_config`, `sft_config` (the policy) and
`datasets`; a second file beside them, in trlx's format, holds PPO's settings. docs/config.md has
the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from klippo.config.located import Located, Problem, write_value
from klippo.config.merge import COMMAND_LINE, merge, nest
from klippo.config.problems import nearest
from klippo.config.schema import RunConfig


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MARKS = _words(
    "rank_config sft_config gold_config datasets datasets_extra rng_seed num_eval_prompts"
)
"""Keys by which a config is recognised as written in these names."""

CONTAINERS = _words(
    "rank_config gold_config sft_config train model optimizer optimizer.kwargs scheduler"
    " scheduler.kwargs method method.gen_kwargs"
)
"""The mappings whose keys are listed below."""

MOVED = {
    "rng_seed": "seed",
    "sft_config.model_name": "policy.model",
    "train.total_steps": "ppo.num_steps",
    "train.batch_size": "ppo.batch_size",
    "train.minibatch_size": "ppo.micro_batch_size",
    "train.eval_interval": "evaluation.every",
    "optimizer.kwargs.lr": "optimizer.learning_rate",
    "optimizer.kwargs.betas": "optimizer.betas",
    "optimizer.kwargs.eps": "optimizer.eps",
    "optimizer.kwargs.weight_decay": "optimizer.weight_decay",
    "scheduler.kwargs.T_max": "optimizer.num_decay_steps",
    "method.ppo_epochs": "ppo.num_epochs",
    "method.init_kl_coef": "kl.coef",
    "method.target": "kl.target",
    "method.horizon": "kl.horizon",
    "method.gamma": "ppo.gamma",
    "method.lam": "ppo.gae_lambda",
    "method.cliprange": "ppo.clip_range",
    "method.cliprange_value": "ppo.value_clip_range",
    "method.vf_coef": "ppo.value_coef",
    "method.gen_kwargs.max_new_tokens": "rollout.response_length",
    "method.gen_kwargs.temperature": "rollout.temperature",
    "method.gen_kwargs.top_k": "rollout.top_k",
    "method.gen_kwargs.top_p": "rollout.top_p",
}
"""Their key -> Klippo's; the value stays as it is."""

ONLY: dict[str, tuple[list[Any], str]] = {
    "debug": ([False], "Klippo has no such mode; for a short run set ppo.num_steps=3"),
    "rank_config.pooling": (["last"], "scores are read at the last token"),
    "rank_config.quantization": ([False], "reward models are not quantized"),
    "rank_config.seq2seqmodel": ([False], "reward models are decoders"),
    "sft_config.quantization": (
        [False],
        "for a policy in 4 bits set policy.quantize_4bit=true and policy.tuning=lora",
    ),
    "sft_config.seq2seqmodel": ([False], "policies are decoders"),
    "model.model_arch_type": (["causal"], "policies are decoders"),
    "model.peft_config": ([], "for LoRA set policy.tuning=lora"),
    "optimizer.name": (["adamw"], "Klippo trains with AdamW"),
    "scheduler.name": (["cosine_annealing"], "for others set optimizer.schedule"),
    "method.name": (["ppoconfig", "PPOConfig"], "Klippo trains with PPO"),
    "method.scale_reward": (
        [False, "ignored"],
        "Klippo's score.normalize=true subtracts the running mean too; set it, if that is meant",
    ),
    "method.gen_kwargs.do_sample": ([True], "PPO needs samples"),
    "method.gen_experience_kwargs": ([], "prompts are sampled by gen_kwargs"),
}
"""Keys that must be empty or have one of these values, and why; they change nothing."""

COMPUTED = _words(
    """
    output_dir datasets datasets_extra eval_size num_eval_prompts dtype
    rank_config.model_names rank_config.objective_name rank_config.uwo_weight rank_config.batch_size
    gold_config.model_name gold_config.is_alpacafarm_rm gold_config.batch_size
    sft_config.dtype sft_config.num_layers_unfrozen model.num_layers_unfrozen
    scheduler.kwargs.eta_min method.cliprange_reward
    """
)
"""Keys that the functions at the end translate."""

IGNORED = _words(
    """
    cache_dir tokenizer local_rank wandb_entity
    learning_rate gradient_checkpointing int8_training gradient_accumulation_steps
    per_device_train_batch_size per_device_eval_batch_size adam_beta1 adam_beta2 adam_epsilon
    weight_decay warmup_steps eval_steps save_strategy save_steps max_length val_max_length
    num_train_epochs logging_steps max_grad_norm save_total_limit eval_accumulation_steps
    freeze_layer loss_fn log_dir quantization seq2seqmodel poly_eps fuse_gelu log_wandb
    samples_mixing verbose use_custom_sampler random_offset_probability label_masking
    residual_dropout residual_dropout_lima use_flash_attention sort_by_length use_system_prefix
    system_prefix use_system_tag system_property_dropout system_add_length per_digit_tokens
    is_reward_model deepspeed_config peft_model peft_type superhot
    rank_config.is_reward_model rank_config.cache_dir rank_config.residual_dropout
    rank_config.use_flash_attention rank_config.dtype rank_config.freeze_layer
    sft_config.is_reward_model sft_config.cache_dir sft_config.residual_dropout
    sft_config.use_flash_attention sft_config.freeze_layer sft_config.batch_size
    train.seq_length train.epochs train.checkpoint_interval train.checkpoint_dir train.pipeline
    train.trainer train.tracker train.project_name train.entity_name train.group_name train.tags
    train.seed train.save_best train.save_optimizer
    model.model_path method.num_rollouts method.chunk_size method.ref_mean method.ref_std
    """
)
"""Keys that change nothing here: PPO there does not read them either (the entry `defaults` is that
of supervised training), or they are about its own storage, or Klippo has no such thing."""

KNOWN = {*MOVED, *ONLY, *COMPUTED, *IGNORED}

NEEDED = {
    "policy": ("sft_config.model_name", "tlc4418/pythia_1.4b_sft_policy"),
    "data": ("datasets", "[alpaca_farm]"),
    "reward": ("rank_config.model_names", "[models/rm-pythia-44m_seed1]"),
}
"""Klippo's sections without which there is no run, and what they are made of."""

OBJECTIVES = ("mean", "WCO", "UWO")
PRECISIONS = {"bf16": True, "bfloat16": True, "fp32": False, "float32": False}
"""dtype -> whether matrix products are computed in bfloat16."""
ALPACA_FARM = {
    "train": "tatsu-lab/alpaca_farm",
    "subset": "alpaca_instructions",
    "split": "unlabeled",
    "validation": "val",
}


def is_foreign(tree: Located) -> bool:
    """Is the config written in these names?"""
    return not MARKS.isdisjoint(tree.value)


def is_ppo_file(tree: Located) -> bool:
    """Is a file's content the PPO settings in trlx's format?"""
    method = tree.value.get("method", tree).value
    name = method.get("name") if isinstance(method, dict) else None
    return name is not None and str(name.value).lower() == "ppoconfig"


@dataclass
class Translation:
    """Klippo's tree, what it was made of, and what could not be translated."""

    tree: Located
    sources: dict[str, str] = field(default_factory=dict)
    """Klippo's key -> the key that was written."""
    problems: list[Problem] = field(default_factory=list)

    def put(self, target: str, value: Located, source: str) -> None:
        self.tree = merge(self.tree, nest(target.split("."), value), object)
        self.sources[target] = source

    def refuse(self, value: Located, key: str, rule: str) -> None:
        self.problems.append(Problem(value.origin, f"{key}={write_value(value.plain())}: {rule}"))


def translate(tree: Located) -> Translation:
    """A merged tree in Klippo's names; values keep their origin, and Klippo's own keys win."""
    found = Translation(Located({}, tree.origin))
    native, written = _split(tree, found)
    given = {key: value for key, value in written.items() if value.value is not None}
    for source, target in MOVED.items():
        if source in given:
            found.put(target, given[source], source)
    for key, (allowed, why) in ONLY.items():
        if key in given and given[key].value not in allowed:
            must = f"must be {_any_of(allowed)}" if allowed else "must be empty"
            found.refuse(given[key], key, f"{must}; {why}")
    _policy(given, found)
    _reward(given, found)
    _gold(given, found)
    _prompts(given, found)
    _schedules(given, found)
    _output_dir(given, native, found)
    for section, (key, example) in NEEDED.items():
        if section not in native.value and (key not in given or not given[key].value):
            origin = tree.origin_at(tuple(key.split(".")))
            name = key.rpartition(".")[2]
            found.problems.append(Problem(origin, f"{key}: missing; as in {name}: {example}"))
    found.tree = merge(found.tree, native, RunConfig)
    return found


def _split(tree: Located, found: Translation) -> tuple[Located, dict[str, Located]]:
    """Klippo's own keys, and theirs by dotted name; unknown ones are problems."""
    native, written = Located({}, tree.origin), {}
    for key, value in _flat(tree):
        if key in IGNORED and value.origin == COMMAND_LINE:
            found.refuse(value, key, "changes nothing; remove it")
        elif key in KNOWN:
            written[key] = value
        elif key.partition(".")[0] in RunConfig.model_fields:
            native = merge(native, nest(key.split("."), value), object)
        elif key in CONTAINERS:
            found.refuse(value, key, "must be a mapping")
        else:
            found.problems.append(Problem(value.origin, f"{key}: unknown key; {_advice(key)}"))
    return native, written


def _flat(tree: Located, prefix: str = "") -> Iterator[tuple[str, Located]]:
    """The values inside CONTAINERS, by dotted name; an empty container has none."""
    for key, value in tree.value.items():
        name = f"{prefix}{key}"
        if name in CONTAINERS and isinstance(value.value, dict):
            yield from _flat(value, f"{name}.")
        elif name not in CONTAINERS or value.value is not None:
            yield name, value


def _advice(key: str) -> str:
    section, dot, last = key.rpartition(".")
    inside = [name.removeprefix(section + dot) for name in KNOWN if name.startswith(section + dot)]
    names = [name for name in inside if "." not in name]
    if not section:
        names = [*names, *CONTAINERS, *RunConfig.model_fields]
    near = nearest(last, names)
    if near is None and not section:
        return "neither these entries nor Klippo's configs have it"
    return f"did you mean {near}?" if near else f"known here: {', '.join(sorted(names))}"


def _policy(given: dict[str, Located], found: Translation) -> None:
    """What is trained, and the precision: bf16 computes in bfloat16, weights stay float32."""
    key, dtype = _first(given, "sft_config.dtype", "dtype")
    if dtype is not None and dtype.value in PRECISIONS:
        autocast = Located(PRECISIONS[dtype.value], dtype.origin)
        found.put("policy.autocast", autocast, key)
    elif dtype is not None:
        found.refuse(dtype, key, f"must be {_any_of(PRECISIONS)}")
    key, layers = _first(given, "sft_config.num_layers_unfrozen", "model.num_layers_unfrozen")
    if layers is None:
        return
    if not isinstance(layers.value, int) or layers.value == 0 or layers.value < -1:
        found.refuse(layers, key, "must be how many layers train, at least 1, or -1 for all")
        return
    tuning = "full" if layers.value == -1 else "last_layers"
    found.put("policy.tuning", Located(tuning, layers.origin), key)
    if layers.value > 0:
        found.put("policy.num_unfrozen_layers", layers, key)


def _reward(given: dict[str, Located], found: Translation) -> None:
    """One reward model, or an ensemble of several."""
    key = "rank_config.model_names"
    objective = given.get("rank_config.objective_name")
    if objective is not None and objective.value not in OBJECTIVES:
        near = nearest(str(objective.value), OBJECTIVES)
        guess = f"; did you mean {near}?" if near else ""
        rule = f"must be {_any_of(OBJECTIVES)}{guess}"
        found.refuse(objective, "rank_config.objective_name", rule)
    names = _names(given, key, found)
    if not names:
        return
    origin = given[key].origin
    shared = {"template": Located("open-assistant", origin)}
    if len(names) == 1:
        section = {"kind": Located("classifier", origin), "model": names[0]} | shared
    else:
        section = {"kind": Located("ensemble", origin), "members": Located(names, origin)} | shared
        section |= {"ddof": Located(1, origin), "standardize": Located("none", origin)}
    for name, value in section.items():
        found.put(f"reward.{name}", value, key)
    if "rank_config.batch_size" in given:
        found.put("reward.batch_size", given["rank_config.batch_size"], "rank_config.batch_size")
    if len(names) > 1 and objective is not None:
        _objective(objective, given, found)


def _objective(objective: Located, given: dict[str, Located], found: Translation) -> None:
    found.put("reward.objective", objective, "rank_config.objective_name")
    weight = given.get("rank_config.uwo_weight")
    if objective.value == "UWO" and weight is None:
        what = "missing; objective_name=UWO is mean - uwo_weight * variance; try uwo_weight: 0.1"
        found.problems.append(Problem(objective.origin, f"rank_config.uwo_weight: {what}"))
    elif objective.value == "UWO" and weight is not None:
        found.put("reward.uwo_weight", weight, "rank_config.uwo_weight")


def _gold(given: dict[str, Located], found: Translation) -> None:
    """The gold model, and which of the two prompt formats it reads."""
    model = given.get("gold_config.model_name")
    if model is None:
        return
    key = "gold_config.is_alpacafarm_rm"
    alpaca = given.get(key, Located(False, model.origin))
    if not isinstance(alpaca.value, bool):
        found.refuse(alpaca, key, "must be true or false")
    template = Located("alpaca" if alpaca.value else "open-assistant", alpaca.origin)
    found.put("gold.kind", Located("classifier", model.origin), "gold_config.model_name")
    found.put("gold.model", model, "gold_config.model_name")
    found.put("gold.template", template, key)
    if "gold_config.batch_size" in given:
        found.put("gold.batch_size", given["gold_config.batch_size"], "gold_config.batch_size")


def _prompts(given: dict[str, Located], found: Translation) -> None:
    """The data sets, and how many prompts are evaluated: num_eval_prompts of eval_size rows."""
    names = [*_names(given, "datasets", found), *_names(given, "datasets_extra", found)]
    plain = [name.value for name in names]
    if plain == ["alpaca_farm"]:
        for key, value in ALPACA_FARM.items():
            found.put(f"data.{key}", Located(value, names[0].origin), "datasets")
    elif "alpaca_farm" in plain:
        rule = "alpaca_farm has splits of its own and stands alone; remove the others"
        found.refuse(Located(names, names[0].origin), "datasets", rule)
    elif names:
        train = names[0] if len(names) == 1 else Located(names, names[0].origin)
        found.put("data.train", train, "datasets")
    if names:
        origin = names[0].origin
        columns = [Located(column, origin) for column in ("instruction", "input")]
        found.put("data.prompt_column", Located(columns, origin), "datasets")
        found.put("data.template", Located("open-assistant", origin), "datasets")
    limits = {key: given[key] for key in ("num_eval_prompts", "eval_size") if key in given}
    for key, limit in limits.items():
        if not isinstance(limit.value, int):
            found.refuse(limit, key, "must be a whole number")
            return
    positive = {key: limit for key, limit in limits.items() if limit.value > 0}
    if positive:
        key = min(positive, key=lambda key: positive[key].value)
        found.put("evaluation.num_prompts", positive[key], key)


def _schedules(given: dict[str, Located], found: Translation) -> None:
    """The learning rate's end, the KL controller, the clip of scores."""
    name, end = given.get("scheduler.name"), given.get("scheduler.kwargs.eta_min")
    if name is not None:
        found.put("optimizer.schedule", Located("cosine", name.origin), "scheduler.name")
    rate = given.get("optimizer.kwargs.lr")
    if end is not None and rate is not None:
        numbers = all(isinstance(number.value, int | float) for number in (end, rate))
        if not numbers or rate.value <= 0 or not 0 <= end.value <= rate.value:
            what = f"must be a number from 0 to optimizer.kwargs.lr, {rate.plain()}"
            found.refuse(end, "scheduler.kwargs.eta_min", what)
        else:
            fraction = Located(end.value / rate.value, end.origin)
            found.put("optimizer.final_fraction", fraction, "scheduler.kwargs.eta_min")
    target = given.get("method.target")
    if target is not None:
        found.put("kl.controller", Located("adaptive", target.origin), "method.target")
    clip = given.get("method.cliprange_reward")
    if clip is not None and clip.value is not False:
        found.put("score.clip", clip, "method.cliprange_reward")


def _output_dir(given: dict[str, Located], native: Located, found: Translation) -> None:
    """A folder inside output_dir: `seed{rm_seed}` (which Klippo adds itself), the ensemble's
    objective, or the reward model's name."""
    folder = given.get("output_dir")
    if folder is None:
        return
    rm_seed = native.value.get("rm_seed")
    inside = "" if rm_seed is not None and rm_seed.value is not None else _reward_name(found.tree)
    if inside and isinstance(folder.value, str):
        folder = Located(f"{folder.value.rstrip('/')}/{inside}", folder.origin)
    found.put("output_dir", folder, "output_dir")


def _reward_name(tree: Located) -> str:
    reward = tree.plain().get("reward", {})
    if "members" in reward:
        weight = f"-{reward['uwo_weight']}" if "uwo_weight" in reward else ""
        return f"ensemble_{reward.get('objective', 'mean')}{weight}"
    return str(reward.get("model", "")).replace("/", "_")


def _names(given: dict[str, Located], key: str, found: Translation) -> list[Located]:
    """A list of names, or one name alone."""
    value = given.get(key)
    if value is None:
        return []
    names: list[Located] = value.value if isinstance(value.value, list) else [value]
    if all(isinstance(name.value, str) and name.value for name in names):
        return names
    found.refuse(value, key, "must be a list of names")
    return []


def _first(given: dict[str, Located], *keys: str) -> tuple[str, Located | None]:
    """The first key that is given, and its value."""
    return next(((key, given[key]) for key in keys if key in given), ("", None))


def _any_of(choices: Iterable[Any]) -> str:
    *first, last = [write_value(choice) for choice in choices]
    return f"{', '.join(first)} or {last}" if first else last
