"""The unit of work of a batch: a shard of requests becomes files, the same ones however often it is begun."""

import json
import platform
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ella_kd.addons import AddOns
from ella_kd.app.remembered import remembering
from ella_kd.app.shard_files import pack, read_json, sha256, sweep, sync, unpack, write_json
from ella_kd.images import Picture
from ella_kd.jobs import alike, jobs
from ella_kd.models.devices import out_of_memory
from ella_kd.pipeline import Pipeline
from ella_kd.request import Request

DONE = "done"  # the folder of the markers
Cut = list[list[int]]  # the requests that are drawn together, by their index in the batch
_DEFAULTS = json.loads(Request("").json())


class Interrupted(Exception):
    """Somebody asked to stop; what is drawn is kept."""


@dataclass(frozen=True)
class Shard:
    """Neighbouring requests of a batch. folder: the whole batch's. first: the index of the first request. threads: of a
    CPU, which change a picture by rounding; None: as many as there are.

    Its pictures lie in folder/00012/, or with tar in folder/00012.tar, in WebDataset's order: index.png, index.json.
    """

    folder: Path
    number: int
    first: int
    requests: tuple[Request, ...]
    batch_size: int = 8
    tar: bool = False
    threads: int | None = None

    @property
    def pictures(self) -> Path:
        return self.folder / f"{self.number:05d}"

    @property
    def packed(self) -> Path:
        return self.folder / f"{self.number:05d}.tar"

    @property
    def marker(self) -> Path:
        """The file that says that the shard is done, what failed, and the sha256 of each picture."""
        return marker(self.folder, self.number)

    @property
    def unfinished(self) -> Path:
        """The file that keeps a cut that changed, and what failed, until the shard is done."""
        return self.marker.with_suffix(".unfinished")

    def request(self, index: int) -> Request:
        return self.requests[index - self.first]

    def path(self, index: int) -> Path:
        return self.pictures / f"{index:08d}-{self.request(index).seed}.png"

    def files(self, pictures: Iterable[int]) -> list[Path]:
        return [self.packed] if self.tar else [self.path(index) for index in pictures]

    def done(self) -> dict[str, Any] | None:
        """What the marker says; None without one."""
        return read_json(self.marker)


def marker(folder: Path, number: int) -> Path:
    return folder / DONE / f"{number:05d}.json"


def groups(shard: Shard) -> dict[int, int]:
    """Which requests of a shard `jobs` draws together, if they are neighbours: a number for each index."""
    known: list[Any] = []
    found = {}
    for index, request in enumerate(shard.requests, shard.first):
        like = alike(request)
        number = next((number for number, each in enumerate(known) if each == like), len(known))
        if number == len(known):
            known.append(like)
        found[index] = number
    return found


def cut(shard: Shard, group: dict[int, int]) -> Cut:
    """The batches of a shard: those of a group in order, up to batch_size at once."""
    size, batches = shard.batch_size, []
    for number in range(max(group.values(), default=-1) + 1):
        own = [index for index in group if group[index] == number]
        batches += [own[start : start + size] for start in range(0, len(own), size)]
    return batches


def draw_shard(shard: Shard, pipeline: Pipeline, *, models_dir: str | Path | AddOns | None = None, retry: bool = False,
               told: Callable[[int], None] = lambda drawn: None, stop: Callable[[], bool] = lambda: False,
               ) -> list[Path]:
    """Draw what of a shard is not drawn yet, and give its files.

    Each file appears whole or not at all, under a name of its index and seed; the marker with their sha256 comes last.
    A shard with a marker is done; retry: but for what failed. A batch that lacks a picture is drawn whole, with those
    it was first drawn with, so that the bytes are the same. A batch that fails is halved, one that has no memory with
    all like it in the shard, and the new cut is kept; a request that fails alone is noted with its reason.
    models_dir: as in `generate`. told: called with the number of requests that are settled. stop: asked before a batch.
    Raises Interrupted if it says so, and OSError if the pictures cannot be written (a full disk).
    """
    done = shard.done()
    if done is not None and not (retry and done["failed"]):
        told(len(shard.requests))
        return shard.files(entry["index"] for entry in done["pictures"])
    with threads(shard.threads):
        return _draw(_Work(shard, done), pipeline, models_dir, told, stop)


def _draw(work: "_Work", pipeline: Pipeline, models_dir: str | Path | AddOns | None, told: Callable[[int], None],
          stop: Callable[[], bool]) -> list[Path]:
    began, shard = time.monotonic(), work.shard
    shelf = models_dir if isinstance(models_dir, AddOns) else AddOns(models_dir)
    if work.left:
        pipeline = remembering(pipeline, shard.requests)
    told(len(shard.requests) - sum(map(len, work.left)))
    while work.left:
        batches = work.alike()
        stream = jobs(pipeline, (shard.request(i) for batch in batches for i in batch), models_dir=shelf,
                      batch_size=len(batches[0]), progress=False)
        for batch in batches:
            if stop():
                raise Interrupted
            problem: tuple[str, bool] | None = None
            try:
                job = next(stream)
                pictures = list(map(Picture, job.draw(), job.requests))
                assert len(pictures) == len(batch)
            except Exception as error:  # what a request can cause is anything
                if device_is_lost(error):
                    raise
                problem = f"{type(error).__name__}: {error}", _no_memory(error)
            if problem is not None:  # here the error, and with it the tensors of its frames, is gone
                told(work.failed_at(batch, *problem))
                break
            for index, picture in zip(batch, pictures, strict=True):
                work.keep(index, picture)
            work.left.popleft()
            told(len(batch))
    return work.finish(_machine(pipeline), time.monotonic() - began)


class _Work:
    """A shard that is being drawn: what there is of it, and the batches that are left."""

    def __init__(self, shard: Shard, done: dict[str, Any] | None) -> None:
        self.shard = shard
        known = done or read_json(shard.unfinished) or {}
        self.group = groups(shard)
        self.cut = cut(shard, self.group)
        self.batches: Cut = known.get("batches") or list(self.cut)
        self.failed: dict[int, str] = {} if done else {int(i): why for i, why in known.get("failed", {}).items()}
        for folder in (shard.pictures, shard.marker.parent):
            folder.mkdir(parents=True, exist_ok=True)
        sweep(shard.pictures)
        if shard.packed.exists():
            unpack(shard.packed, shard.pictures)
        found = {index: _entry(shard, index) for batch in self.batches for index in batch}
        self.entries: dict[int, dict[str, Any]] = {index: entry for index, entry in found.items() if entry}
        self.left = deque(batch for batch in self.batches
                          if not all(index in self.entries or index in self.failed for index in batch))

    def alike(self) -> Cut:
        """The next batches that are of one shape and, but for the last, of one size."""
        first, batches = self.left[0], [self.left[0]]
        for batch in list(self.left)[1:]:
            if len(batch) > len(first) or len(batches[-1]) < len(first) or self.group[batch[0]] != self.group[first[0]]:
                break
            batches.append(batch)
        return batches

    def failed_at(self, batch: list[int], why: str, no_memory: bool) -> int:
        """Halve the batch, or give its only request up. The number of requests that are settled by that."""
        if len(batch) == 1:
            self.failed[batch[0]] = why
            self.left.popleft()
        else:
            half, group = (len(batch) + 1) // 2, self.group[batch[0]]
            for each in [each for each in self.left if each == batch or (
                    no_memory and len(each) > half and self.group[each[0]] == group)]:
                parts = [each[start : start + half] for start in range(0, len(each), half)]
                for among in (self.batches, self.left):
                    at = among.index(each)
                    del among[at]
                    for part in reversed(parts):
                        among.insert(at, part)
        write_json(self.shard.unfinished, {"batches": self.batches, "failed": self.failed})
        if no_memory and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return int(len(batch) == 1)

    def keep(self, index: int, picture: Picture) -> None:
        """Save a picture, unless it is there from before."""
        if index not in self.entries:
            path = self.shard.path(index)
            picture.save(path, overwrite=True)
            self.entries[index] = _described(index, path, picture.settings)

    def finish(self, machine: str, seconds: float) -> list[Path]:
        """The tar, then the marker, and nothing else of the shard but its files."""
        shard, entries = self.shard, [self.entries[index] for index in sorted(self.entries)]
        if shard.tar:
            pack(shard.packed, (file for entry in entries for file in _packed(shard, entry)))
            shutil.rmtree(shard.pictures)
        for folder in (shard.folder,) if shard.tar else (shard.folder, shard.pictures):
            sync(folder)
        write_json(shard.marker, {
            "first": shard.first, "requests": len(shard.requests), "tar": shard.tar, "batches": self.batches,
            "cut_changed": self.batches != self.cut, "failed": self.failed, "pictures": entries, "machine": machine,
            "seconds": round(seconds, 3)})
        shard.unfinished.unlink(missing_ok=True)
        return shard.files(self.entries)


def said(request: Request) -> dict[str, Any]:
    """What of a request is not the default, as a line of a job file says it."""
    return {name: value for name, value in json.loads(request.json()).items()
            if value != _DEFAULTS[name] and (name, value) != ("version", "")}


def _entry(shard: Shard, index: int) -> dict[str, Any] | None:
    """What the marker will say of a picture that is there, whole and the one that is asked for; else None."""
    path, asked = shard.path(index), shard.request(index)
    if not path.is_file():
        return None
    try:
        drawn = Request.from_picture(path)
    except (OSError, ValueError):
        return None
    return _described(index, path, drawn) if (drawn.prompt, drawn.seed) == (asked.prompt, asked.seed) else None


def _described(index: int, path: Path, drawn: Request) -> dict[str, Any]:
    return {"index": index, "file": f"{path.parent.name}/{path.name}", "sha256": sha256(path), "request": said(drawn)}


def _packed(shard: Shard, entry: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """A picture and its request, as a tar names them."""
    path = shard.path(entry["index"])
    yield path.name, path.read_bytes()
    yield f"{path.stem}.json", json.dumps(entry["request"], ensure_ascii=False).encode()


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """So many threads of the CPU, for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _no_memory(error: Exception) -> bool:
    """In CUDA's own words too, which torch hands on as an error of the device."""
    return out_of_memory(error) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("out of memory", "ALLOC_FAILED")))


def device_is_lost(error: Exception) -> bool:
    """Whether the device is of no use any more, to this process, by no fault of the request."""
    return isinstance(error, RuntimeError) and not _no_memory(error) and "CUDA error" in str(error)


def _machine(pipeline: Pipeline) -> str:
    device = pipeline.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {str(pipeline.dtype)[6:]}"
