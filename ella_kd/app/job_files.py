"""Job files: a request a line, as a JSON object."""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from ella_kd.addons import AddOns
from ella_kd.drawing import innermost_scale
from ella_kd.generation import OTHER_WORDS
from ella_kd.guidance.text import parse
from ella_kd.pictures.options import SOURCES
from ella_kd.pictures.reading import read_picture
from ella_kd.prompts import check_wildcards, expand_wildcards
from ella_kd.request import Mode, Request

KNOWN = [each.name for each in fields(Request)]
AT_ONCE = 512  # lines whose add-ons are kept in mind together


class Checker:
    """Checks requests as far as no weight is needed, and remembers what they need of a model.

    modes: those that are used, each with who said it first. sizes: width and height, likewise.
    """

    def __init__(self, models_dir: str | Path | AddOns | None = None) -> None:
        self.models_dir = models_dir
        self.modes: dict[Mode, str] = {}
        self.sizes: dict[tuple[int | None, int | None], str] = {}
        self._digest, self._count, self._shelf = hashlib.sha256(), 0, AddOns()

    def __call__(self, request: Request, where: str) -> None:
        """Raises ValueError, TypeError or OSError for a request that cannot be drawn. where: who said it."""
        if self._count % AT_ONCE == 0:
            self._shelf = self.models_dir if isinstance(self.models_dir, AddOns) else AddOns(self.models_dir)
            self._sources: set[str] = set()
        self._count += 1
        given = set[str]()  # files whose contents decide the picture
        for source in {getattr(request, name) for name in SOURCES if isinstance(getattr(request, name), str)}:
            if source not in self._sources:
                read_picture(source)
                self._sources.add(source)
            given.add(source)
        if request.latents is not None and not Path(request.latents).is_file():
            raise FileNotFoundError(f"no latents at {request.latents}")
        self._shelf.check(request.add_ons, request.hashes)
        given |= {each.picture for each in request.add_ons if each.picture}
        given |= {file for file in (request.latents, request.refiner) if file is not None and Path(file).is_file()}
        for mode in (request.mode, request.negative_mode, "clip" if request.tags is not None else None):
            if mode is not None:
                self.modes.setdefault(mode, where)
        self.sizes.setdefault((request.width, request.height), where)
        self._digest.update(request.json().encode() + b"\n")
        contents = [f"{file}={_contents(file)}" for file in sorted(given)]
        for said in (*contents, *self._shelf.hashes(request.add_ons)):
            self._digest.update(said.encode("utf-8", "surrogateescape") + b"\n")

    @property
    def sha256(self) -> str:
        """Of all requests so far, and of the files that they name."""
        return self._digest.hexdigest()


def _contents(file: str) -> str:
    """The sha256 of a file, read once until its size or time of change is another."""
    facts = Path(file).stat()
    return _read(file, facts.st_size, facts.st_mtime_ns)


@lru_cache(4096)
def _read(file: str, size: int, changed: int) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class JobFile:
    """The requests of a job file, each made when it is asked for; blank lines count for nothing.

        {"prompt": "a red heart", "seed": 1, "steps": 30}

    asked: what holds where a line says nothing. wildcards: a folder, as in `generate`. Every line is read and checked
    here. Raises FileNotFoundError, or ValueError that names the line: no JSON object, an unknown key (with the nearest
    that there is), no prompt, or a request that cannot be drawn.
    """

    def __init__(self, path: str | Path, check: Callable[[Request, str], None],
                 asked: Mapping[str, Any] | None = None, wildcards: str | Path | None = None) -> None:
        self.path, self.asked, self.wildcards = Path(path), dict(asked or {}), wildcards
        self._starts = array("Q")
        if not self.path.is_file():
            raise FileNotFoundError(f"no job file at {self.path}")
        self._file = open(self.path, "rb")  # noqa: SIM115  kept: an editor that saves anew puts another file there
        for number, start, line in self._lines():
            where = f"{self.path}, line {number}"
            try:
                values = read_line(line)
                if wildcards is not None:
                    check_wildcards(values["prompt"], wildcards)
                check(self._request(values), where)
            except (ValueError, TypeError, OSError) as error:
                raise ValueError(f"{where}: {error}") from error
            self._starts.append(start)
        if not self._starts:
            raise ValueError(f"{self.path} holds no request: expected a JSON object a line, {{\"prompt\": \"...\"}}")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, part: slice) -> list[Request]:
        """Requests start to stop."""
        found = []
        for start in self._starts[part]:
            self._file.seek(start)
            found.append(self._request(read_line(self._file.readline())))
        return found

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, first byte and text of each line that says something."""
        at = 0
        for number, line in enumerate(self._file, 1):
            start, at = at, at + len(line)
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield number, start, line

    def _request(self, values: Mapping[str, Any]) -> Request:
        request = settled(Request(**{**self.asked, **values}))
        if self.wildcards is None:
            return request
        return replace(request, prompt=expand_wildcards(request.prompt, self.wildcards, request.seed))


def settled(request: Request) -> Request:
    """The request as it is compared and kept: its rule as the library spells it, nothing that is for the record."""
    if not request.guidance:
        return replace(request, model="", version="", dtype="")
    rule = parse(request.guidance)
    return replace(request, model="", version="", dtype="", guidance=repr(rule), scale=innermost_scale(rule))


def read_line(line: str | bytes) -> dict[str, Any]:
    """A line's keys and values. ValueError for what is no object, for unknown keys, and without a prompt."""
    try:
        values = json.loads(line.decode("utf-8-sig") if isinstance(line, bytes) else line)
    except ValueError as error:
        raise ValueError(f"this is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, {{\"prompt\": \"...\"}}, got {str(values)[:60]!r}")
    check_names(values)
    if not isinstance(values.get("prompt"), str):
        raise ValueError(f"the key prompt must be a text, got {values.get('prompt')!r}")
    return values


def check_names(values: Mapping[str, Any], more: tuple[str, ...] = ()) -> None:
    """ValueError for a name that no request has, with the nearest."""
    known = [*KNOWN, *more]
    for name in values:
        if name not in known:
            near = [OTHER_WORDS[name]] if name in OTHER_WORDS else get_close_matches(str(name), known, 3, 0.6)
            raise ValueError(f"unknown key {name!r}: " + (f"did you mean {' or '.join(near)}?" if near else
                                                          f"expected one of {', '.join(known)}"))
