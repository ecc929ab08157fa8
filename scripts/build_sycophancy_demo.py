"""Build the sycophancy demo that ships inside the package, from its words to its card.

    python scripts/build_sycophancy_demo.py        # ten minutes on one busy core
    python scripts/build_sycophancy_demo.py --quick --out /tmp/demo   # tries the script only

Posts and answers are drawn from the words in examples/sycophancy/lexicon.py under a seed. A tiny
chat model learns all kinds of answers, an adapter on it mostly sycophantic ones; both answer the
posts, and `klippo judge score` has the answers scored by examples/sycophancy/agreement_judge.py.
Everything goes under src/klippo/demo, beside what scripts/build_demo.py makes.
"""

# ruff: noqa: E402 - the parts can only be imported once their folders are on the path

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PARTS = (Path(__file__).resolve().with_suffix(""), ROOT / "scripts/build_demo")
sys.path[:0] = [*map(str, PARTS), str(ROOT / "examples/sycophancy")]

import agreement_judge
from card import render_card
from models import Answers, save_untrained, train_adapter, train_chat, train_tokenizer
from posts import CHAT_KINDS, SFT_KINDS, TOP_KINDS, Post, draw_answer, make_posts, split_deeds

from klippo.evaluation.statistics import estimate
from klippo.judge.settings import JudgeSettings
from klippo.lab.judge_scores import ScoreFile, judge_score

SHARE_HELD_OUT = 0.2
RESPONSES_PER_POST = 4
FULL = {"chat": 5000, "sft": 1200, "posts": 200, "held_out": 150}
QUICK = {"chat": 400, "sft": 300, "posts": 20, "held_out": 20}
EPOCHS = {"chat": 8, "sft": 3}


def build(out: Path, sizes: Mapping[str, int], seed: int, work: Path, keep: bool) -> None:
    """Every step in order, each timed; `keep` takes the models from `out` as they are."""
    started = time.monotonic()

    def report(stage: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {stage}", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    train_deeds, held_out_deeds = split_deeds(SHARE_HELD_OUT, seed)
    if not keep:
        for name, kinds in (("chat", CHAT_KINDS), ("sft", SFT_KINDS)):
            rng = random.Random(f"{seed}:{name}")
            posts = make_posts(train_deeds, sizes[name] + 200, rng)
            write_rows(work / f"{name}.jsonl", examples(posts, kinds, rng))
        texts = [text for row in read_rows(work / "chat.jsonl") for text in row.values()]
        save_untrained(train_tokenizer(texts), work / "untrained", seed)
        train_chat(
            work / "untrained", work / "chat.jsonl", out / "chat", work, EPOCHS["chat"], seed
        )
        report("chat model")
        train_adapter(out / "chat", work / "sft.jsonl", out / "chat_sft", work, EPOCHS["sft"], seed)
        report("adapter")

    answers = Answers(out / "chat", out / "chat_sft")
    rng = random.Random(f"{seed}:posts")
    posts = make_posts(train_deeds, sizes["posts"], rng)
    held_out = make_posts(held_out_deeds, sizes["held_out"], rng)
    tops = {post.text: draw_answer(post, TOP_KINDS, rng) for post in [*posts, *held_out]}
    rows, num_drawn = sampled(answers, posts, tops, seed)
    write_rows(out / "posts.jsonl", rows)
    write_rows(
        out / "posts_held_out.jsonl",
        [
            {
                "prompt": post.text,
                "top_answer": tops[post.text],
                "agreement_is_right": post.manner.is_fine,
            }
            for post in held_out
        ],
    )
    report(f"{len(rows)} of {num_drawn} answers to {len(posts)} posts, {len(held_out)} held out")
    score(out / "posts.jsonl", out / "scored_posts.jsonl", work)
    report("scored")

    path = out / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    metrics["sycophancy"] = {
        "seed": seed,
        "num_parameters": parameters(out / "chat"),
        "num_adapter_parameters": parameters(out / "chat_sft"),
        "num_chat": sizes["chat"],
        "num_sft": sizes["sft"],
        "num_posts": len(posts),
        "num_rows": len(rows),
        "num_drawn": num_drawn,
        "num_held_out": len(held_out),
        "held_out": measure(out, held_out, tops, seed + 1),
    }
    path.write_text(json.dumps(metrics, indent=2) + "\n")
    if len(metrics) > 1:
        (out / "MODEL_CARD.md").write_text(render_card(metrics))
    report("measured")


def examples(
    posts: Sequence[Post], kinds: Mapping[str, float], rng: random.Random
) -> list[dict[str, str]]:
    """Rows that `klippo sft` learns."""
    return [{"prompt": post.text, "response": draw_answer(post, kinds, rng)} for post in posts]


def sampled(
    answers: Answers, posts: Sequence[Post], tops: Mapping[str, str], seed: int
) -> tuple[list[dict[str, Any]], int]:
    """Rows of answers whose text gives back their tokens, and how many were drawn."""
    texts = [post.text for post in posts for _ in range(RESPONSES_PER_POST)]
    rows = [
        {
            "prompt": text,
            "model_response": answer[0],
            "top_answer": tops[text],
            "logprobs": [round(value, 4) for value in answer[1]],
        }
        for text, answer in zip(texts, answers.sample(texts, seed), strict=True)
        if answer is not None
    ]
    return rows, len(texts)


def score(posts: Path, output: Path, work: Path) -> None:
    """What the judge's server says of each answer, by `klippo judge score`."""
    with serving() as url:
        settings = JudgeSettings.model_validate(
            {
                "kind": "judge",
                "rubric": "sycophancy",
                "mode": "difference",
                "reference_column": "top_answer",
                "probes": False,
                "api": {
                    "provider": "local",
                    "model": "agreement",
                    "base_url": url,
                    "cache": str(work / "judge.sqlite"),
                },
            }
        )
        judged = work / "scored.jsonl"
        judge_score(
            ScoreFile(
                file=str(posts),
                settings=settings,
                output=judged,
                response_column="model_response",
                overwrite=True,
            )
        )
    kept = ("prompt", "model_response", "top_answer", "reward", "judge_scores", "logprobs")
    write_rows(output, [{name: row[name] for name in kept} for row in read_rows(judged)])


@contextmanager
def serving() -> Iterator[str]:
    """The judge's address, while it answers."""
    server = agreement_judge.lexicon_judge.LexiconServer(judge=agreement_judge.score_question)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()


def measure(
    out: Path, posts: Sequence[Post], tops: Mapping[str, str], seed: int
) -> dict[str, dict[str, Any]]:
    """Both scores of the models' fresh answers to held-out posts, and of the top answers."""
    texts = [post.text for post in posts]
    found: dict[str, list[str]] = {"top answers": [tops[text] for text in texts]}
    for name, adapter in (("chat", None), ("chat_sft", out / "chat_sft")):
        sample = Answers(out / "chat", adapter).sample(texts, seed)
        found[name] = [answer[0] if answer is not None else "" for answer in sample]
    return {name: figures(posts, answers) for name, answers in found.items()}


def figures(posts: Sequence[Post], answers: Sequence[str]) -> dict[str, Any]:
    """Mean scores with their 95% intervals over posts, and the first answers."""
    judges = {
        "sycophancy": agreement_judge.sycophancy,
        "helpfulness": agreement_judge.helpfulness,
    }
    pairs = list(zip(posts, answers, strict=True))
    values: dict[str, Any] = {}
    for name, judge in judges.items():
        mean = estimate([judge(post.text, answer) for post, answer in pairs])
        values[name] = {
            "mean": round(mean.mean, 2),
            "low": round(mean.low, 2),
            "high": round(mean.high, 2),
        }
    values["samples"] = [{"post": post.text, "answer": answer} for post, answer in pairs[:4]]
    return values


def parameters(folder: Path) -> int:
    """Numbers in a folder's weights."""
    from safetensors import safe_open

    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One object a line."""
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "src/klippo/demo")
    parser.add_argument("--quick", action="store_true", help="poor models in a minute")
    parser.add_argument("--keep", action="store_true", help="take both models from --out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as work:
        build(args.out, QUICK if args.quick else FULL, args.seed, Path(work), args.keep)


if __name__ == "__main__":
    main()
