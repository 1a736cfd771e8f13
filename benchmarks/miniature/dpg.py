"""DPG-Bench of the miniature's world: prompts and questions in the published form, and a judge that cannot err.

Every question can be answered by looking at the picture alone ("Is there a red heart?"), so the exact parser is a VQA
model like any other: a callable of pictures and questions.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.miniature.scenes import PLACES, SIZE, Scene, Thing, parse
from ella_kd.app.dpg_questions import Question

COLUMNS = ("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed",
           "tuple", "question_natural_language")
Truth = Callable[[Scene], bool]


def questions(name: str, scene: Scene, prompt: str) -> list[tuple[Question, Truth]]:
    """What is asked about a scene, and which scenes are a yes. Colours hang on shapes, the rest on both."""
    rows = list[tuple[Question, Truth]]()

    def add(text: str, category: str, truth: Truth, *parents: int) -> int:
        about = f"{category} ({text.removeprefix('Is there ').removesuffix('?')})"
        number = len(rows) + 1
        rows.append((Question(name, number, ",".join(map(str, parents)) or "0", about, text, prompt), truth))
        return number

    number = len(scene.things)
    add(f"Is this {scene.background}?", "global -", lambda seen: seen.background == scene.background)
    add(f"Are there exactly {number} things?", "other - count",
        lambda seen: len(seen.things) == number and not seen.smudges)
    coloured = []
    for thing in scene.things:
        named = f"{thing.colour} {thing.shape}"
        shape = add(f"Is there a {thing.shape}?", "entity - whole", among(thing, "shape"))
        own = add(f"Is there a {named}?", "attribute - color", among(thing, "shape", "colour"), shape)
        coloured.append(own)
        add(f"Is there a {named} at the {PLACES[thing.place]}?", "attribute - other",
            among(thing, "shape", "colour", "place"), own)
        add(f"Is there a {named} that is {thing.fill}?", "attribute - texture",
            among(thing, "shape", "colour", "fill"), own)
        add(f"Is there a {named} with {thing.rim} rim?", "entity - part", among(thing, "shape", "colour", "rim"), own)
    for i, j in combinations(range(number), 2):
        one, other = scene.things[i], scene.things[j]
        add(f"Is there a {one.colour} {one.shape} {_where(one, other)} a {other.colour} {other.shape}?",
            "relation - spatial", _so_placed(one, other), coloured[i], coloured[j])
    return rows


def among(thing: Thing, *names: str) -> Truth:
    """Whether one of the things seen has these in common with the thing."""
    return lambda seen: any(all(getattr(each, name) == getattr(thing, name) for name in names) for each in seen.things)


def _where(one: Thing, other: Thing) -> str:
    rows, columns = one.row - other.row, one.column - other.column
    return " and ".join(["above"] * (rows < 0) + ["below"] * (rows > 0) + ["left of"] * (columns < 0)
                        + ["right of"] * (columns > 0))


def _so_placed(one: Thing, other: Thing) -> Truth:
    def like(seen: Thing, wanted: Thing) -> bool:
        return (seen.shape, seen.colour) == (wanted.shape, wanted.colour)

    return lambda seen: any(like(a, one) and like(b, other) and _where(a, b) == _where(one, other)
                            for a in seen.things for b in seen.things if a is not b)


def write(scenes: Sequence[Scene], prompts: Sequence[str], folder: Path) -> dict[str, Truth]:
    """Prompt files and CSV in a folder, as they are published; what each question's text means."""
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    truths = dict[str, Truth]()
    with open(folder / "questions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i, (scene, prompt) in enumerate(zip(scenes, prompts, strict=True)):
            name = f"miniature{i:03d}"
            (folder / "prompts" / f"{name}.txt").write_text(prompt + "\n", encoding="utf-8")
            for question, truth in questions(name, scene, prompt):
                broad, _, detailed = question.level_2.partition(" - ")
                writer.writerow([name, prompt, "", question.id, question.dependency, broad, detailed, question.about,
                                 question.text])
                truths[question.text] = truth
    return truths


def judge(truths: dict[str, Truth]) -> Callable[[Sequence[Image.Image], Sequence[str]], list[str]]:
    """The parser as a VQA model."""
    @lru_cache(1000)
    def seen(pixels: bytes) -> Scene:
        return parse(np.frombuffer(pixels, np.uint8).reshape(SIZE, SIZE, 3))

    def answer(pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[str]:
        return ["yes" if truths[text](seen(picture.tobytes())) else "no"
                for picture, text in zip(pictures, texts, strict=True)]

    return answer
