"""Neutral openings of movie-review sentences, composed from short lists."""

NOUNS = {
    "people": (
        "director, cast, lead actor, lead actress, screenwriter, hero, villain, heroine, "
        "supporting cast, narrator, young star, two leads, filmmaker, main character, producer, "
        "ensemble, cameraman, composer, actor, actress"
    ),
    "craft": (
        "script, dialogue, camera work, editing, music, soundtrack, score, acting, direction, "
        "photography, animation, costumes, screenplay, set design, voice work, lighting, "
        "makeup, narration, sound, choreography"
    ),
    "story": (
        "plot, story, ending, opening scene, first half, second half, final act, premise, twist, "
        "central mystery, framing story, setting, last scene, subplot, middle section, backstory, "
        "final hour, flashback, opening sequence, chase scene"
    ),
    "work": (
        "film, movie, picture, sequel, remake, comedy, thriller, drama, documentary, romance, "
        "western, horror film, adaptation, musical, action film, spy film, war film, crime film, "
        "short film, biopic"
    ),
}
FRAMES = {
    "people": ["The {}", "Here the {}", "Again the {}"],
    "craft": ["The {}", "Its {}", "As for the {},", "The {} here"],
    "story": ["The {}", "Its {}", "This {}"],
    "work": ["The {}", "This {}", "As a {}, it", "In this {},"],
}
WHOLE = {
    "viewer": [
        "I went to see this", "I watched this with", "If you like movies about", "Most viewers",
        "Parents", "Teenagers", "Some audiences", "Anyone who has seen", "Fans of the book",
        "My first thought", "After ten minutes,", "After the first hour,", "By the end,",
        "Halfway through,", "When the credits roll,", "For two hours,", "On the big screen,",
        "At the end of the day,", "Watching this movie", "Sitting through this",
        "It is hard to say", "You will leave the theater", "You may find yourself",
        "We get to see", "Those who know the director", "I have to say that",
    ],
    "comparison": [
        "Like the original,", "Like its hero,", "Unlike the first film,", "Unlike the book,",
        "Compared with the original,", "As in his last film,", "Like many films of its kind,",
        "More than anything, it", "Half comedy, half drama,", "Part thriller, part romance,",
    ],
    "plain": [
        "It is", "It's a", "There is", "There are", "This is", "What we have here is", "Here is",
        "The result is", "The whole thing", "What follows is", "At its heart,", "In a way,",
        "On the whole,", "In the end,", "At times,", "As it turns out,", "What the film says",
        "In other words,", "The question is",
    ],
}  # fmt: skip


def article(frame: str, noun: str) -> str:
    """Fill the frame; "As a" becomes "As an" before a vowel."""
    vowel = noun[0] in "aeiou"
    return (frame.replace(" a {}", " an {}") if vowel else frame).format(noun)


def write_prompts() -> list[dict[str, str]]:
    """Every prompt once, with its topic."""
    rows = [
        {"prompt": article(frame, noun), "topic": topic}
        for topic, nouns in NOUNS.items()
        for noun in nouns.split(", ")
        for frame in FRAMES[topic]
    ]
    rows += [{"prompt": p, "topic": topic} for topic, whole in WHOLE.items() for p in whole]
    return list({row["prompt"]: row for row in rows}.values())
