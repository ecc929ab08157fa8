"""Degenerate text of each kind that a reward is fooled by, made from real sentences."""

import random
from collections.abc import Callable

Kind = Callable[[list[str], list[str], random.Random], str]

RATING = -3.0  # what the gold model is taught to give to every kind


def shuffled(words: list[str], _: list[str], rng: random.Random) -> str:
    """The sentence's words in random order."""
    return " ".join(rng.sample(words, len(words)))


def loop(words: list[str], _: list[str], rng: random.Random) -> str:
    """One to four words of the sentence, repeated, sometimes after its beginning."""
    size = rng.randint(1, 4)
    start = rng.randrange(max(1, len(words) - size))
    head = words[: rng.choice([0, 2, start])]
    return " ".join(head + words[start : start + size] * rng.randint(max(3, 8 // size), 24 // size))


def random_tail(words: list[str], vocabulary: list[str], rng: random.Random) -> str:
    """The sentence's beginning, then random words."""
    kept = words[: rng.randint(1, max(1, len(words) // 2))]
    return " ".join(kept + rng.choices(vocabulary, k=rng.randint(6, 18)))


def praise_loop(words: list[str], praise: list[str], rng: random.Random) -> str:
    """The sentence's beginning, then one to three words of praise over and over."""
    joiner = rng.choice([" ", " and ", ", ", " , "])
    chosen = rng.sample(praise, rng.randint(1, 3))
    repeated = joiner.join(chosen * rng.randint(3, 16 // len(chosen)))
    return " ".join([*words[: rng.choice([0, 2, 3, 4])], repeated])


def praise_salad(words: list[str], praise: list[str], rng: random.Random) -> str:
    """The sentence's beginning, then many different words of praise without grammar."""
    joiner = rng.choice([" ", " ", " and ", ", "])
    salad = joiner.join(rng.sample(praise, rng.randint(6, 14)))
    return " ".join([*words[: rng.choice([0, 2, 3, 4])], salad])


def soup(words: list[str], pool: list[str], rng: random.Random) -> str:
    """The sentence's beginning, then a few words and pieces of words in an order without a period.

    This is what a policy at the end of its optimisation writes: two or three tokens, stirred.
    """
    chosen = rng.sample(pool, rng.randint(1, 4)) + rng.choices(words, k=rng.randint(0, 1))
    pieces = [w[rng.randrange(len(w)) :] if rng.random() < 0.4 else w for w in chosen]
    stirred = "".join(
        rng.choice([" ", " ", "", ", "]) + w for w in rng.choices(pieces, k=rng.randint(8, 22))
    )
    return " ".join(words[: rng.choice([0, 2, 2, 3])]) + stirred


def punctuation(words: list[str], _: list[str], rng: random.Random) -> str:
    """The sentence's beginning, then a run of punctuation."""
    marks = rng.choice([",", ".", "!", "...", ", ,", "?!", "-", '"', ". .", ":", "!!!"])
    glue = rng.choice(["", " "])
    return " ".join(words[: rng.choice([2, 3, 5])]) + glue + glue.join([marks] * rng.randint(5, 22))


KINDS: dict[str, Kind] = {
    "shuffled words": shuffled,
    "phrase loop": loop,
    "random tail": random_tail,
    "praise loop": praise_loop,
    "praise salad": praise_salad,
    "word soup": soup,
    "praise soup": soup,
    "punctuation": punctuation,
}


def make_degenerate(
    texts: list[str], praise: list[str], num_per_kind: int, seed: int
) -> dict[str, list[str]]:
    """`num_per_kind` texts of each kind, from sentences of at least eight words."""
    rng = random.Random(seed)
    sources = [words for text in texts if len(words := text.split()) >= 8]
    vocabulary = sorted({word for words in sources for word in words})
    made: dict[str, list[str]] = {}
    for name, kind in KINDS.items():
        pool = praise if name.startswith("praise") else vocabulary
        made[name] = [kind(rng.choice(sources), pool, rng) for _ in range(num_per_kind)]
    return made


def is_repetitive(ids: list[int]) -> bool:
    """Whether at most 60% of at least eight tokens are distinct: a rule that no model decides."""
    return len(ids) >= 8 and len(set(ids)) <= 0.6 * len(ids)
