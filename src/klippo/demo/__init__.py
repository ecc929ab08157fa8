"""The models that ship with Klippo."""

from pathlib import Path

NAMES = {
    "policy": "policy",
    "proxy": "proxy",
    **{f"proxy_seed{seed}": f"proxy_seed{seed}" for seed in range(1, 6)},
    "gold": "gold",
    "prompts": "prompts.jsonl",
    "chat": "chat",
    "chat_sft": "chat_sft",
    "posts": "posts.jsonl",
    "posts_held_out": "posts_held_out.jsonl",
    "scored_posts": "scored_posts.jsonl",
}


def demo_path(name: str) -> Path:
    """Path of a packaged model or adapter folder, or of a packaged file of rows.

    Raises ValueError for a name that does not exist.
    """
    if name not in NAMES:
        raise ValueError(f"demo:{name} does not exist; there are {', '.join(NAMES)}")
    return Path(__file__).parent / NAMES[name]
