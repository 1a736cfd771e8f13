"""DPG-Bench's questions: the CSV as it is published, or another of the same columns, such as DSG-1k's.

Nothing is assumed of how many there are, how they are ordered, or that every parent exists: what is wrong is named by
`problems` and survived.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass(frozen=True)
class Question:
    """A row. item: the prompt's name. id: within the item. dependency: as it is written, "1,4". about: the tuple,
    "attribute - color (car, red)". line: in the file."""

    item: str
    id: int
    dependency: str
    about: str
    text: str
    prompt: str = ""
    line: int = 0

    @property
    def parents(self) -> tuple[int, ...]:
        """The ids that can be read, without 0, which says that there is none."""
        found = (_whole(part) for part in self.dependency.split(","))
        return tuple(dict.fromkeys(number for number in found if number))

    @property
    def level_2(self) -> str:
        """"attribute - color", and "global -", which has none, as the published script prints it."""
        return self.about.split("(")[0].strip()

    @property
    def level_1(self) -> str:
        return self.level_2.split("-")[0].strip()


def read_questions(path: str | Path) -> list[Question]:
    """The rows of a CSV, in its order, every field as text.

    Raises FileNotFoundError, or ValueError for missing columns, no rows, or a row without item or number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no questions at {path}: expected DPG-Bench's dpg_bench.csv")
    questions = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise ValueError(f"{path} lacks the columns {', '.join(missing)}: expected DPG-Bench's CSV")
            for row in reader:
                number = _whole(row["proposition_id"] or "")
                if not row["item_id"] or number is None:
                    raise ValueError(f"{path}, line {reader.line_num}: expected an item_id and a whole proposition_id, "
                                     f"got {row['item_id']!r} and {row['proposition_id']!r}")
                questions.append(Question(row["item_id"], number, row["dependency"] or "", row["tuple"] or "",
                                          row["question_natural_language"] or "", row["text"] or "", reader.line_num))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV in UTF-8: {error}") from error
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def by_item(questions: Iterable[Question]) -> dict[str, dict[int, Question]]:
    """The questions of every item by their ids, wherever in the file they stand; of two with one id the later."""
    items: dict[str, dict[int, Question]] = {}
    for question in questions:
        items.setdefault(question.item, {})[question.id] = question
    return items


def problems(questions: Iterable[Question]) -> list[str]:
    """What is wrong, a sentence each: parents that are unreadable or unknown, ids given twice, items in pieces."""
    questions = list(questions)
    items, found, previous = by_item(questions), [], ""
    seen: set[tuple[str, int]] = set()
    began: set[str] = set()
    for question in questions:
        at = f"line {question.line}, {question.item} {question.id}"
        parts = [part.strip() for part in question.dependency.split(",")]
        found += [f"{at}: no parent can be read in {part!r}" for part in parts if _whole(part) is None]
        found += [f"{at}: no parent {parent}" for parent in question.parents if parent not in items[question.item]]
        if (question.item, question.id) in seen:
            found.append(f"{at}: a question of this number came before, and counts no more")
        if question.item != previous and question.item in began:
            found.append(f"{at}: more questions of an item that ended before")
        seen.add((question.item, question.id))
        began.add(question.item)
        previous = question.item
    return found


def _whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
