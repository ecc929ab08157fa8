"""The models that ship with Klippo."""

from pathlib import Path

NAMES = {
    "policy": "policy",
    "proxy": "proxy",
    **{f"proxy_seed{seed}": f"proxy_seed{seed}" for seed in range(1, 6)},
    "gold": "gold",
    "prompts": "prompts.jsonl",
}


def demo_path(name: str) -> Path:
    """Path of a packaged model folder, or of the packaged prompts.

    Raises ValueError for a name that does not exist.
    """
    if name not in NAMES:
        raise ValueError(f"demo:{name} does not exist; there are {', '.join(NAMES)}")
    return Path(__file__).parent / NAMES[name]
