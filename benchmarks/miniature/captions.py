"""The caption grammar of the miniature world: short tags as web captions have them, and dense paragraphs.

Every word remembers what it speaks of, so that text encoders can be trained to know it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.miniature.scenes import BACKGROUND_NAMES, COLOUR_NAMES, PLACES, SHAPES, Scene, Thing

#: `Word.owner` of words that speak of the background, or of nothing in particular; other owners count the things.
BACKGROUND, NOBODY = -2, -1

SCENERY = {
    "night": ("night", "a dark night", "the night sky", "a starless night"),
    "snow": ("snow", "a snowy field", "white snow", "a field of snow"),
    "forest": ("forest", "a deep forest", "the dark green forest", "a forest"),
    "desert": ("desert", "a sandy desert", "the dry desert", "a desert of sand"),
}
WHERE = {
    "top left": ("in the top left corner", "in the upper left corner", "at the top left"),
    "top center": ("at the top center", "in the middle of the top row", "at the upper center"),
    "top right": ("in the top right corner", "in the upper right corner", "at the top right"),
    "middle left": ("at the middle left", "halfway down the left side", "on the left of the middle row"),
    "center": ("in the center", "in the very center of the picture", "at the exact center"),
    "middle right": ("at the middle right", "halfway down the right side", "on the right of the middle row"),
    "bottom left": ("in the bottom left corner", "in the lower left corner", "at the bottom left"),
    "bottom center": ("at the bottom center", "in the middle of the bottom row", "at the lower center"),
    "bottom right": ("in the bottom right corner", "in the lower right corner", "at the bottom right"),
}
NUMBERS = ("no", "one", "two", "three")
OPENINGS = (
    "the background is {} .", "the scene is set in {} .", "behind everything lies {} .",
    "this picture shows {} .", "we look at {} .",
)  # fmt: skip
COUNTS = ("there {} {} {} in it .", "the picture has {1} {2} .", "it holds exactly {1} {2} .")
SENTENCES = (
    ("a {thing}", "{verb}", "{where} ."),
    ("{where}", "there is a {thing} ."),
    ("{where}", "we see a {thing} ."),
    ("one can find a {thing}", "{where} ."),
)
VERBS = ("sits", "stands", "is placed", "rests", "can be seen")


@dataclass(frozen=True)
class Word:
    text: str
    owner: int = NOBODY


def text(words: list[Word]) -> str:
    """The caption as a reader writes it: sentences begin with a capital, marks hug the word before them."""
    caption = " ".join(word.text for word in words).replace(" .", ".").replace(" ,", ",")
    return ". ".join(sentence[:1].upper() + sentence[1:] for sentence in caption.split(". "))


def _words(phrase: str, owner: int = NOBODY) -> list[Word]:
    return [Word(word, owner) for word in phrase.split()]


def _scenery(template: str, scene: Scene, rng: random.Random) -> list[Word]:
    before, after = template.split("{}")
    return _words(before) + _words(rng.choice(SCENERY[scene.background]), BACKGROUND) + _words(after)


def _relation(thing: Thing, other: Thing, rng: random.Random) -> str:
    """Where `thing` is as seen from `other`, in words; always true of the scene."""
    parts = []
    if thing.row != other.row:
        parts.append("above" if thing.row < other.row else "below")
    if thing.column != other.column:
        parts.append("to the left of" if thing.column < other.column else "to the right of")
    return f"{rng.choice(parts)} the {other.shape}"


def dense(scene: Scene, rng: random.Random) -> list[Word]:
    """A paragraph that states everything: background, count, and shape, colour, place of each thing, with relations."""
    opening = _scenery(rng.choice(OPENINGS), scene, rng)
    count = len(scene.things)
    if rng.random() < 0.5:
        noun = "object" if count == 1 else "objects"
        opening += _words(rng.choice(COUNTS).format("is" if count == 1 else "are", NUMBERS[count], noun))
    body: list[Word] = []
    order = rng.sample(range(count), count)
    for position, index in enumerate(order):
        thing = scene.things[index]
        values = {
            "thing": f"{thing.colour} {thing.shape}",
            "where": rng.choice(WHERE[PLACES[thing.place]]),
            "verb": rng.choice(VERBS),
        }
        for part in rng.choice(SENTENCES):
            body += _words(part.format(**values), index)
        other = scene.things[order[position - 1]]
        if position and other.shape != thing.shape and rng.random() < 0.4:
            body += _words(f"the {thing.shape} is", index) + _words(f"{_relation(thing, other, rng)} .")
    return opening + body if rng.random() < 0.75 else body + opening


def tags(scene: Scene, rng: random.Random, noise: float = 0.1) -> list[Word]:
    """A short caption in the manner of web captions: tags in any order, each attribute missing with chance `noise`."""
    parts: list[list[Word]] = []
    for index in rng.sample(range(len(scene.things)), len(scene.things)):
        thing = scene.things[index]
        phrase = thing.shape
        if rng.random() >= noise:
            phrase = f"{thing.colour} {phrase}"
        if rng.random() < 0.4:
            phrase = f"a {phrase}"
        if rng.random() >= noise:
            place = PLACES[thing.place]
            phrase = f"{phrase} {place if rng.random() < 0.6 else WHERE[place][0]}"
        parts.append(_words(phrase, index))
    if rng.random() >= noise:
        scenery = _words(rng.choice(SCENERY[scene.background][:2]), BACKGROUND)
        parts.insert(rng.choice((0, len(parts))), scenery)
    caption: list[Word] = []
    for position, part in enumerate(parts):
        caption += ([Word(",")] if position else []) + part
    return caption


def web(scene: Scene, rng: random.Random, most: int = 30) -> list[Word]:
    """What plain Stable Diffusion is trained on: mostly tags, sometimes the first `most` words of a paragraph."""
    return tags(scene, rng) if rng.random() < 0.8 else dense(scene, rng)[:most]


def vocabulary() -> list[str]:
    """Every word that the grammar can say, sorted."""
    phrases = [*SHAPES, *COLOUR_NAMES, *BACKGROUND_NAMES, *PLACES, *NUMBERS, *VERBS, "above below , . object objects"]
    phrases += [p for options in (*SCENERY.values(), *WHERE.values()) for p in options]
    phrases += [*OPENINGS, *COUNTS, *(part for sentence in SENTENCES for part in sentence)]
    phrases += ["is are the a to left right of"]
    words = {word for phrase in phrases for word in phrase.split() if "{" not in word}
    return sorted(words)
