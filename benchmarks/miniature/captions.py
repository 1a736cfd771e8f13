"""The caption grammar of the miniature world: short tags as web captions have them, and dense paragraphs.

A paragraph says everything about its scene in sentences of many forms and orders, with distractors, sometimes twice,
with full stops, commas or nothing. Some forms and orders are kept out of all training. Every word remembers what it
speaks of, so that text encoders can be trained to know it.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

from benchmarks.miniature.scenes import BACKGROUND_NAMES, COLOUR_NAMES, FILLS, PLACES, RIMS, SHAPES, Scene, Thing

#: `Word.owner` of words that speak of the background, or of nothing in particular; other owners count the things.
BACKGROUND, NOBODY = -2, -1
LONGEST = 126  # words of a paragraph: 128 tokens of T5 with its end, and one to spare

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
#: From a place to the next one, in rows and columns, and the words for it.
NEXT_TO = {
    (-1, 0): ("directly above", "right above"), (1, 0): ("directly below", "right below"),
    (0, -1): ("directly left of", "just to the left of"), (0, 1): ("directly right of", "just to the right of"),
}  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four")
OPENINGS = (
    "the background is {} .", "the scene is set in {} .", "behind everything lies {} .",
    "this picture shows {} .", "we look at {} .", "{} is all around .",
)  # fmt: skip
COUNTS = ("there {} {} {} in it .", "the picture has {1} {2} .", "it holds exactly {1} {2} .", "{1} {2} in all .")
DISTRACTORS = (
    "the picture is small .", "nothing moves here .", "it is a quiet place .", "nobody is around .",
    "this is what we see .", "all of it is bright .", "no {absent} is here .", "there is no {absent} .",
)  # fmt: skip
VERBS = ("sits", "stands", "is placed", "rests", "can be seen", "lies")
#: How a sentence says a thing and its place: `thing` has an article and every attribute, `details` are fill and rim.
FORMS = {
    "sits": "{thing} {verb} {where} .",
    "there is": "{where} there is {thing} .",
    "we see": "{where} we see {thing} .",
    "find": "one can find {thing} {where} .",
    "bare": "{thing} {where} .",
    "comma": "{where} , {thing} .",
    "colour last": "the {shape} {where} is {colour} , {details} .",
    "it is": "there is a {colour} {shape} {where} . it is {details} .",
    "colour and": "{where} there is a {shape} . it is {colour} and {details} .",
    "place last": "{thing} is here . it {verb} {where} .",
}
#: Never in training; all of their words are.
HELD_FORMS = {"what": "what {verb} {where} is {thing} .", "has": "{where} the picture has {thing} ."}
ATTRIBUTES = ("fill", "rim", "colour")
ORDERS = tuple(itertools.permutations(ATTRIBUTES))
#: Orders of attributes before a noun that no training caption has.
HELD_ORDERS = (("colour", "fill", "rim"), ("rim", "colour", "fill"))
NOUNS = {"striped": "stripes", "barred": "bars", "checked": "checks", "plain": "no pattern"}


@dataclass(frozen=True)
class Word:
    text: str
    owner: int = NOBODY


@dataclass(frozen=True)
class Wording:
    """How a paragraph says what it says; None: anything that training has.

    form: a key of FORMS or HELD_FORMS, for every thing; order: of the things, as indices; twice: whether each thing is
    described twice; marks: "stops", "commas" or "none"; held: use HELD_ORDERS of attributes; relations: the chance that
    a thing beside one already mentioned is placed by that alone; distractors: how many.
    """

    form: str | None = None
    order: tuple[int, ...] | None = None
    twice: bool | None = None
    marks: str | None = None
    held: bool = False
    relations: float = 0.2
    distractors: int | None = None


def text(words: list[Word], upper: bool = False) -> str:
    """The caption as a reader writes it: sentences begin with a capital, marks hug the word before them."""
    caption = " ".join(word.text for word in words).replace(" .", ".").replace(" ,", ",")
    if upper:
        return caption.upper()
    return ". ".join(sentence[:1].upper() + sentence[1:] for sentence in caption.split(". "))


def _words(phrase: str, owner: int = NOBODY) -> list[Word]:
    return [Word(word, NOBODY if word in ".," else owner) for word in phrase.split()]


def _scenery(template: str, scene: Scene, rng: random.Random) -> list[Word]:
    before, after = template.split("{}")
    return _words(before) + _words(rng.choice(SCENERY[scene.background]), BACKGROUND) + _words(after)


def _details(thing: Thing, rng: random.Random) -> str:
    return f"{thing.fill} with {'no' if thing.rim == 'no' else f'a {thing.rim}'} rim"


def _noun_phrase(thing: Thing, rng: random.Random, held: bool) -> str:
    """A thing with all its attributes; a plain fill and a missing rim may stay unsaid."""
    fill = "" if thing.fill == "plain" and rng.random() < 0.5 else thing.fill
    rim = "" if thing.rim == "no" and rng.random() < 0.7 else thing.rim
    style = "before" if held else rng.choice(("before", "rim after", "rim after", "both after"))
    if style == "before":
        values = {"fill": fill, "rim": f"{rim} rimmed" if rim not in ("", "no") else "", "colour": thing.colour}
        orders = HELD_ORDERS if held else [order for order in ORDERS if order not in HELD_ORDERS]
        return " ".join(["a", *filter(None, (values[name] for name in rng.choice(orders))), thing.shape])
    after = [f"{'no' if rim == 'no' else f'a {rim}'} rim"] if rim else []
    if style == "both after" and fill:
        after = rng.sample([NOUNS[fill], *after], len(after) + 1)
        fill = ""
    phrase = " ".join(filter(None, ("a", fill, thing.colour, thing.shape)))
    return f"{phrase} with {' and '.join(after)}" if after else phrase


def _name(thing: Thing, scene: Scene) -> str | None:
    """What a thing can be called without mistaking it for another."""
    if sum(other.shape == thing.shape for other in scene.things) == 1:
        return f"the {thing.shape}"
    if sum((other.shape, other.colour) == (thing.shape, thing.colour) for other in scene.things) == 1:
        return f"the {thing.colour} {thing.shape}"
    return None


def _neighbours(thing: Thing, scene: Scene, known: list[int]) -> list[tuple[str, int]]:
    """Every way to place a thing by one that is known: the words before the other's name, and which it is."""
    found = []
    for index in known:
        other = scene.things[index]
        step = (thing.row - other.row, thing.column - other.column)
        if step in NEXT_TO and _name(other, scene):
            found += [(words, index) for words in NEXT_TO[step]]
    return found


def _sentence(scene: Scene, index: int, known: list[int], wording: Wording, rng: random.Random) -> list[Word]:
    thing = scene.things[index]
    name = wording.form or rng.choice(tuple(FORMS))
    where, other = rng.choice(WHERE[PLACES[thing.place]]), None
    beside = _neighbours(thing, scene, known)
    if beside and rng.random() < wording.relations:
        where, other = rng.choice(beside)
    values = {
        "thing": _noun_phrase(thing, rng, wording.held), "verb": rng.choice(VERBS), "details": _details(thing, rng),
        "colour": thing.colour, "shape": thing.shape, "where": "{where}",
    }  # fmt: skip
    before, after = (FORMS | HELD_FORMS)[name].format(**values).split("{where}")
    said = _words(where, index)
    if other is not None:
        said += _words(_name(scene.things[other], scene) or "", other)
    return _words(before, index) + said + _words(after, index)


def _relation(scene: Scene, index: int, other: int, rng: random.Random) -> list[Word]:
    """A true sentence on where one thing is as seen from another; nothing if one of them has no name of its own."""
    thing, seen = scene.things[index], scene.things[other]
    names = _name(thing, scene), _name(seen, scene)
    if None in names:
        return []
    parts = []
    if thing.row != seen.row:
        parts.append("above" if thing.row < seen.row else "below")
    if thing.column != seen.column:
        parts.append("to the left of" if thing.column < seen.column else "to the right of")
    return _words(f"{names[0]} is {rng.choice(parts)}", index) + _words(str(names[1]), other) + [Word(".")]


def _distractor(scene: Scene, rng: random.Random) -> list[Word]:
    absent = [shape for shape in SHAPES if shape not in {thing.shape for thing in scene.things}]
    return _words(rng.choice(DISTRACTORS).format(absent=rng.choice(absent)))


def _paragraph(scene: Scene, rng: random.Random, wording: Wording) -> list[Word]:
    count = len(scene.things)
    opening = _scenery(rng.choice(OPENINGS), scene, rng)
    if rng.random() < 0.5:
        noun = "object" if count == 1 else "objects"
        opening += _words(rng.choice(COUNTS).format("is" if count == 1 else "are", NUMBERS[count], noun))
    if wording.form is None and rng.random() < 0.5:
        wording = replace(wording, form=rng.choice(tuple(FORMS)))
    order = list(wording.order or rng.sample(range(count), count))
    body: list[list[Word]] = []
    known: list[int] = []
    for index in order:
        body.append(_sentence(scene, index, known, wording, rng))
        if known and rng.random() < 0.15:
            body.append(_relation(scene, index, known[-1], rng))
        known.append(index)
    if wording.twice or (wording.twice is None and rng.random() < 0.15):
        body += [_sentence(scene, index, [], wording, rng) for index in rng.sample(order, count)]
    number = wording.distractors
    for _ in range(rng.choice((0, 0, 1, 2)) if number is None else number):
        body.insert(rng.randint(0, len(body)), _distractor(scene, rng))
    body.insert(0 if rng.random() < 0.7 else len(body), opening)
    words = list(itertools.chain(*body))
    marks = wording.marks or rng.choice(("stops", "stops", "stops", "commas", "none"))
    if marks == "none":
        return [word for word in words if word.text not in ".,"]
    return [replace(word, text=",") if marks == "commas" and word.text == "." else word for word in words]


def dense(scene: Scene, rng: random.Random, wording: Wording = Wording()) -> list[Word]:
    """A paragraph that states everything: background, and shape, colour, fill, rim and place of each thing.

    An unsaid fill is plain and an unsaid rim is none. Of what training says, the first paragraph that is not too long.
    """
    for _ in range(100):
        words = _paragraph(scene, rng, wording)
        if len(words) <= LONGEST:
            return words
    return _paragraph(scene, rng, replace(wording, twice=False, distractors=0))[:LONGEST]


def placeless(scene: Scene, rng: random.Random) -> list[Word]:
    """A paragraph that says where nothing is: never in training."""
    words = _scenery(rng.choice(OPENINGS), scene, rng)
    for index in rng.sample(range(len(scene.things)), len(scene.things)):
        words += _words(f"there is {_noun_phrase(scene.things[index], rng, held=False)} .", index)
    return words


def tags(scene: Scene, rng: random.Random, noise: float = 0.1) -> list[Word]:
    """A short caption in the manner of web captions: tags in any order, each attribute missing with chance `noise`."""
    parts: list[list[Word]] = []
    for index in rng.sample(range(len(scene.things)), len(scene.things)):
        thing = scene.things[index]
        attributes = [thing.colour] if rng.random() >= noise else []
        rimmed = thing.rim != "no" and rng.random() >= noise
        before = rimmed and rng.random() < 0.4
        if thing.fill != "plain" and rng.random() >= noise:  # "rim colour fill" is held out
            attributes.insert(0 if before else rng.choice((0, len(attributes))), thing.fill)
        phrase = " ".join([*attributes, thing.shape])
        if rimmed:
            phrase = f"{thing.rim} rimmed {phrase}" if before else f"{phrase} {thing.rim} rim"
        if rng.random() >= noise:
            place = PLACES[thing.place]
            phrase = f"{phrase} {place}" if rng.random() < 0.7 else f"{place} {phrase}"
        parts.append(_words(phrase, index))
    if rng.random() >= noise:
        scenery = _words(rng.choice(SCENERY[scene.background][:2]), BACKGROUND)
        parts.insert(rng.choice((0, len(parts))), scenery)
    caption: list[Word] = []
    for position, part in enumerate(parts):
        caption += ([Word(",")] if position else []) + part
    return caption


def web(scene: Scene, rng: random.Random, most: int = 38) -> list[Word]:
    """What plain Stable Diffusion is trained on: mostly tags, sometimes the first `most` words of a paragraph."""
    return tags(scene, rng) if rng.random() < 0.8 else dense(scene, rng)[:most]


def vocabulary() -> list[str]:
    """Every word that the grammar can say, sorted."""
    phrases = [*SHAPES, *COLOUR_NAMES, *BACKGROUND_NAMES, *FILLS, *RIMS, *PLACES, *NUMBERS, *VERBS, *NOUNS.values()]
    phrases += [p for options in (*SCENERY.values(), *WHERE.values(), *NEXT_TO.values()) for p in options]
    phrases += [*OPENINGS, *COUNTS, *DISTRACTORS, *FORMS.values(), *HELD_FORMS.values()]
    phrases += ["above below to the left of right is are a and with rim rimmed object objects . ,"]
    words = {word for phrase in phrases for word in phrase.split() if "{" not in word}
    return sorted(words)
