"""A DPG-Bench style score for miniature pictures: questions about the prompt's scene, answered by the exact parser.

As in DPG-Bench (arXiv 2403.05135, section 5) a "no" for a parent question zeroes its children, and the score of a
picture is the mean over its questions. Here the answers are true: the picture is parsed, not looked at by a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations, permutations

from benchmarks.miniature.scenes import Scene, Thing

#: Colour and place are attributes, fill and rim details: decided late.
CATEGORIES = ("entity", "attribute", "relation", "count", "global", "detail")


@dataclass(frozen=True)
class Answers:
    """The answers for one picture, per category, and whether the picture is the prompt's scene without a mistake."""

    answers: tuple[tuple[str, bool], ...]
    all_right: bool
    early_right: bool  # all right but for the details

    @property
    def score(self) -> float:
        return 100 * sum(right for _, right in self.answers) / len(self.answers)


def _match(wanted: tuple[Thing, ...], found: tuple[Thing, ...]) -> tuple[Thing | None, ...]:
    """Which found thing answers for which wanted one: the assignment with most in common, shapes before the rest."""
    candidates: tuple[Thing | None, ...] = (*found[:6], *[None] * len(wanted))

    def agreement(pairs: Iterable[tuple[Thing, Thing | None]]) -> int:
        same = [(w.shape == f.shape, w.place == f.place, w.colour == f.colour) for w, f in pairs if f is not None]
        return sum(4 * shape + 2 * place + colour for shape, place, colour in same)

    return max(permutations(candidates, len(wanted)), key=lambda chosen: agreement(zip(wanted, chosen, strict=True)))


def _order(a: Thing, b: Thing) -> tuple[int, int]:
    """Which of two stands above, and which to the left: signs."""
    rows, columns = a.row - b.row, a.column - b.column
    return (rows > 0) - (rows < 0), (columns > 0) - (columns < 0)


def ask(wanted: Scene, found: Scene) -> Answers:
    """Asks a parsed picture about a scene: its background and count, and of each thing whether it is there, its colour
    and place, its fill and rim, and where it stands as seen from the others."""
    matched = _match(wanted.things, found.things)
    answers = [("global", found.background == wanted.background)]
    answers.append(("count", len(found.things) == len(wanted.things) and not found.smudges))
    present: list[Thing | None] = []  # the found thing of the right shape, for every wanted one
    for thing, match in zip(wanted.things, matched, strict=True):
        there = match if match is not None and match.shape == thing.shape else None
        present.append(there)
        answers.append(("entity", there is not None))
        answers.append(("attribute", there is not None and there.colour == thing.colour))
        answers.append(("attribute", there is not None and there.place == thing.place))
        answers.append(("detail", there is not None and there.fill == thing.fill))
        answers.append(("detail", there is not None and there.rim == thing.rim))
    for i, j in combinations(range(len(present)), 2):
        a, b = present[i], present[j]
        right = a is not None and b is not None and _order(a, b) == _order(wanted.things[i], wanted.things[j])
        answers.append(("relation", right))
    return Answers(tuple(answers), found == wanted, _bare(found) == _bare(wanted))


def _bare(scene: Scene) -> Scene:
    return replace(scene, things=tuple(replace(thing, fill="plain", rim="no") for thing in scene.things))


def summary(pictures: list[Answers]) -> dict[str, float]:
    """Mean DPG-style score, shares of pictures all right, all right but for details, of right answers per category.

    All in percent.
    """
    by_category: dict[str, list[bool]] = defaultdict(list)
    for picture in pictures:
        for category, right in picture.answers:
            by_category[category].append(right)
    result = {"score": sum(p.score for p in pictures) / len(pictures)}
    result["all_right"] = 100 * sum(p.all_right for p in pictures) / len(pictures)
    result["early_right"] = 100 * sum(p.early_right for p in pictures) / len(pictures)
    for category in CATEGORIES:
        if by_category[category]:
            result[category] = 100 * sum(by_category[category]) / len(by_category[category])
    return {name: round(value, 2) for name, value in result.items()}
