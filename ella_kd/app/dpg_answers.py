"""Sheets to answers: every question about every cell, asked once and written down as it is answered.

A line of the JSONL is `{"item", "cell", "id", "answer", "judge", "question", "picture"}`: the cell counts 0 to 3 (top
left, top right, bottom left, bottom right), picture is the beginning of the sheet file's sha256. Scoring reads nothing
else, so that it can be repeated, and done elsewhere than the asking; item, cell, id and answer suffice for it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from numbers import Real
from pathlib import Path
from typing import Any, TextIO

from PIL import Image, UnidentifiedImageError

from ella_kd.app.dpg_judges import Judge
from ella_kd.app.dpg_questions import Question, by_item

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
Key = tuple[str, int, int]  # item, cell, question
Answers = Mapping[Key, str | float]


@dataclass(frozen=True)
class Asked:
    """answers: of the sheets that could be read. unreadable: why not, of the others."""

    answers: dict[Key, str | float]
    unreadable: dict[str, str]


def find_sheets(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by their names without ending. Raises FileNotFoundError for none, ValueError for two of
    one name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of sheets at {folder}")
    sheets: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS):
        if path.stem in sheets:
            raise ValueError(f"{sheets[path.stem]} and {path.name} are both a sheet of {path.stem}: remove one")
        sheets[path.stem] = path
    if not sheets:
        raise FileNotFoundError(f"{folder} holds no sheets: expected pictures named like the prompts")
    return sheets


def cell_size(sheets: Iterable[Path]) -> tuple[int, int]:
    """Half of the size that most sheets have. ValueError where that cannot be halved, or none can be read."""
    sizes = Counter[tuple[int, int]]()
    for path in sheets:
        try:
            with Image.open(path) as image:
                sizes[image.size] += 1
        except (UnidentifiedImageError, OSError, SyntaxError):
            continue
    if not sizes:
        raise ValueError("none of the sheets is a picture that can be read")
    [((width, height), _)] = sizes.most_common(1)
    if width % 2 or height % 2:
        raise ValueError(f"a sheet is two cells wide and two high, and these are {width}x{height}")
    return width // 2, height // 2


def cells_of(sheet: Image.Image, size: tuple[int, int], black: bool = False) -> list[Image.Image]:
    """The four pictures of a sheet. black: a cell beyond its edge is black, as the published script cuts it.

    Raises ValueError for a sheet that is not two cells wide and high.
    """
    width, height = size
    if not black and sheet.size != (2 * width, 2 * height):
        raise ValueError(f"it is {sheet.width}x{sheet.height}, and four cells of {width}x{height} are "
                         f"{2 * width}x{2 * height}")
    pixels, corners = sheet.convert("RGB"), [(x * width, y * height) for y in (0, 1) for x in (0, 1)]
    return [pixels.crop((x, y, x + width, y + height)) for x, y in corners]


def ask(sheets: Mapping[str, Path], questions: Iterable[Question], judge: Judge, name: str, path: Path, *,
        cells: int = 4, size: tuple[int, int] | None = None, black: bool = False, batch_size: int = 8,
        progress: Callable[[int], object] = lambda count: None) -> Asked:
    """Asks about every cell of every sheet that has questions, but for what `path` holds of this judge.

    An answer counts again as long as the sheet's file, how it is cut and the question's text are the same. name: the
    judge's, which its answers carry. cells: how many of a sheet's four are asked about. size: of a cell in pixels, by
    default half of what most sheets measure. progress: called with how many answers have come.
    Raises ValueError for an answer that is neither a text nor a number in 0 to 1, and what the judge raises; what was
    answered before is kept.
    """
    items, known = by_item(questions), {key: line for key, line in _lines(path) if line["judge"] == name}
    size = size or cell_size(sheets.values())
    cut = f"{size} {black}".encode()
    asked, waiting = Asked({}, {}), list[tuple[Key, Question, str, Image.Image]]()
    _end_with_a_line(path)
    with open(path, "a", encoding="utf-8") as file:
        for item, sheet in sheets.items():
            try:
                data = sheet.read_bytes()
                digest, pictures = hashlib.sha256(data + cut).hexdigest()[:16], None
                for cell in range(cells):
                    for question in items.get(item, {}).values():
                        key = item, cell, question.id
                        line = known.get(key)
                        if line and (line.get("picture"), line.get("question")) == (digest, question.text):
                            asked.answers[key] = line["answer"]
                            progress(1)
                            continue
                        if pictures is None:
                            with Image.open(BytesIO(data)) as image:
                                pictures = cells_of(image, size, black)
                        waiting.append((key, question, digest, pictures[cell]))
            except (OSError, SyntaxError):  # Pillow's words for what is no picture, or half of one
                asked.unreadable[item] = "it is not a whole picture"
            except ValueError as error:
                asked.unreadable[item] = str(error)
            while len(waiting) >= batch_size:
                _answer(waiting[:batch_size], judge, name, asked.answers, file)
                del waiting[:batch_size]
                progress(batch_size)
        if waiting:
            _answer(waiting, judge, name, asked.answers, file)
            progress(len(waiting))
    return asked


def _answer(batch: Sequence[tuple[Key, Question, str, Image.Image]], judge: Judge, name: str,
            answers: dict[Key, str | float], file: TextIO) -> None:
    found = list(judge([picture for *_, picture in batch], [question.text for _, question, _, _ in batch]))
    if len(found) != len(batch):
        raise ValueError(f"the judge {name} was asked {len(batch)} questions and gave {len(found)} answers")
    for (key, question, digest, _), answer in zip(batch, found, strict=True):
        answers[key] = checked(answer, f"the judge {name}")
        item, cell, number = key
        line = {"item": item, "cell": cell, "id": number, "answer": answers[key], "judge": name,
                "question": question.text, "picture": digest}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def checked(answer: object, who: str) -> str | float:
    """A text, or a probability. ValueError for anything else."""
    if isinstance(answer, str):
        return answer
    if not isinstance(answer, bool) and isinstance(answer, Real) and 0 <= float(answer) <= 1:
        return float(answer)
    raise ValueError(f"{who} must answer with a text, or a probability of yes from 0 to 1, got {answer!r}")


def read_answers(path: Path, judge: str | None = None) -> tuple[str, Answers]:
    """The judge's name and its answers on file; of two to one question the later.

    judge: whose, where the file holds those of several. Raises FileNotFoundError, or ValueError for a line that is
    no answer, or an unclear judge.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no answers at {path}")
    lines = list(_lines(path))
    judges = list(dict.fromkeys(line["judge"] for _, line in lines))
    if not judges or (judge is not None and judge not in judges) or (judge is None and len(judges) > 1):
        raise ValueError(f"{path} holds answers of {', '.join(judges) or 'nobody'}: expected "
                         f"{judge or 'one of them by name'}")
    chosen = judge if judge is not None else judges[0]
    return chosen, {key: line["answer"] for key, line in lines if line["judge"] == chosen}


def _lines(path: Path) -> Iterable[tuple[Key, dict[str, Any]]]:
    """Every whole line; a last one without its end was cut off by a kill, and is asked again."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                key = str(line["item"]), int(line["cell"]), int(line["id"])
                line["answer"] = checked(line["answer"], "a line")
            except (ValueError, KeyError, TypeError) as error:
                if not text.endswith("\n"):
                    return
                raise ValueError(f"{path}, line {number}: expected an answer with item, cell, id and answer, got "
                                 f"{text[:80]!r}") from error
            yield key, {"judge": "recorded answers", **line}


def _end_with_a_line(path: Path) -> None:
    """Begins a new line after what a kill has left of the last one, or cuts it off."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        last = data.rfind(b"\n") + 1
        with open(path, "rb+") as file:
            try:
                json.loads(data[last:])
                file.seek(0, 2)
                file.write(b"\n")
            except ValueError:
                file.truncate(last)
