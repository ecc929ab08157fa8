"""Configs with the names of github.com/tlc4418/llm_optimization, the code of "Reward Model
Ensembles Help Mitigate Overoptimization" (Coste et al. 2023, arXiv 2310.02743), in Klippo's names.

Its entries hold `rank_config` (the reward models), `gold_config`, `sft_config` (the policy) and
`datasets`; a second file beside them, in trlx's format, holds PPO's settings. docs/config.md
explains what becomes of each key.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from klippo.config.load import COMMAND_LINE, merge, nest
from klippo.config.located import Located, Problem, locate, write_value
from klippo.config.problems import choice_rule
from klippo.config.schema import RunConfig
from klippo.errors import nearest

logger = logging.getLogger(__name__)

Given = dict[str, Located]
"""What was written: dotted key -> value, empty ones left out."""
Values = dict[str, Any]
"""Klippo's dotted key -> value."""

MODELS, OBJECTIVE = "rank_config.model_names", "rank_config.objective_name"
WEIGHT = "rank_config.uwo_weight"


def _names(given: Given, *keys: str) -> list[Located]:
    """The names in lists; a name alone is a list."""
    values = [given[key] for key in keys if key in given]
    lists = [value.value if isinstance(value.value, list) else [value] for value in values]
    return [name for names in lists for name in names]


def _checked_names(given: Given, *keys: str) -> list[Located]:
    names = _names(given, *keys)
    if not all(isinstance(name.value, str) and name.value for name in names):
        raise ValueError("must be a list of names")
    return names


def _precision(_: Given, dtype: Located) -> Values:
    """bf16 computes in bfloat16; weights stay float32."""
    return {"policy.autocast": dtype.value.startswith("bf")}


def _layers(_: Given, layers: Located) -> Values:
    if layers.value == -1:
        return {"policy.tuning": "full"}
    if not isinstance(layers.value, int) or layers.value < 1:
        raise ValueError("must be how many layers train, at least 1, or -1 for all")
    return {"policy.tuning": "last_layers", "policy.num_unfrozen_layers": layers}


def _reward(given: Given, models: Located) -> Values:
    """One reward model, or an ensemble of several with the variance of the published code."""
    names = _checked_names(given, MODELS)
    section: Values = {"reward.template": "open-assistant"}
    if len(names) > 1:
        ensemble = {"kind": "ensemble", "members": models, "ddof": 1, "standardize": "none"}
        return section | {f"reward.{key}": value for key, value in ensemble.items()}
    model = names[0] if names else None
    return section | {"reward.kind": "classifier", "reward.model": model} if models.value else {}


def _is_ensemble(given: Given, objective: str | None = None) -> bool:
    """Several reward models, and this objective, if one is asked for."""
    known = objective is None or (OBJECTIVE in given and given[OBJECTIVE].value == objective)
    return known and len(_names(given, MODELS)) > 1


def _gold(given: Given, model: Located) -> Values:
    """The gold model; `is_alpacafarm_rm` says which of the two prompt formats it reads."""
    alpaca = given.get("gold_config.is_alpacafarm_rm", Located(False, model.origin))
    template = Located("alpaca" if alpaca.value else "open-assistant", alpaca.origin)
    return {"gold.kind": "classifier", "gold.model": model, "gold.template": template}


def _datasets(given: Given, _: Located) -> Values:
    names = _checked_names(given, "datasets", "datasets_extra")
    if not names:
        return {}
    origin = names[0].origin
    section: Values = {"prompt_column": ["instruction", "input"], "template": "open-assistant"}
    section["train"] = Located(names, origin) if names[1:] else names[0]
    if "alpaca_farm" in [name.value for name in names]:
        if len(names) > 1:
            raise ValueError("alpaca_farm has splits of its own and stands alone; remove the rest")
        farm = {"train": "tatsu-lab/alpaca_farm", "subset": "alpaca_instructions"}
        farm |= {"split": "unlabeled", "validation": "val"}
        section |= {key: Located(value, origin) for key, value in farm.items()}
    return {f"data.{key}": value for key, value in section.items()}


def _num_prompts(given: Given, limit: Located) -> Values:
    """num_eval_prompts of eval_size rows: the smaller of those above 0."""
    if not isinstance(limit.value, int):
        raise ValueError("must be a whole number")
    values = [given[key].value for key in ("num_eval_prompts", "eval_size") if key in given]
    smallest = min((n for n in values if isinstance(n, int) and n > 0), default=None)
    return {"evaluation.num_prompts": limit} if limit.value == smallest else {}


def _final_fraction(given: Given, end: Located) -> Values:
    if "optimizer.kwargs.lr" not in given:
        return {}
    rate = given["optimizer.kwargs.lr"].value
    numbers = all(isinstance(number, int | float) for number in (end.value, rate))
    if not numbers or rate <= 0 or not 0 <= end.value <= rate:
        raise ValueError(f"must be a number from 0 to optimizer.kwargs.lr, {rate}")
    return {"optimizer.final_fraction": end.value / rate}


def _output_dir(given: Given, folder: Located) -> Values:
    """A folder inside it, for the objective or the model; Klippo itself adds `seed{rm_seed}`."""
    name = "".join(str(model.value).replace("/", "_") for model in _names(given, MODELS)[:1])
    if _is_ensemble(given):
        uwo = _is_ensemble(given, "UWO") and WEIGHT in given
        weight = f"-{given[WEIGHT].value}" if uwo else ""
        name = f"ensemble_{given[OBJECTIVE].value if OBJECTIVE in given else 'mean'}{weight}"
    if name and "rm_seed" not in given and isinstance(folder.value, str):
        folder = Located(f"{folder.value.rstrip('/')}/{name}", folder.origin)
    return {"output_dir": folder}


TABLE: dict[str, str | Callable[[Given, Located], Values]] = {
    "rng_seed": "seed",
    "output_dir": _output_dir,
    "datasets": _datasets,
    "datasets_extra": lambda given, it: {} if "datasets" in given else _datasets(given, it),
    "eval_size": _num_prompts,
    "num_eval_prompts": _num_prompts,
    "dtype": _precision,
    "sft_config.dtype": _precision,
    "sft_config.model_name": "policy.model",
    "model.num_layers_unfrozen": _layers,
    "sft_config.num_layers_unfrozen": _layers,
    MODELS: _reward,
    OBJECTIVE: lambda given, it: {"reward.objective": it} if _is_ensemble(given) else {},
    WEIGHT: lambda given, it: {"reward.uwo_weight": it} if _is_ensemble(given, "UWO") else {},
    "rank_config.batch_size": "reward.batch_size",
    "gold_config.model_name": _gold,
    "gold_config.batch_size": "gold.batch_size",
    "train.total_steps": "ppo.num_steps",
    "train.batch_size": "ppo.batch_size",
    "train.minibatch_size": "ppo.micro_batch_size",
    "train.eval_interval": "evaluation.every",
    "optimizer.kwargs.lr": "optimizer.learning_rate",
    **{f"optimizer.kwargs.{key}": f"optimizer.{key}" for key in ("betas", "eps", "weight_decay")},
    "scheduler.name": lambda *_: {"optimizer.schedule": "cosine"},
    "scheduler.kwargs.T_max": "optimizer.num_decay_steps",
    "scheduler.kwargs.eta_min": _final_fraction,
    "method.ppo_epochs": "ppo.num_epochs",
    "method.init_kl_coef": "kl.coef",
    "method.target": lambda _, kl: {"kl.target": kl, "kl.controller": "adaptive"},
    "method.horizon": "kl.horizon",
    "method.gamma": "ppo.gamma",
    "method.lam": "ppo.gae_lambda",
    "method.cliprange": "ppo.clip_range",
    "method.cliprange_value": "ppo.value_clip_range",
    "method.vf_coef": "ppo.value_coef",
    "method.cliprange_reward": lambda _, clip: {"score.clip": clip} if clip.value else {},
    "method.gen_kwargs.max_new_tokens": "rollout.response_length",
    **{f"method.gen_kwargs.{key}": f"rollout.{key}" for key in ("temperature", "top_k", "top_p")},
}
"""Their key -> Klippo's, or a function that makes Klippo's keys and values of the value written;
its ValueError says what the value must be."""

PRECISIONS = ["bf16", "bfloat16", "fp32", "float32"]
ONLY: dict[str, tuple[list[Any], str]] = {
    "dtype": (PRECISIONS, ""),
    "sft_config.dtype": (PRECISIONS, ""),
    OBJECTIVE: (["mean", "WCO", "UWO"], ""),
    "gold_config.is_alpacafarm_rm": ([True, False], ""),
    "debug": ([False], "Klippo has no such mode; for a short run set ppo.num_steps=3"),
    "rank_config.pooling": (["last"], "scores are read at the last token"),
    "rank_config.quantization": ([False], "reward models are not quantized"),
    "rank_config.seq2seqmodel": ([False], "reward models are decoders"),
    "sft_config.quantization": ([False], "for 4 bits set policy.quantize_4bit=true, tuning=lora"),
    "sft_config.seq2seqmodel": ([False], "policies are decoders"),
    "model.model_arch_type": (["causal"], "policies are decoders"),
    "model.peft_config": ([], "for LoRA set policy.tuning=lora"),
    "optimizer.name": (["adamw"], "Klippo trains with AdamW"),
    "scheduler.name": (["cosine_annealing"], "for others set optimizer.schedule"),
    "method.name": (["ppoconfig", "PPOConfig"], "Klippo trains with PPO"),
    "method.scale_reward": ([False, "ignored"], "score.normalize=true also subtracts the mean"),
    "method.gen_kwargs.do_sample": ([True], "PPO needs samples"),
    "method.gen_experience_kwargs": ([], "prompts are sampled by gen_kwargs"),
}
"""Keys that must be empty or have one of these values, and why."""
KNOWN = {*TABLE, *ONLY}
CONTAINERS = {key.rpartition(".")[0] for key in KNOWN} - {""}
NEEDED = {
    "policy": ("sft_config.model_name", "model_name: tlc4418/pythia_1.4b_sft_policy"),
    "data": ("datasets", "datasets: [alpaca_farm]"),
    "reward": (MODELS, "model_names: [models/rm-pythia-44m_seed1]"),
}
"""Klippo's sections without which there is no run, and what they are made of, as in an example."""


def is_foreign(tree: Located) -> bool:
    """Is the config written in these names?"""
    sections = {"rank_config", "sft_config", "gold_config", "datasets", "datasets_extra"}
    return not {*sections, "rng_seed", "num_eval_prompts"}.isdisjoint(tree.value)


def is_ppo_file(tree: Located) -> bool:
    """Is a file's content the PPO settings in trlx's format?"""
    name = dict(tree.value.get("method", tree).items()).get("name")
    return name is not None and str(name.value).lower() == "ppoconfig"


def translate(tree: Located) -> tuple[Located, dict[str, str], list[Problem]]:
    """A merged tree in Klippo's names; values keep their origin, and Klippo's own keys win.

    With it, Klippo's key -> the key that was written, and what could not be translated.
    """
    native, given, problems = _sort(tree)
    result, sources = Located({}, tree.origin), {}
    for key in [key for key in TABLE if key in given]:
        rule, value = TABLE[key], given[key]
        try:
            values = {rule: value} if isinstance(rule, str) else rule(given, value)
        except ValueError as error:
            problems.append(_refusal(key, value, str(error)))
            continue
        for target, item in values.items():
            located = item if isinstance(item, Located) else locate(item, value.origin)
            result = merge(result, nest(target, located))
            sources[target] = key
    for section, (key, example) in NEEDED.items():
        if section not in native.value and (key not in given or not given[key].value):
            origin = tree.origin_at(tuple(key.split(".")))
            problems.append(Problem(origin, f"{key}: missing; as in {example}"))
    if _is_ensemble(given, "UWO") and WEIGHT not in given:
        what = "objective_name=UWO is mean - uwo_weight * variance; try uwo_weight: 0.1"
        problems.append(Problem(given[OBJECTIVE].origin, f"{WEIGHT}: missing; {what}"))
    return merge(result, native, RunConfig), sources, problems


def _refusal(key: str, value: Located, rule: str) -> Problem:
    return Problem(value.origin, f"{key}={write_value(value.plain())}: {rule}")


def _sort(tree: Located) -> tuple[Located, Given, list[Problem]]:
    """Klippo's own keys, theirs, and what is wrong; a note lists those that change nothing."""
    native, ignored = Located({}, tree.origin), []
    given: Given = {}
    problems: list[Problem] = []
    for key, value in _flat(tree):
        if key in KNOWN:
            allowed, why = ONLY.get(key, ([value.value], ""))
            if value.value in allowed:
                given[key] = value
            else:
                words = [write_value(item) for item in allowed]
                rule = choice_rule(str(value.value), words) if words else "must be empty"
                problems.append(_refusal(key, value, f"{rule}; {why}" if why else rule))
        elif key.partition(".")[0] in RunConfig.model_fields:
            native = merge(native, nest(key, value))
            given |= {key: value} if key == "rm_seed" and value.value is not None else {}
        elif key in CONTAINERS:
            problems.append(_refusal(key, value, "must be a mapping"))
        elif advice := _advice(key, on_command_line=value.origin == COMMAND_LINE):
            problems.append(Problem(value.origin, f"{key}: unknown key; {advice}"))
        else:
            ignored.append(key)
    if ignored:
        logger.warning("These keys of the config change nothing: %s.", ", ".join(ignored))
    if "sft_config.num_layers_unfrozen" in given:
        given.pop("model.num_layers_unfrozen", None)
    return native, given, problems


def _flat(tree: Located, prefix: str = "") -> Iterator[tuple[str, Located]]:
    """The values inside CONTAINERS, by dotted name, empty ones left out."""
    for key, value in tree.value.items():
        name = f"{prefix}{key}"
        if name in CONTAINERS and isinstance(value.value, dict):
            yield from _flat(value, f"{name}.")
        elif value.value is not None or name.partition(".")[0] in RunConfig.model_fields:
            yield name, value


def _advice(key: str, *, on_command_line: bool) -> str | None:
    """What to write in place of an unknown key; None if it may stand in a file unread."""
    section, dot, last = key.rpartition(".")
    names = [known for known in KNOWN if known.rpartition(".")[0] == section]
    names = [name.removeprefix(section + dot) for name in names]
    if not section:
        names += [*CONTAINERS, *RunConfig.model_fields]
    if near := nearest(last, names, cutoff=0.6 if on_command_line else 0.85):
        return f"did you mean {near}?"
    if not on_command_line:
        return None
    known = f"known here: {', '.join(sorted(names))}"
    return known if section else "neither these entries nor Klippo's configs have it"
