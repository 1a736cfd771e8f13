"""Grids that the page is asked for: checked, drawn between other draws, and found again."""

import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import yaml

from ella_kd.app.axes import MODEL, option_named
from ella_kd.app.batch import status
from ella_kd.app.grid import OWN, Grid, axes_of, read_yaml
from ella_kd.app.web.form import MORE, check
from ella_kd.app.web.session import Stopped, Studio
from ella_kd.cli import slug

FOLDER = "grids"  # in the output folder
_BUSY: dict[str, threading.Lock] = {}  # of each folder that this process has drawn into
OPTIONS = {"prompt", "negative", "mode", "sampler", "schedule", "steps", "scale", "guidance", "seed", "width", "height",
           "tags", "lora", "embedding", *MORE}  # none of which names a file but add-ons, which are looked up by name
EXAMPLE = """\
title: Samplers and scales
prompt: The scene is set in snow. A red heart sits in the center.
seed: 1
axes:
  sampler: euler, heun, dpmpp_2m
  scale: 1-7 (+3)
  steps: 4, 8
  colour: {replace: red, values: "red, blue, green"}
"""


@dataclass(frozen=True)
class Cells:
    """How far a grid is. page: below the output folder; left: seconds, None until that is known."""

    page: Path
    done: int
    total: int
    failed: int
    left: float | None


def read(studio: Studio, text: str) -> Grid:
    """The grid of a YAML text, all cells checked. Raises ValueError, for more cells than the page draws too, another
    model than the page's, and options that name files."""
    if not isinstance(text, str) or len(text) > studio.limits.letters:
        raise ValueError(f"a grid is a text of at most {studio.limits.letters} letters")
    try:
        if any(isinstance(each, yaml.AliasToken) for each in yaml.scan(text)):
            raise ValueError("a grid repeats nothing by *name here: write it out")  # a few can stand for billions
        found = read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the grid is not YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError("a grid says keys such as prompt and axes, with a colon behind each")
    axes = axes_of(found)
    named = {option_named(str(key)) for key in found if key not in OWN}
    named |= {name for axis in axes for value in axis.values for name in (*value.sets, *value.model)}
    if refused := sorted(named - OPTIONS):
        what = "another model" if refused[0] in MODEL else "a file"
        raise ValueError(f"{refused[0]} names {what}, which a grid of the page does not: draw it with ella-kd grid")
    if (cells := prod(len(axis.values) for axis in axes)) > studio.limits.cells:
        raise ValueError(f"a grid of the page may have {studio.limits.cells} cells, got {cells}: draw it with ella-kd "
                         "grid")
    grid = Grid.read(found, models_dir=studio.shelf)
    for request in (each for requests in grid.requests.values() for each in requests):
        check(request, studio.limits)
        studio.check(request)
        if missing := {request.mode, request.negative_mode} - {*studio.modes, None}:
            raise ValueError(f"this model has no mode {min(map(str, missing))}: choose {', '.join(studio.modes)}")
    return grid


def run(studio: Studio, text: str) -> Generator[Cells | None, None, None]:
    """Draw what of a grid is not drawn yet; closing the iterator stops it after its batch, and it goes on another time.

    Other draws come between its batches. Raises as `read` does.
    """
    grid = read(studio, text)
    folder = studio.out / FOLDER / f"{slug(grid.title)}-{grid.sha256[:8]}"
    total = sum(map(len, grid.requests.values()))

    def work(tell: Callable[[Cells], None], stop: threading.Event) -> None:
        done, since = [0, 0], time.monotonic()  # in this run, and before it

        def news() -> Cells:
            failed = len(status(folder).failed) if (folder / "job.json").exists() else 0
            spent, rest = time.monotonic() - since, total - sum(done)
            return Cells(folder / "index.html", sum(done), total, failed, spent / done[0] * rest if done[0] else None)

        def told(settled: int) -> None:
            done[0] += settled
            tell(news())

        def stopped() -> bool:
            if stop.is_set():
                return True  # the turn stays ours until the folder is free: the next run finds it so
            studio.drawing.release()  # whoever waits has the turn
            time.sleep(0.01)
            studio.drawing.acquire()
            return stop.is_set()

        busy = _BUSY.setdefault(str(folder.resolve()), threading.Lock())
        while not busy.acquire(blocking=False):  # a run that was stopped finishes its batch
            if stopped():
                raise Stopped
        try:
            job = grid.batch(folder, batch=studio.batch_size, about={"model": studio.pipeline.name})
            job.check()
            done[1] = total - sum(map(job.requests_in, job.open_shards()))
            tell(news())
            grid.run(folder, studio.pipeline, batch=studio.batch_size, models_dir=studio.shelf, told=told, stop=stopped)
        finally:
            busy.release()
        if stop.is_set():
            raise Stopped
        tell(news())

    return studio.in_turn(work)


def known(studio: Studio, most: int = 20) -> list[Path]:
    """The pages of the grids that are there, the newest first."""
    pages = (studio.out / FOLDER).glob("*/index.html")
    return sorted(pages, key=lambda page: page.stat().st_mtime, reverse=True)[:most]
