"""How far the miniature's reading goes beyond the texts it was trained on: other forms of the same scenes.

The training texts mix eight forms of a sentence and say everything once, about at most three things. Here all things
are told in one form, in all orders, two or three times each, or a fourth thing is there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

from benchmarks.miniature import captions
from benchmarks.miniature.questions import ask, summary
from benchmarks.miniature.scenes import PLACES, Scene, Thing

Draw = Callable[[Sequence[str]], Sequence[Scene]]
SITS = "A {thing} sits {where}."
SEEN = "A {thing} can be seen {where}."


def opening(scene: Scene) -> str:
    return f"The scene is set in {captions.SCENERY[scene.background][1]}."


def sentence(thing: Thing, form: str = SITS) -> str:
    return form.format(thing=f"{thing.colour} {thing.shape}", where=captions.WHERE[PLACES[thing.place]][0])


def one_form(scene: Scene, form: str) -> str:
    """A sentence per thing, in reading order, all in one form."""
    return " ".join([opening(scene), *(sentence(thing, form) for thing in scene.things)])


def trained(scene: Scene, rng: random.Random) -> str:
    """A text as in training: any forms, with a count in one of two, and relations."""
    return captions.text(captions.dense(scene, rng))


def mixed(scene: Scene, rng: random.Random) -> str:
    """The trained forms, one sentence per thing, without count and relations: the trained grammar counts to three."""
    said = [opening(scene)]
    for thing in scene.things:
        parts = rng.choice(captions.SENTENCES)
        values = {"thing": f"{thing.colour} {thing.shape}", "where": rng.choice(captions.WHERE[PLACES[thing.place]]),
                  "verb": rng.choice(captions.VERBS)}
        said.append(captions.text([captions.Word(word) for word in " ".join(parts).format(**values).split()]))
    return " ".join(said)


def measure(draw: Draw, three: Sequence[Scene], four: Sequence[Scene]) -> dict[str, dict[str, Any]]:
    """The score of every form. draw: texts to what the parser finds in their pictures, one per text."""
    some = three[: -(-len(three) // 6)]  # a sixth of the scenes in six orders: as many pictures
    sits = [one_form(scene, SITS) for scene in three]
    rows: dict[str, tuple[Sequence[Scene], list[str]]] = {
        "three things, forms mixed as in training": (
            three, [trained(scene, random.Random(f"forms {i}")) for i, scene in enumerate(three)]),
        'three things, each "A red heart sits in the center."': (three, sits),
        "the same, the sentences in all six orders": (
            [scene for scene in some for _ in range(6)],
            [" ".join([opening(scene), *map(sentence, order)])
             for scene in some for order in permutations(scene.things)]),
        "the same, the whole text twice": (three, [f"{text} {text}" for text in sits]),
        "the same, the whole text three times": (three, [f"{text} {text} {text}" for text in sits]),
        "the same, every sentence twice": (three, [one_form(scene, f"{SITS} {SITS}") for scene in three]),
        "the same, every sentence three times": (three, [one_form(scene, f"{SITS} {SITS} {SITS}") for scene in three]),
        'three things, each "A red heart can be seen in the center."': (
            three, [one_form(scene, SEEN) for scene in three]),
        "four things, forms mixed": (four, [mixed(scene, random.Random(f"four {i}")) for i, scene in enumerate(four)]),
        'four things, each "A red heart sits in the center."': (four, [one_form(scene, SITS) for scene in four]),
        'four things, each "A red heart can be seen in the center."': (four, [one_form(scene, SEEN) for scene in four]),
    }
    result = {}
    for name, (wanted, texts) in rows.items():
        scores = summary([ask(w, f) for w, f in zip(wanted, draw(texts), strict=True)])
        result[name] = {"pictures": len(texts), "score": scores["score"], "all_right": scores["all_right"],
                        "example": texts[0]}
    return result
