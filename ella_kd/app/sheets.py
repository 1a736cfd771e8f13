"""Files of one or several pictures, drawn once: a stopped run goes on with those that are missing."""

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ella_kd.addons import AddOns
from ella_kd.files import writing
from ella_kd.guidance import Guidance
from ella_kd.images import Picture, save_image
from ella_kd.jobs import jobs
from ella_kd.pipeline import Pipeline
from ella_kd.request import Request

SETTINGS = "settings.json"
_TEXT = "ella_kd_sheet"  # in the PNG of a sheet: the request of every cell, a JSON list
_END = b"IEND\xaeB`\x82"  # the last bytes of a whole PNG


@dataclass(frozen=True)
class Sheet:
    """A PNG that is to show some pictures: prompt and seed of each, left to right and down in two columns."""

    path: Path
    cells: tuple[tuple[str, int], ...]


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes down with what a folder of sheets is drawn, or compares it with what is written there.

    settings: all but prompts and seeds that decides the pictures, as JSON has it. Raises ValueError that names the
    first difference to those that the folder was started with.
    """
    path, now = folder / SETTINGS, json.loads(json.dumps(settings, default=str))
    if not path.exists():
        with writing(path) as temporary:
            temporary.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} does not say with what its pictures were drawn: choose another folder") from error
    for name in dict.fromkeys((*now, *then)):
        if now.get(name) != then.get(name):
            raise ValueError(f"{folder} was started with {name} {then.get(name)!r}, and this is {now.get(name)!r}: ask "
                             "for the same or choose another folder")


def settings_of(asked: Request, **more: Any) -> dict[str, Any]:
    """What `open_folder` keeps of a request: all but prompt and seed. more: what else decides the pictures."""
    kept = json.loads(asked.json())
    return {name: value for name, value in kept.items() if name not in ("prompt", "seed", "model")} | more


def is_drawn(sheet: Sheet) -> bool:
    """Whether its file is there and whole. Raises ValueError if it shows other prompts or seeds, or is not ours."""
    if not sheet.path.exists():
        return False
    try:
        with open(sheet.path, "rb") as file, Image.open(file) as image:
            texts = image.info
            file.seek(-len(_END), 2)
            if file.read() != _END:
                return False
    except (UnidentifiedImageError, OSError, SyntaxError):
        return False
    try:
        shown = json.loads(texts[_TEXT]) if _TEXT in texts else [json.loads(texts["ella_kd"])]
        cells = tuple((cell["prompt"], cell["seed"]) for cell in shown)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{sheet.path} was not drawn here: choose another folder") from error
    if cells != sheet.cells:
        raise ValueError(f"{sheet.path} shows another prompt or other seeds: choose another folder")
    return True


def draw_sheets(pipeline: Pipeline, sheets: Iterable[Sheet], asked: Request, *, guidance: Guidance | None = None,
                models_dir: str | Path | AddOns | None = None, batch_size: int = 8,
                progress: bool = True) -> Generator[Sheet, None, None]:
    """Draws sheets one after the other, and yields each as soon as its file is there, whole.

    asked: everything but prompts and seeds. guidance: a rule that no text can name. batch_size: pictures drawn at once,
    of neighbouring sheets too. progress: bars. What is there is written over: leave out what `is_drawn`.
    Raises as `jobs` does.
    """
    left = list(sheets)
    requests = (replace(asked, prompt=prompt, seed=seed) for sheet in left for prompt, seed in sheet.cells)
    done: list[Picture] = []
    waiting = iter(left)
    sheet = next(waiting, None)
    for job in jobs(pipeline, requests, guidance=guidance, models_dir=models_dir, batch_size=batch_size,
                    progress=progress):
        done += map(Picture, job.draw(), job.requests)
        while sheet is not None and len(done) >= len(sheet.cells):
            own, done = done[: len(sheet.cells)], done[len(sheet.cells) :]
            _save(own, sheet)
            yield sheet
            sheet = next(waiting, None)


def _save(pictures: Sequence[Picture], sheet: Sheet) -> None:
    """One picture as it is; several with the requests as they were asked for, and as they were drawn."""
    sheet.path.parent.mkdir(parents=True, exist_ok=True)
    if len(pictures) == 1:
        pictures[0].save(sheet.path, overwrite=True)
        return
    told = f"[{', '.join(picture.settings.json() for picture in pictures)}]"
    save_image(in_columns([picture.image for picture in pictures]), sheet.path, {_TEXT: told})


def in_columns(images: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Images of one size side by side, left to right and down, without gaps."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
