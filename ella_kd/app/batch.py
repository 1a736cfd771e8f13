"""A batch: requests in, pictures and a manifest out, each drawn once, however often the run is stopped."""

import hashlib
import json
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image

from ella_kd.addons import AddOns
from ella_kd.app.remembered import remembering
from ella_kd.app.shard_files import member, read_json, sweep
from ella_kd.app.shards import DONE, Interrupted, Shard, draw_shard, marker, threads
from ella_kd.files import writing
from ella_kd.jobs import jobs
from ella_kd.pipeline import Pipeline
from ella_kd.request import VERSION, Request

SHARD, BATCH = 64, 8  # requests: of a shard, at once
JOB, MANIFEST, LOCK = "job.json", "manifest.jsonl", ".lock"
STOP = ".stop"  # a file that makes workers end after their batch


class Requests(Protocol):
    """A `JobFile`, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Sequence[Request]: ...


@dataclass(frozen=True)
class Status:
    """How far a batch is. settled: requests that are drawn or have failed. rate: pictures a second over the last hour,
    on all machines; None where nobody knows. last: when the last shard was done."""

    requests: int
    settled: int
    pictures: int
    failed: dict[int, str]
    shards: int
    shards_done: int
    rate: float | None
    last: float | None

    @property
    def left(self) -> float | None:
        """Seconds."""
        return None if not self.rate else (self.requests - self.settled) / self.rate


@dataclass(frozen=True)
class Redrawn:
    """A finished picture and the same one drawn anew. difference: the largest, in grey levels of 255."""

    index: int
    file: str
    whole: bool  # the file is there, with the bytes that were written
    difference: int | None


class Batch:
    """The folder of a batch.

    parts: requests by the model that draws them, "" where there is one. about: what else decides the pictures and is
    compared when the batch is taken up again: the model's files, the sha256 of the requests. shard, batch: how the
    requests are cut; they decide which are drawn together, and so, by rounding, the bytes. tar: a file per shard.
    threads: of a CPU, the same for all that draw; those that the batch was begun with stay.
    """

    def __init__(self, folder: str | Path, parts: Mapping[str, Requests], about: Mapping[str, Any], *,
                 shard: int = SHARD, batch: int = BATCH, tar: bool = False,
                 threads: int | None = None) -> None:
        self.folder, self.parts, self.batch_size, self.tar = Path(folder), dict(parts), batch, tar
        self.cuts: list[tuple[str, int, int, int]] = []  # of each shard: model, index, start and end in its part
        index = 0
        for model, requests in self.parts.items():
            for start in range(0, len(requests), shard):
                stop = min(start + shard, len(requests))
                self.cuts.append((model, index, start, stop))
                index += stop - start
        self.about: dict[str, Any] = {
            "requests": index, "shards": len(self.cuts), "shard": shard, "batch": batch, "tar": tar, **about,
            "threads": threads or torch.get_num_threads(), "version": VERSION}

    def __len__(self) -> int:
        return sum(stop - start for _, _, start, stop in self.cuts)

    def shard(self, number: int) -> Shard:
        model, first, start, stop = self.cuts[number]
        return Shard(self.folder, number, first, tuple(self.parts[model][start:stop]), self.batch_size, self.tar,
                     self.about["threads"])

    def model(self, number: int) -> str:
        return self.cuts[number][0]

    def requests_in(self, number: int) -> int:
        _, _, start, stop = self.cuts[number]
        return stop - start

    def open_shards(self, retry: bool = False) -> list[int]:
        """The shards without a marker; with retry those too whose marker tells of failures."""
        done = {number for number in range(len(self.cuts)) if marker(self.folder, number).exists()}
        if retry:
            done = {number for number in done if not (read_json(marker(self.folder, number)) or {})["failed"]}
        return [number for number in range(len(self.cuts)) if number not in done]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The folder, for the one that draws into it; at the end its manifest is written.

        Raises ValueError where another one is at work, and for the folder of another batch.
        """
        self.check()
        (self.folder / DONE).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK, timeout=0)  # the system's: it is free when its holder is dead
        try:
            with lock:
                for folder in (self.folder, self.folder / DONE):
                    sweep(folder)
                (self.folder / STOP).unlink(missing_ok=True)
                if not (self.folder / JOB).exists():
                    with writing(self.folder / JOB) as temporary:
                        temporary.write_text(json.dumps(self.about, indent=1) + "\n", encoding="utf-8")
                self.check()
                try:
                    yield
                finally:
                    write_manifest(self.folder)
                    (self.folder / STOP).unlink(missing_ok=True)
        except Timeout as error:
            raise ValueError(f"another run is drawing into {self.folder}: wait for it, stop it, or choose another "
                             "folder") from error

    def check(self) -> None:
        """Raises ValueError if the folder is another batch's."""
        known = read_json(self.folder / JOB)
        if known is None:
            if (self.folder / DONE).is_dir() and any((self.folder / DONE).glob("*.json")):
                raise ValueError(f"{self.folder} has markers of a batch but no {JOB}: choose another folder")
            return
        asked = json.loads(json.dumps(self.about))
        for name in dict.fromkeys((*asked, *known)):
            if name not in ("version", "threads") and asked.get(name) != known.get(name):
                raise ValueError(f"{self.folder} holds another batch, whose {name} is {_short(known.get(name))}, not "
                                 f"{_short(asked.get(name))}: ask for the same or choose another folder")
        self.about["threads"] = known["threads"]

    def run(self, pipelines: Callable[[str], Pipeline], *, models_dir: str | Path | AddOns | None = None,
            retry: bool = False, told: Callable[[int], None] = lambda settled: None,
            stop: Callable[[], bool] = lambda: False) -> Status:
        """Draw what is not drawn yet, in this process. pipelines: gives a model by its name in parts.

        told: called with the number of requests that are settled in the open shards. stop: asked before every batch;
        when it says so the run ends, to be taken up again. Raises as `draw_shard` does, and ValueError as `at_work`.
        """
        with self.at_work():
            for number in self.open_shards(retry):
                try:
                    if stop():
                        break
                    draw_shard(self.shard(number), pipelines(self.model(number)), models_dir=models_dir, retry=retry,
                               told=told, stop=stop)
                except Interrupted:
                    break
        return status(self.folder)

    def verify(self, count: int, pipelines: Callable[[str], Pipeline], *,
               models_dir: str | Path | AddOns | None = None) -> Iterator[Redrawn]:
        """Draw so many finished pictures again, chosen at random, each with those it was drawn with, and compare.

        Another kind of device or other versions change a picture by rounding: by 1 of 255, in bfloat16 by 3.
        Raises ValueError where nothing is finished, or for the folder of another batch.
        """
        self.check()
        drawn = [(number, entry["index"]) for number in range(len(self.cuts))
                 for entry in (read_json(marker(self.folder, number)) or {"pictures": []})["pictures"]]
        if not drawn:
            raise ValueError(f"{self.folder} holds no finished shard to draw again")
        for number, index in sorted(random.sample(drawn, min(count, len(drawn)))):
            yield self._redrawn(number, index, pipelines(self.model(number)), models_dir)

    def _redrawn(self, number: int, index: int, pipeline: Pipeline, models_dir: Any) -> Redrawn:
        shard = self.shard(number)
        done = shard.done()
        assert done is not None
        entry = next(each for each in done["pictures"] if each["index"] == index)
        batch = next(each for each in done["batches"] if index in each)
        try:
            path = self.folder / entry["file"]
            data = member(shard.packed, path.name) if self.tar else path.read_bytes()
            image, whole = Image.open(BytesIO(data)), hashlib.sha256(data).hexdigest() == entry["sha256"]
            kept = np.asarray(image.convert("RGB"), int)
        except (OSError, SyntaxError, KeyError, tarfile.TarError):
            return Redrawn(index, entry["file"], False, None)
        system = remembering(pipeline, shard.requests)
        [job] = jobs(system, map(shard.request, batch), models_dir=models_dir, batch_size=len(batch), progress=False)
        with threads(shard.threads):
            images = job.draw()
        again = np.asarray(images[batch.index(index)].convert("RGB"), int)
        difference = int(np.abs(kept - again).max()) if kept.shape == again.shape else 255
        return Redrawn(index, entry["file"], whole, difference)


def markers(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Those of a batch's finished shards, in order."""
    for path in sorted((folder / DONE).glob("*.json"), key=lambda path: int(path.stem)):
        if (done := read_json(path)) is not None:
            yield path, done


def write_manifest(folder: Path) -> None:
    """`manifest.jsonl`: a line for each settled request, in order: its file, sha256 and request, or why it failed."""
    with writing(folder / MANIFEST) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for path, done in markers(folder):
            lines = {entry["index"]: entry for entry in done["pictures"]}
            if done["tar"]:
                lines = {index: {**entry, "tar": f"{path.stem}.tar"} for index, entry in lines.items()}
            lines |= {int(index): {"index": int(index), "error": why} for index, why in done["failed"].items()}
            for index in sorted(lines):
                file.write(json.dumps(lines[index], ensure_ascii=False) + "\n")


def status(folder: str | Path) -> Status:
    """What the markers of a batch's folder tell. Raises FileNotFoundError for another folder."""
    folder, failed, times = Path(folder), dict[int, str](), list[tuple[float, int]]()
    if (about := read_json(folder / JOB)) is None:
        raise FileNotFoundError(f"no batch in {folder}: it has no {JOB}")
    settled = pictures = 0
    for path, done in markers(folder):
        settled += done["requests"]
        pictures += len(done["pictures"])
        failed |= {int(index): why for index, why in done["failed"].items()}
        times.append((path.stat().st_mtime, len(done["pictures"])))
    times.sort()
    recent = [count for moment, count in times[1:] if moment > times[-1][0] - 3600]
    passed = times[-1][0] - times[-len(recent) - 1][0] if times else 0.0
    return Status(about["requests"], settled, pictures, failed, about["shards"], len(times),
                  sum(recent) / passed if passed else None, times[-1][0] if times else None)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else f"{text[:200]}..."


def lasting(seconds: float) -> str:
    """A time, as people say it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
