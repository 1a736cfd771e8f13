"""Answers to scores: DPG-Bench's arithmetic as it is published, faults included, and as it is meant.

Both are pure functions of questions and answers (arXiv 2403.05135, section 5). A picture's score is the mean over its
questions, after a "no" to a parent has made the answers to its children count as "no"; a prompt's the mean over its
cells, the benchmark's 100 times the mean over prompts. Categories are means over questions *before* that zeroing.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from ella_kd.app.dpg_answers import Answers
from ella_kd.app.dpg_questions import Question, by_item

Zeroing = Literal["dpg", "dsg"]
ZEROINGS: tuple[Zeroing, ...] = get_args(Zeroing)
CELLS = 4


@dataclass(frozen=True)
class Published:
    """What the published script prints. average and categories: percent, nan over nothing. dropped: the prompts that it
    leaves out without a word, and why."""

    average: float
    level_1: dict[str, float]
    level_2: dict[str, float]
    prompts: int
    dropped: dict[str, str]


@dataclass(frozen=True)
class Mean:
    """A mean in percent, the bounds of 95 % of its values over resampled prompts, and of how many questions it is."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Scored:
    """What is meant. items: each prompt's score, 0 to 1. missing: prompts without a score, and why not.
    unclear: answers that are neither yes nor no, which count as no."""

    average: Mean
    level_1: dict[str, Mean]
    level_2: dict[str, Mean]
    items: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)
    unclear: int = 0


def read_answer(answer: str | float) -> bool | None:
    """Yes or no: by the first word of a text, or a probability above a half; None for anything else."""
    if not isinstance(answer, str):
        return answer > 0.5
    word = re.match(r"\W*(\w+)", answer.lower())
    return {"yes": True, "no": False}.get(word[1]) if word else None


def counted(questions: Mapping[int, Question], yes: Mapping[int, bool], zeroing: Zeroing = "dpg") -> list[bool]:
    """Which answers of one picture count as yes. "dpg": no question above was answered no, parents of parents too, in
    whatever order they are listed; "dsg": no parent was (arXiv 2310.18235). Parents that do not exist are none."""
    return [yes[number] and all(yes[above] for above in _above(questions, number, zeroing)) for number in questions]


def _above(questions: Mapping[int, Question], number: int, zeroing: Zeroing) -> set[int]:
    found: set[int] = set()
    left = [number]
    while left:
        parents = {parent for parent in questions[left.pop()].parents if parent in questions} - found
        found |= parents
        left += parents if zeroing == "dpg" else ()
    return found


def score(questions: Iterable[Question], answers: Answers, *, cells: int = CELLS, zeroing: Zeroing = "dpg",
          missing: Mapping[str, str] | None = None, resamples: int = 2000, seed: int = 0) -> Scored:
    """The arithmetic as it is meant: every prompt, question and cell counts, categories over all cells.

    A prompt counts if every question about each of its cells has an answer; the others are in `missing`, for the
    reasons given or because answers are. Intervals: the 2.5th and 97.5th percentile over sets of prompts drawn anew.
    Raises ValueError for an unknown zeroing, or if no prompt counts.
    """
    if zeroing not in ZEROINGS:
        raise ValueError(f"unknown zeroing {zeroing!r}: choose {', '.join(ZEROINGS)}")
    items, left_out, unclear = dict[str, float](), dict(missing or {}), 0
    asked, right = defaultdict[str, list[dict[str, int]]](list), defaultdict[str, list[dict[str, int]]](list)
    for item, own in by_item(questions).items():
        if item in left_out:
            continue
        lacking = sum((item, cell, number) not in answers for cell in range(cells) for number in own)
        if lacking:
            left_out[item] = f"{lacking} of {cells * len(own)} answers are missing"
            continue
        pictures = []
        tallies = {level: (defaultdict[str, int](int), defaultdict[str, int](int)) for level in ("level_1", "level_2")}
        for cell in range(cells):
            read = {number: read_answer(answers[item, cell, number]) for number in own}
            unclear += sum(answer is None for answer in read.values())
            yes = {number: answer is True for number, answer in read.items()}
            pictures.append(float(np.mean(counted(own, yes, zeroing))))
            for level, (total, positive) in tallies.items():
                for number, question in own.items():
                    total[getattr(question, level)] += 1
                    positive[getattr(question, level)] += yes[number]
        items[item] = float(np.mean(pictures))
        for level, (total, positive) in tallies.items():
            asked[level].append(total)
            right[level].append(positive)
    if not items:
        raise ValueError(f"no prompt has all its answers: {_first(left_out)}")
    drawn = np.random.default_rng(seed).multinomial(len(items), np.full(len(items), 1 / len(items)), resamples)
    single = np.ones(len(items), int)
    overall = _mean(np.array([*items.values()]), single, drawn)
    levels = {level: {name: _mean(np.array([one[name] for one in right[level]]),
                                  np.array([one[name] for one in asked[level]]), drawn)
                      for name in sorted({name for one in asked[level] for name in one})} for level in asked}
    return Scored(overall, levels["level_1"], levels["level_2"], items, left_out, unclear)


def _mean(yes: np.ndarray, asked: np.ndarray, drawn: np.ndarray) -> Mean:
    """The share of all that was asked. yes, asked: one per prompt; drawn [resamples, prompts]: how often each came."""
    totals = drawn @ asked
    shares = (drawn @ yes)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(shares, (2.5, 97.5)) if len(shares) else (np.nan, np.nan)
    return Mean(100 * float(yes.sum() / asked.sum()), 100 * float(low), 100 * float(high), int(asked.sum()))


def published(questions: Sequence[Question], answers: Answers, sheets: Iterable[str], *, cells: int = CELLS,
              exact: bool = True, processes: int = 1, seed: int = 0) -> Published:
    """What `compute_dpg_bench.py` makes of the same answers, with its faults:

    - the first row of the CSV is taken for a header, and its question is lost; a question that names it as its parent
      raises, and the whole prompt is dropped;
    - an item whose rows are not adjacent keeps the last of its pieces;
    - a "no" reaches the children of children as far as these are listed later;
    - categories come from the last cell alone;
    - a prompt that raises (an unknown parent, no questions under the sheet's name up to its first dot) is left out, and
      a sheet that is not there is not missed;
    - with several processes each one's categories come in an order of its own, and scores of different ones are added
      up: here the orders are drawn from the seed, there from Python's hashes.

    sheets: the names of the pictures, without their endings. exact: only "yes" to the letter is a yes, as there, where
    the judge says single words; else what `read_answer` takes for one, for judges that say "Yes.".
    Raises ValueError for a dependency that is no number, where the script stops.
    """
    items: dict[str, dict[int, Question]] = {}
    parents: dict[int, list[int]] = {}  # by line
    previous = ""
    for question in questions[1:]:
        try:
            parents[question.line] = [int(part) for part in question.dependency.split(",")]
        except ValueError as error:
            raise ValueError(f"line {question.line}: the published script stops at the dependency "
                             f"{question.dependency!r}") from error
        if question.item != previous:
            items[question.item] = {}
        items[question.item][question.id] = question
        previous = question.item

    names = sorted(sheets)
    edges = [round(rank * len(names) / processes) for rank in range(processes + 1)]
    averages, dropped = list[float](), dict[str, str]()
    local: list[dict[str, list[float]]] = [defaultdict(list) for _ in range(processes)]
    for rank, (low, high) in enumerate(pairwise(edges)):
        for name in names[low:high]:
            own = items.get(name.split(".")[0])
            if own is None:
                dropped[name] = f"no questions for {name.split('.')[0]}"
                continue
            pictures = list[float]()
            try:
                for cell in range(cells):
                    first = {number: float(_is_yes(answers[name, cell, number], exact)) for number in own}
                    scores = dict(first)
                    for number, question in own.items():
                        if any(scores[parent] == 0 for parent in parents[question.line] if parent):
                            scores[number] = 0.0
                    pictures.append(sum(scores.values()) / len(scores))
            except KeyError as error:
                what = error.args[0]
                dropped[name] = f"no answer to {what}" if isinstance(what, tuple) else f"KeyError: {what}"
                continue
            averages.append(sum(pictures) / len(pictures))
            for number, question in own.items():
                local[rank][question.level_2].append(first[number])

    level_2 = _gathered(local, np.random.default_rng(seed))
    level_1: dict[str, list[float]] = defaultdict(list)
    for category, scores_of in level_2.items():
        level_1[category.split("-")[0].strip()] += scores_of
    return Published(_percent(averages), {name: _percent(each) for name, each in sorted(level_1.items())},
                     {name: _percent(each) for name, each in sorted(level_2.items())}, len(averages), dropped)


def _gathered(local: Sequence[Mapping[str, list[float]]], rng: np.random.Generator) -> dict[str, list[float]]:
    """Each process's scores by category, put together as the first one's names say: right for one process only."""
    names = sorted({name for own in local for name in own})
    orders = [[names[i] for i in rng.permutation(len(names))] for _ in local]
    return {orders[0][k]: [value for own, order in zip(local, orders) for value in own.get(order[k], [])]
            for k in range(len(names))}


def _is_yes(answer: str | float, exact: bool) -> bool:
    return answer == "yes" if exact and isinstance(answer, str) else read_answer(answer) is True


def _percent(values: Sequence[float]) -> float:
    return 100 * float(np.mean(values)) if values else float("nan")


def _first(named: Mapping[str, str], count: int = 3) -> str:
    """The first few, for an error."""
    few = "; ".join(f"{name} ({reason})" for name, reason in list(named.items())[:count])
    return few + (f"; and {len(named) - count} more" if len(named) > count else "")
