"""Grids: pictures of every combination of the values of some axes. A grid is a batch with a page."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ella_kd.addons import AddOns
from ella_kd.app.axes import MODEL, TEXTS, Axis, Value, matrix, option_named, read_axis
from ella_kd.app.batch import BATCH, SHARD, Batch, status
from ella_kd.app.job_files import Checker, settled
from ella_kd.app.loading import Models, Pipelines, check_sizes
from ella_kd.app.shards import Shard, said
from ella_kd.files import writing
from ella_kd.images import contact_sheet, save_image
from ella_kd.jobs import alike
from ella_kd.pipeline import Pipeline
from ella_kd.prompts import check_wildcards, expand_wildcards
from ella_kd.request import Request

CELLS = 100_000  # of a grid
PIXELS = 64e6  # of a sheet
AROUND, LEAST = 32, 48  # pixels between its cells, and of the side of the smallest
PAGE, SHEET = "index.html", "sheet.png"
OWN = ("title", "description", "axes", "matrix")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


@dataclass(frozen=True)
class Grid:
    """A grid that was read and checked.

    cells: for every combination of values, the last axis fastest, the number of its request among `requests`, each of
    which is drawn once. models: by name, the options of the models that the axes choose, and the requests of each.
    """

    title: str
    description: str
    axes: tuple[Axis, ...]
    cells: tuple[int, ...]
    requests: Mapping[str, tuple[Request, ...]]
    models: Models
    sha256: str

    @classmethod
    def read(cls, said: str | Path | Mapping[str, Any], *, asked: Mapping[str, Any] | None = None,
             model: Mapping[str, Any] | None = None, models_dir: str | Path | AddOns | None = None,
             wildcards: str | Path | None = None) -> "Grid":
        """A grid of a YAML file, its text, or what is in it.

            title: Samplers and scales
            prompt: The scene is set in snow. A red heart sits in the center.
            steps: 8
            axes:
              sampler: euler, heun
              scale: 1-7 (+2)
              word: {replace: red, values: "red, blue"}

        Beside title, description, axes (`axes.read_axis`) and matrix (`axes.matrix`) every key is an option of the
        request or the model, and holds for all cells. asked, model: options where it says nothing. models_dir,
        wildcards: as in `generate`. All cells are checked. Raises FileNotFoundError, or ValueError that names the axis
        or the cell.
        """
        name, found = _read(said)
        title = str(found.get("title") or name)
        axes = axes_of(found)
        base, files_ = dict(asked or {}), dict(model or {})
        for key, value in found.items():
            if key not in OWN:
                option = option_named(str(key))
                (files_ if option in MODEL else base)[option] = value
        if (count := prod(len(axis.values) for axis in axes)) > CELLS:
            raise ValueError(f"the grid has {count:,} cells: expected at most {CELLS:,}")
        return _resolved(title, str(found.get("description") or ""), axes, base, files_, models_dir, wildcards)

    def batch(self, folder: str | Path, *, batch: int = BATCH, about: Mapping[str, Any] | None = None) -> Batch:
        """The grid as a batch into a folder. about: what of the models decides the pictures, None for their files."""
        told = {"models": self.models.facts()} if about is None else about
        return Batch(folder, self.requests, {"sha256 of the requests": self.sha256, **told}, shard=SHARD, batch=batch)

    def run(self, folder: str | Path, pipeline: Pipeline | Pipelines | None = None, *, batch: int = BATCH,
            models_dir: str | Path | AddOns | None = None, retry: bool = False,
            told: Callable[[int], None] = lambda settled: None, stop: Callable[[], bool] = lambda: False) -> Path:
        """Draw what of the grid is not drawn yet, and give its page, which is there from the beginning.

        pipeline: the one that draws it, a function from a name in `models`, or None to load what the grid names.
        told, stop: as in `Batch.run`; there are `len(grid.batch(folder))` pictures to be settled. Raises as `Batch.run`
        does, and ValueError for a grid of several models and one pipeline, or of sizes that it cannot draw.
        """
        if isinstance(pipeline, Pipeline) and len(self.requests) > 1:
            raise ValueError("this grid chooses among models, which are not loaded here: draw it with ella-kd grid")
        about = {"model": pipeline.name} if isinstance(pipeline, Pipeline) else None
        work = self.batch(folder, batch=batch, about=about)
        work.check()
        work.folder.mkdir(parents=True, exist_ok=True)
        self.write_page(work)
        work.run(self._pipelines(pipeline), models_dir=models_dir, retry=retry, told=told, stop=stop)
        self.write_page(work)
        if len(self.axes) <= 2:
            self.write_sheet(work)
        return work.folder / PAGE

    def _pipelines(self, given: Pipeline | Pipelines | None) -> Pipelines:
        if given is None:
            return self.models
        if not isinstance(given, Pipeline):
            return given
        for sizes in self.models.sizes.values():
            check_sizes(given, sizes)
        return lambda name: given

    def write_page(self, work: Batch) -> None:
        """`index.html`: itself all it needs but the pictures, which lie beside it."""
        data = {"title": self.title, "description": self.description, "cells": self.cells,
                "axes": [{"title": axis.title, "values": [value.title for value in axis.values]} for axis in self.axes],
                "pictures": [{"file": path, "request": said(request)} for path, request in self._files(work)],
                "failed": status(work.folder).failed if (work.folder / "job.json").exists() else {}}
        text = json.dumps(data).replace("<", "\\u003c")  # no </script> ends the script
        page = files("ella_kd.app").joinpath("grid.html").read_text(encoding="utf-8")
        with writing(work.folder / PAGE) as temporary:
            temporary.write_text(page.replace("/*data*/", text), encoding="utf-8")

    def write_sheet(self, work: Batch) -> None:
        """`sheet.png`: the first axis from left to right, the second down; what was not drawn stays grey. None where
        its cells would be too small to see: there is the page."""
        side = int((PIXELS / len(self.cells)) ** 0.5) - AROUND
        if side < LEAST:
            return
        columns = self.axes[0]
        rows = self.axes[1].values if len(self.axes) > 1 else (Value(""),)
        paths = [work.folder / path for path, _ in self._files(work)]
        images = [_picture(paths[number], side) for number in self.cells]
        labels = [f"{self.axes[1].title}: {row.title}" if len(self.axes) > 1 else self.title for row in rows]
        table = [(label, images[i :: len(rows)]) for i, label in enumerate(labels)]
        sheet = contact_sheet(table, [f"{columns.title}: {value.title}" for value in columns.values],
                              min(256, side))
        save_image(sheet, work.folder / SHEET)

    def _files(self, work: Batch) -> list[tuple[str, Request]]:
        """Every request's picture, as a path in the folder, drawn or not."""
        found = []
        for number in range(len(work.cuts)):
            shard: Shard = work.shard(number)
            for index, request in enumerate(shard.requests, shard.first):
                found.append((shard.path(index).relative_to(work.folder).as_posix(), request))
        return found


class _Loader(yaml.SafeLoader):
    """YAML but for its numbers of base 60: `3:2` is a text here, as an option takes it, and not 182."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, re.compile(rf"(?!.*:)(?:{pattern.pattern})", re.VERBOSE) if tag in _NUMBERS else pattern)
                for tag, pattern in found]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()}


def read_yaml(text: str) -> Any:
    """What a YAML text holds. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def _read(given: str | Path | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What a grid says, and the name it has where it says none."""
    if isinstance(given, Mapping):
        return "Grid", given
    path = Path(given) if isinstance(given, Path) or "\n" not in given else None
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"no grid at {path}: expected a YAML file")
    text = path.read_text(encoding="utf-8-sig") if path is not None else str(given)
    name = "Grid" if path is None else path.stem
    try:
        found = read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path or 'the grid'} is not YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path or 'the grid'}: expected keys such as prompt and axes, got {str(found)[:60]!r}")
    return name, found


def axes_of(found: Mapping[str, Any]) -> tuple[Axis, ...]:
    """The axes that a grid's text names. Raises ValueError for none, for two of one title and for what is no axis."""
    given = found.get("axes") or {}
    if isinstance(given, Sequence) and not isinstance(given, str) and all(
            isinstance(each, Mapping) and len(each) == 1 for each in given):
        given = {name: said for each in given for name, said in each.items()}
    if not isinstance(given, Mapping):
        raise ValueError("axes: expected a name and values for each, `sampler: euler, heun`")
    axes = [read_axis(str(name), said) for name, said in given.items()]
    axes += matrix(found["matrix"]) if found.get("matrix") else []
    if not axes:
        raise ValueError("a grid needs axes: name an option and its values below axes, `sampler: euler, heun`")
    titles = [axis.title for axis in axes]
    if twice := {title for title in titles if titles.count(title) > 1}:
        raise ValueError(f"two axes are named {min(twice)}: give one a title")
    return tuple(axes)


def _resolved(title: str, description: str, axes: tuple[Axis, ...], base: Mapping[str, Any],
              model: Mapping[str, Any], models_dir: str | Path | AddOns | None,
              wildcards: str | Path | None) -> Grid:
    """The grid with every cell made, checked and, where two ask for the same, made one."""
    found_words: set[tuple[str, str]] = set()
    names: dict[str, str] = {}  # of a model, by its options
    options: dict[str, Mapping[str, Any]] = {}
    checks: dict[str, Checker] = {}
    known: dict[tuple[str, str], tuple[str, Request]] = {}
    cells: list[tuple[str, str]] = []
    for values in product(*(axis.values for axis in axes)):
        where = "the cell " + ", ".join(f"{axis.title} {value.title}" for axis, value in zip(axes, values, strict=True))
        try:
            files_ = {**model, **{name: each for value in values for name, each in value.model.items()}}
            key = json.dumps(files_, sort_keys=True, default=str)
            name = names.setdefault(key, str(len(names)))
            request = settled(Request(**_said(base, values, found_words)))
            if wildcards is not None:
                check_wildcards(request.prompt, wildcards)
                request = replace(request, prompt=expand_wildcards(request.prompt, wildcards, request.seed))
            cell = name, request.json()
            if cell not in known:
                options[name] = files_
                checks.setdefault(name, Checker(models_dir))(request, where)
                known[cell] = name, request
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{where}: {error}") from error
        cells.append(cell)
    for axis in axes:
        for value in axis.values:
            if value.replaces and value.replaces not in found_words:
                raise ValueError(f"axis {axis.title}: {value.replaces[0]!r}, which is to be replaced, is not in the "
                                 f"prompt nor in another text ({', '.join(TEXTS)})")
    # Of one model, and of one shape, together: what is dear to change changes least.
    shapes: dict[str, int] = {}
    order = sorted(known, key=lambda cell: (int(cell[0]), shapes.setdefault(_shape_of(known[cell][1]), len(shapes))))
    number = {cell: i for i, cell in enumerate(order)}
    requests = {name: tuple(known[cell][1] for cell in order if cell[0] == name) for name in options}
    digest = hashlib.sha256("".join(check.sha256 for check in checks.values()).encode())
    digest.update(json.dumps([known[cell][1].json() for cell in order]).encode())
    return Grid(title, description, axes, tuple(number[cell] for cell in cells), requests,
                Models(options, {name: check.modes for name, check in checks.items()},
                       {name: check.sizes for name, check in checks.items()}), digest.hexdigest())


def _said(base: Mapping[str, Any], values: Sequence[Value], found: set[tuple[str, str]]) -> dict[str, Any]:
    """What a cell asks for: what is set, then what is replaced in its texts, then what is added to the prompt."""
    given = {**base, **{name: each for value in values for name, each in value.sets.items()}}
    if not isinstance(given.get("prompt"), str):
        raise ValueError("a grid needs a prompt: `prompt: a red heart`, or an axis of prompts")
    for pair in (value.replaces for value in values if value.replaces):
        for name in TEXTS:
            text = given.get(name)
            if isinstance(text, str) and pair[0] in text:
                given[name] = text.replace(*pair)
                found.add(pair)
            elif isinstance(text, (list, tuple)) and any(pair[0] in str(each) for each in text):
                given[name] = [str(each).replace(*pair) for each in text]
                found.add(pair)
    parts = [given["prompt"], *(value.adds for value in values if value.adds)]
    return given | {"prompt": (" " if parts[0].rstrip().endswith(".") else ", ").join(parts)}


def _shape_of(request: Request) -> str:
    like, add_ons, weights = alike(request)
    return f"{like.json()} {add_ons} {weights}"


def _picture(path: Path, side: int) -> Image.Image:
    """A picture no larger than a side; grey where there is none."""
    try:
        with Image.open(path) as image:
            found = image.convert("RGB")
    except OSError:
        return Image.new("RGB", (48, 48), "#c8c8c6")
    found.thumbnail((side, side))
    return found

