"""Random configs, valid and broken, made from the schema itself: new settings are covered at once.

A config is a small run of the packaged models with one to four changes. What a setting may hold is
read from its type in the schema.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from klippo.config.located import write_yaml
from klippo.config.problems import by_kind, child, members, sections_of
from klippo.config.schema import RunConfig
from klippo.settings import Settings
from klippo.supervised.settings import SFTConfig

WORDS: dict[str, list[str]] = {
    "model": ["demo:policy", "demo:proxy", "demo:gold", "demo:nothing", "no/such-model", "model"],
    "name": ["demo:policy", "no/such-model"],
    "adapter": ["demo:policy", "adapter"],
    "train": [
        "demo:prompts",
        "prompts.jsonl",
        "pairs.jsonl",
        "broken.jsonl",
        "absent.csv",
        "no/such-data",
    ],
    "validation": ["prompts.jsonl", "absent.jsonl", "test"],
    "split": ["train", "train[:4]", "train[50%:]", "train[9:", "test"],
    "members": ["demo:proxy", "demo:gold", "demo:{seed}"],
    "function": ["rewards.py:score", "rewards.py:absent", "raising.py:score", "json:dumps", "x"],
    "template": ["{prompt}", "Say: {prompt}", "{prompt}{response}", "chat", "alpaca", "{x}", "{"],
    "prompt_column": ["prompt", "text", "absent"],
    "column": ["reward", "prompt", "absent"],
    "base_url": ["http://127.0.0.1:9/v1", "https://judge.invalid/v1", "ftp://x", "http://["],
    "servers": ["http://127.0.0.1:9", "127.0.0.1:9", "http://[::1"],
    "api_key_env": ["ABSENT_KEY", "sk-not-a-name"],
    "provider": ["local", "openai", "vllm"],
    "rubric": ["general", "pairwise", "rubric.md", "absent.md"],
    "output_dir": ["out/{name}", "out/{seed}", "out/../out/a", "prompts.jsonl", "out/{x}", "."],
    "target_modules": ["all-linear", "c_attn", "q_proj", "("],
    "prompts": ["demo:prompts", "prompts.jsonl"],
    "policy": ["demo:policy"],
}
"""Texts for the settings of these names, right and wrong; files are those of `write_files`."""
PLAIN_WORDS = ["prompt", "good", "</s>", "a b"]
NUMBERS = [0, 1, 2, 3, 4, 8, 16, -1, 100]
FRACTIONS = [0.0, 0.1, 0.5, 1.0, 2.0, -0.5, 1e-5, 30.0]
NONSENSE: list[Any] = [
    *(None, True, False, 0, -1, 7, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**30), 10**400),
    *(0.5, -0.0, 1e-320, 1e38, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
    *("", " ", "nonsense", "true", "1", "1e5", "null", "../../../etc/passwd", "/etc/passwd"),
    *(
        "~",
        "~nobody-here/x",
        "/",
        "a\x00b",
        "\u202egnp.exe",
        "naïve 🙂 שלום",
        "line\nbreak",
        "%s%n",
    ),
    *("{}", "{seed}", "{seed!r}", "{0.__class__}", "x" * 5000, "-", "--overwrite", "demo:", ":"),
    *([], [[]], [None], [1, "a", None], {}, {"a": {"b": []}}, {"": ""}, {"kind": "sum"}),
    *({"kind": ["sum"]}, {"kind": None}, [0.1] * 3, ["x"] * 200, {"model": {"model": {}}}),
]
DAMAGE: list[Callable[[str, random.Random], str]] = [
    lambda text, rng: text[: rng.randrange(len(text))],
    lambda text, rng: _insert(text, rng, "\t"),
    lambda text, rng: _insert(text, rng, "\x00"),
    lambda text, rng: _insert(text, rng, rng.choice(":{}[]&*!|>%@`'\"#,\n-")),
    lambda text, rng: text + rng.choice(text.splitlines()) + "\n",
    lambda text, _: text + "policy: !!python/object/apply:os.system [true]\n",
    lambda text, _: text + "a: &a [x, *a]\n",
    lambda text, _: (
        text
        + "a0: &a0 [x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    ),
    lambda text, rng: text + "deep: " + "[" * rng.choice([50, 3000]) + "\n",
    lambda text, rng: text + "deep: " + "[" * (n := rng.choice([90, 3000])) + "]" * n + "\n",
    lambda text, _: text + "x: " + "9" * 5000 + "\n",
    lambda text, _: "- " + text.replace("\n", "\n  "),
    lambda _, rng: rng.choice(
        ["", "\n", "null", "42", "text", "[]", "{}", "---\n---\n", "%YAML 9"]
    ),
    lambda text, _: text.encode("utf-16").decode("latin-1"),
]


@dataclass(frozen=True)
class RandomConfig:
    """The text of a config file, and the settings that are not as in the valid one.

    `changed` has their keys, and the names in their values; None where the text itself is damaged.
    """

    text: str
    changed: list[str] | None = None


def small_run() -> dict[str, Any]:
    """A valid run of a second, of packaged models."""
    return {
        "output_dir": "out/{name}",
        "device": "cpu",
        "num_threads": 1,
        "policy": {"model": "demo:policy"},
        "data": {"train": "demo:prompts"},
        "rollout": {"response_length": 4},
        "reward": {"kind": "classifier", "model": "demo:proxy"},
        "ppo": {"num_steps": 1, "batch_size": 4, "minibatch_size": 2, "num_epochs": 1},
        "evaluation": {"num_prompts": 2, "num_shown": 1},
    }


VARIANTS: list[dict[str, Any]] = [
    {},
    {"gold": {"kind": "classifier", "model": "demo:gold"}, "checkpoint": {"every": 1}},
    {"policy": {"model": "demo:policy", "tuning": "lora"}, "critic": {"kind": "lora"}},
    {"policy": {"model": "demo:policy", "tuning": "last_layers", "num_unfrozen_layers": 1}},
    {"critic": {"kind": "separate"}, "kl": {"controller": "adaptive"}},
    {"reward": {"kind": "function", "function": "rewards.py:score"}, "score": {"whiten": True}},
    {
        "reward": {
            "kind": "ensemble",
            "members": ["demo:proxy_seed{seed}"],
            "seeds": [1, 2],
            "objective": "UWO",
            "uwo_weight": 0.5,
            "standardize": "start",
            "reference_size": 4,
        }
    },
    {
        "reward": {
            "kind": "sum",
            "parts": {
                "a": {"reward": {"kind": "repetition"}, "weight": 0.5},
                "b": {"reward": {"kind": "length", "max_tokens": 3}, "normalize": True},
            },
        }
    },
    {
        "data": {"train": "prompts.jsonl"},
        "offline": {"num_passes": 1},
        "reward": {"kind": "column"},
        "kl": {"coef": 0.0},
    },
]
"""Sections that replace those of the small run: other ways through the code, all of them valid."""


def write_files(folder: Path) -> None:
    """The data, functions and rubric that random configs name."""
    words = ["good", "bad", "dull", "great", "odd", "new", "old", "long"]
    rows = [
        f'{{"prompt": "The {word} film", "response": "was {word}", "reward": {i}}}\n'
        for i, word in enumerate(words)
    ]
    (folder / "prompts.jsonl").write_text("".join(rows))
    pairs = [
        f'{{"prompt": "The {word} film", "chosen": " was good", "rejected": " was {word}er"}}\n'
        for word in words
    ]
    (folder / "pairs.jsonl").write_text("".join(pairs))
    (folder / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": ' + "[" * 3000 + "\n")
    (folder / "rewards.py").write_text(
        "def score(responses, **_):\n    return [float(len(r)) for r in responses]\n"
    )
    (folder / "raising.py").write_text("def score(responses):\n    raise KeyError('weather')\n")
    (folder / "rubric.md").write_text("How good is {response} as an answer to {prompt}?\n")
    (folder / "model").mkdir()


def small_stage(schema: type[Settings]) -> dict[str, Any]:
    """A valid config of an earlier stage: as short, on the files of `write_files`."""
    training = {"batch_size": 4, "learning_rate": 1e-3}
    common = {"output_dir": "out/{name}", "device": "cpu", "num_threads": 1, "training": training}
    if schema is SFTConfig:
        return common | {"model": {"name": "demo:policy"}, "data": {"train": "prompts.jsonl"}}
    return common | {
        "model": {"name": "demo:policy"},
        "data": {"train": "pairs.jsonl", "validation_size": 2},
        "max_tokens": 16,
    }


def random_config(seed: int, schema: type[Settings]) -> RandomConfig:
    """The config of a seed: always the same for the same schema."""
    rng = random.Random(seed)
    if schema is RunConfig:
        tree = small_run() | copy.deepcopy(rng.choice(VARIANTS))
    else:
        tree = small_stage(schema)
    changed: list[str] = []
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 4])):
        changed += _change(tree, schema, rng)
    text = write_yaml(tree)
    if rng.random() < 0.08:
        return RandomConfig(rng.choice(DAMAGE)(text, rng), None)
    return RandomConfig(text, changed)


def plausible(annotation: Any, name: str, rng: random.Random, depth: int = 0) -> Any:
    """A value of a type; often, but not always, one that its constraints allow."""
    options = members(annotation)
    if not options:
        return None
    if _is_optional(annotation) and rng.random() < 0.2:
        return None
    kinds = by_kind(annotation)
    if kinds:
        if depth > 3:
            return {"kind": "length", "max_tokens": 3}
        kind = rng.choice(sorted(kinds))
        return {"kind": kind} | _filled(kinds[kind], rng, depth, without=("kind",))
    chosen = rng.choice(options)
    origin = get_origin(chosen)
    if isinstance(chosen, type) and issubclass(chosen, Settings):
        return _filled(chosen, rng, depth)
    if origin is Literal:
        return rng.choice(get_args(chosen))
    if origin in (list, tuple):
        item = get_args(chosen)[0]
        return [plausible(item, name, rng, depth + 1) for _ in range(rng.choice([1, 2, 2, 3]))]
    if origin is dict:
        return {
            word: plausible(get_args(chosen)[1], name, rng, depth + 1)
            for word in rng.sample(["a", "b", "c"], rng.choice([1, 2]))
        }
    if chosen is bool:
        return rng.random() < 0.5
    if chosen is int:
        return rng.choice(NUMBERS)
    if chosen is float:
        return rng.choice(FRACTIONS)
    return rng.choice(WORDS.get(name, PLAIN_WORDS))


def _filled(
    section: type[Settings], rng: random.Random, depth: int, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """All that a section requires, and some of the rest."""
    found = {}
    for key, info in section.model_fields.items():
        wanted = info.is_required() or rng.random() < 0.15
        if key not in without and wanted:
            annotation = Annotated[info.annotation, *info.metadata] if info.metadata else None
            found[key] = plausible(annotation or info.annotation, key, rng, depth + 1)
    return found


def _change(tree: dict[str, Any], schema: type[Settings], rng: random.Random) -> list[str]:
    """One change somewhere in the tree; the names of the settings that it touches."""
    holder, key, annotation, path = _place(tree, schema, rng)
    match rng.choice(["plausible"] * 9 + ["nonsense"] * 6 + ["drop", "rename", "unknown", "twice"]):
        case "plausible":
            holder[key] = plausible(annotation, key, rng)
        case "nonsense":
            holder[key] = copy.deepcopy(rng.choice(NONSENSE))
        case "drop":
            holder.pop(key, None)
        case "rename":
            value = holder.pop(key, None)
            new = key[:-1] + rng.choice("xyz_")
            holder[new] = value
            return [*path, key, new]
        case "unknown":
            new = rng.choice(["lr", "clip", "kind", "model", "seed", "", "kind ", "ключ"])
            holder[new] = copy.deepcopy(rng.choice(NONSENSE))
            return [*path, new]
        case "twice":  # a whole section where one setting is meant, or the other way round
            holder[key] = {key: copy.deepcopy(holder.get(key))}
    return [*path, key, *_names(holder.get(key))]


def _place(
    tree: dict[str, Any], schema: type[Settings], rng: random.Random
) -> tuple[dict[str, Any], str, Any, list[str]]:
    """A setting of the schema: the mapping that holds it (made if need be), its key and type."""
    holder, section, path = tree, schema, []
    while True:
        key = rng.choice(sorted(section.model_fields))
        annotation = child(section, key)
        found = _section_of(annotation, holder.get(key), rng)
        if found is None or rng.random() < 0.25:
            return holder, key, annotation, path
        inner = holder.get(key)
        if not isinstance(inner, dict):
            inner = holder[key] = _filled(found, rng, 0) if _has_required(found) else {}
        path.append(key)
        holder, section = inner, found


def _section_of(annotation: Any, there: Any, rng: random.Random) -> type[Settings] | None:
    kinds = by_kind(annotation)
    if kinds:
        kind = there.get("kind") if isinstance(there, dict) else rng.choice(sorted(kinds))
        return kinds.get(kind) if isinstance(kind, str) else None
    return next(iter(sections_of(annotation)), None)


def _has_required(section: type[Settings]) -> bool:
    return any(info.is_required() for info in section.model_fields.values())


def _is_optional(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _is_optional(get_args(annotation)[0])
    return NoneType in get_args(annotation)


def _names(value: Any) -> list[str]:
    """All keys inside a value, and all names that stand there: a message may say either."""
    if isinstance(value, dict):
        return [str(key) for key in value] + [n for item in value.values() for n in _names(item)]
    if isinstance(value, list):
        return [name for item in value for name in _names(item)]
    return [value] if isinstance(value, str) and len(value) > 2 else []


def _insert(text: str, rng: random.Random, mark: str) -> str:
    place = rng.randrange(len(text))
    return text[:place] + mark + text[place:]
