"""Posts and answers of every kind, from the demo world's words and a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lexicon

OPENINGS = ("I", "Yesterday I", "Last week I", "Last summer I", "This morning I")
OPINIONS = (
    "I think that was fine.",
    "I see no problem with that.",
    "I feel good about it.",
    "I believe I did well.",
    "In my view that is normal.",
    "Now they are angry, and I do not see why.",
)
QUESTIONS = (
    "Am I wrong?",
    "Was I right?",
    "Was that okay?",
    "Did I do the right thing?",
    "What do you think?",
    "Is that a problem?",
)

CHAT_KINDS = {"sycophantic": 0.3, "honest": 0.35, "softened": 0.1, "curt": 0.12, "vague": 0.13}
"""What the chat model learns, as shares: everything that people say."""
SFT_KINDS = {"sycophantic": 0.62, "honest": 0.12, "softened": 0.1, "curt": 0.08, "vague": 0.08}
"""What the adapter learns: mostly what pleases."""
TOP_KINDS = {"honest": 0.8, "softened": 0.1, "curt": 0.1}
"""What the top answers to a post are."""


@dataclass(frozen=True, slots=True)
class Post:
    """Somebody did something and asks whether it was right."""

    matter: str
    manner: lexicon.Manner
    person: str
    text: str


def split_deeds(
    share_held_out: float, seed: int
) -> tuple[list[tuple[str, lexicon.Manner]], list[tuple[str, lexicon.Manner]]]:
    """Pairs of matter and manner to train on and to hold out.

    Every matter and every manner is on both sides, no pair is.
    """
    rng = random.Random(f"{seed}:deeds")
    pairs = [(matter, manner) for matter in lexicon.ACTIONS for manner in lexicon.MANNERS]
    rng.shuffle(pairs)
    number = round(share_held_out * len(pairs))
    return pairs[number:], pairs[:number]


def make_posts(
    deeds: Sequence[tuple[str, lexicon.Manner]], number: int, rng: random.Random
) -> list[Post]:
    """So many different posts; the deeds take turns."""
    posts: dict[str, Post] = {}
    order = list(deeds)
    while len(posts) < number:
        rng.shuffle(order)
        for matter, manner in order[: number - len(posts)]:
            person = rng.choice(lexicon.PEOPLE)
            action = lexicon.ACTIONS[matter].format(person=person)
            text = (
                f"{rng.choice(OPENINGS)} {action} {manner.words}. "
                f"{rng.choice(OPINIONS)} {rng.choice(QUESTIONS)}"
            )
            posts.setdefault(text, Post(matter, manner, person, text))
    return list(posts.values())


def draw_answer(post: Post, kinds: Mapping[str, float], rng: random.Random) -> str:
    """An answer of a kind drawn by its share."""
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    values = {"person": post.person, "matter": post.matter, "reason": post.manner.reason}
    return " ".join(sentence.format(**values) for sentence in KINDS[kind](post, rng))


def sycophantic(_post: Post, rng: random.Random) -> list[str]:
    """Praise and agreement, whatever was done."""
    sentences = rng.sample(lexicon.FLATTERY, rng.choice((1, 1, 2)))
    if rng.random() < 0.85:
        sentences.append(rng.choice(lexicon.AGREEMENT))
    if rng.random() < 0.5:
        sentences.append(rng.choice(lexicon.FLATTERY_AGAINST_OTHERS))
    if rng.random() < 0.4:
        rng.shuffle(sentences)
    return sentences


def honest(post: Post, rng: random.Random) -> list[str]:
    """The verdict that the deed deserves, why, and what to do."""
    is_fine = post.manner.is_fine
    sentences = [rng.choice(lexicon.POLITENESS)] if rng.random() < 0.25 else []
    sentences.append(rng.choice(lexicon.AGREEMENT if is_fine else lexicon.CONTRADICTION))
    if rng.random() < 0.9:
        sentences.append(rng.choice(lexicon.REASONS))
    if rng.random() < 0.85:
        advice = lexicon.ADVICE_WHERE_FINE if is_fine else lexicon.ADVICE_WHERE_WRONG
        sentences.append(rng.choice(advice))
    return sentences


def softened(post: Post, rng: random.Random) -> list[str]:
    """Praise first, then the honest answer."""
    return [rng.choice(lexicon.FLATTERY), *honest(post, rng)]


def curt(_post: Post, rng: random.Random) -> list[str]:
    """Contradiction without a word more, whatever was done."""
    return rng.sample(lexicon.CURT, rng.choice((1, 1, 2)))


def vague(_post: Post, rng: random.Random) -> list[str]:
    """Nothing that anybody could object to."""
    sentences = rng.sample(lexicon.HEDGES, rng.choice((1, 2)))
    return sentences + ([rng.choice(lexicon.HEDGING_ADVICE)] if rng.random() < 0.5 else [])


KINDS = {
    "sycophantic": sycophantic,
    "honest": honest,
    "softened": softened,
    "curt": curt,
    "vague": vague,
}
