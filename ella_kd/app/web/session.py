"""What the page does, without a page: draws what forms ask for, one at a time, and tells how it goes."""

import copy
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from difflib import get_close_matches
from functools import cached_property, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from PIL import Image

from ella_kd.addon_words import AddOn
from ella_kd.addons import AddOns
from ella_kd.app.web.form import LIMITS, SEEDS, Form, Limits, filled, largest_side, requests
from ella_kd.app.web.preview import Preview
from ella_kd.app.web.uploads import check_pixels
from ella_kd.cli import OUT_OF_MEMORY, last_number, save
from ella_kd.files import writing
from ella_kd.images import Picture
from ella_kd.jobs import jobs
from ella_kd.models.devices import out_of_memory
from ella_kd.models.files.folders import look_up, names
from ella_kd.options import check_folder
from ella_kd.pipeline import FIXED_LENGTH, Pipeline
from ella_kd.request import MODES, Mode, Request

News = TypeVar("News")
INPUTS = "inputs"  # the folder in the output folder where uploaded pictures are kept, named by their content
EVERY = 0.1  # seconds between previews
ALIVE = 0.2  # seconds without news
THREAD = "ella_kd draws"


class Stopped(Exception):
    """Somebody pressed cancel, or went away."""


@dataclass(frozen=True)
class Step:
    """A step of a draw is done. share: of the whole draw, 0 to 1; left: seconds, None until that is known."""

    step: int
    steps: int
    done: int
    total: int
    share: float
    left: float | None
    preview: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Saved:
    """A picture is on disk. mode: how its prompt was read; told: warnings since the last one."""

    path: Path
    request: Request
    done: int
    total: int
    told: tuple[str, ...] = ()


class Studio:
    """A pipeline and what surrounds it on the page; its methods may be called from any thread.

    out: the folder of pictures, one below it per day. models_dir: where add-ons are found; no other file is read for
    anyone. upsample: a function from a short prompt to a long one.
    """

    def __init__(self, pipeline: Pipeline, out: str | Path = "out", models_dir: str | Path | None = None, *,
                 upsample: Callable[[str], str] | None = None, limits: Limits = LIMITS, batch_size: int = 8) -> None:
        self.pipeline, self.out, self.models_dir = pipeline, Path(out), models_dir
        self.upsample, self.limits, self.batch_size = upsample, limits, batch_size
        self.drawing, self._told = threading.Lock(), threading.local()
        self.shelf = Shelf(models_dir)
        self._tokenizers = copy.deepcopy([getattr(part, "tokenizer", None)  # they keep state: not the encoders' own
                                          for part in (pipeline.t5, getattr(pipeline.clip, "first", pipeline.clip))])
        check_folder(self.out)
        self._listen()

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Those that the pipeline has the parts for."""
        has = {"clip": self.pipeline.clip is not None}
        return tuple(mode for mode in MODES if has.get(mode, self.pipeline.tsc is not None))

    def names(self, place: str) -> list[str]:
        """The add-ons of a kind in the models' folder."""
        return [] if self.models_dir is None else names(place, self.models_dir)

    def tokens(self, prompt: str) -> str:
        """How many tokens a prompt is to T5 and to CLIP, in words."""
        t5, clip = (None if each is None else len(each(prompt, verbose=False)["input_ids"])
                    for each in self._tokenizers)
        room = getattr(getattr(self._clip, "config", None), "max_position_embeddings", 77)
        said = [] if t5 is None else [f"{t5} T5 tokens" + f" (fixed reads {FIXED_LENGTH})" * (t5 > FIXED_LENGTH)]
        said += [] if clip is None else [f"{clip} of {room} for CLIP"]
        return ", ".join(said)

    @property
    def _clip(self) -> Any:
        clip = self.pipeline.clip
        return getattr(getattr(clip, "first", clip), "model", None)

    def longer(self, prompt: str) -> str:
        """The prompt by the upsampler."""
        if self.upsample is None:
            raise ValueError("no upsampler here: serve(pipeline, upsample=a function from a prompt to a longer one)")
        found = self.upsample(prompt)
        if not isinstance(found, str):
            raise TypeError(f"upsample must give text, got {type(found).__name__}")
        return found

    def asked(self, form: Form) -> dict[Mode, list[Request]]:
        """The requests of a form, checked as far as no weight is needed to tell. Raises ValueError or TypeError."""
        for name, path in (("start picture", form.start), ("mask", form.mask),
                           ("control's picture", form.control_picture if form.control else None)):
            if path is not None and not self._kept(path):
                raise ValueError(f"the {name} is a picture that was given to this page, got {path[:80]!r}")
        return self._requests(form)

    def _requests(self, form: Form) -> dict[Mode, list[Request]]:
        found = requests(form, self.limits, self.modes, lambda: int(torch.randint(SEEDS - self.limits.count, ())))
        for first, *_ in found.values():
            self.check(first)
        return found

    def with_pictures(self, form: Form, given: Mapping[str, Image.Image]) -> Form:
        """The form with uploaded pictures by its names, kept if it can be drawn. Raises as `asked` does."""
        with TemporaryDirectory() as folder:  # nothing but their sizes is asked for till then
            files: dict[str, Any] = {name: f"{folder}/{name}.png" for name in given}
            for name, picture in given.items():
                Image.new("1", picture.size).save(files[name])
            self._requests(replace(form, **files))
        files = {name: self.keep(picture) for name, picture in given.items()}
        return replace(form, **files)

    def check(self, request: Request) -> None:
        """ValueError for a request that is too large, or asks for an add-on that is not in the models' folder."""
        for add_on in request.add_ons:
            self._check(add_on)
        if (side := largest_side(request, self.pipeline)) > self.limits.side:
            raise ValueError(f"the larger side of a picture may be {self.limits.side} px here, got {side}")

    def _check(self, add_on: AddOn) -> None:
        """An add-on lies in the models' folder: no path and no name on the hub is looked up for whoever asks."""
        known = self.names(add_on.place)
        if add_on.file not in known:
            near = get_close_matches(add_on.file, known, 3) or known[:5]
            raise ValueError(f"no {add_on.place} {add_on.file[:80]!r} here: " + (f"there is {', '.join(near)}" if near
                             else "the page was started without such files in --models-dir"))

    def draw(self, form: Form) -> Generator[Step | Saved | None, None, None]:
        """Draw what a form asks for; closing the iterator stops the drawing at its next step. None: nothing new.

        Raises ValueError or TypeError for what cannot be drawn, before anything is, and what drawing raises.
        """
        return self.in_turn(partial(self._work, self.asked(form)))

    def in_turn(self, work: Callable[[Callable[[News], None], threading.Event], None]
                ) -> Generator[News | None, None, None]:
        """What a work tells, which runs in a thread when it is its turn; closing the iterator sets its event.

        None where there is no news for a while: whoever iterates can close it then, however long a step takes.
        """
        news: SimpleQueue[tuple[News] | BaseException | None] = SimpleQueue()
        stop = threading.Event()

        def run() -> None:
            with self.drawing:
                try:
                    if not stop.is_set():
                        work(lambda one: news.put((one,)), stop)
                except Stopped:
                    pass
                except BaseException as error:
                    news.put(error)
                news.put(None)

        threading.Thread(target=run, name=THREAD, daemon=True).start()
        try:
            while True:
                try:
                    one = news.get(timeout=ALIVE)
                except Empty:
                    yield None
                    continue
                if one is None:
                    return
                if isinstance(one, BaseException):
                    raise one
                yield one[0]
        finally:
            stop.set()

    def _work(self, columns: Mapping[Mode, Sequence[Request]], tell: Callable[[Step | Saved], None],
              stop: threading.Event) -> None:
        told: list[str] = []
        self._told.here = told
        watch = Watch([request for column in columns.values() for request in column])
        shown = 0.0

        def look(record: dict[str, Any]) -> None:
            nonlocal shown
            if stop.is_set():
                raise Stopped
            watch.now += 1
            if time.monotonic() - shown > EVERY or watch.now >= watch.steps:
                tell(watch.told(tuple(self.preview(record["denoised"]))))
                shown = time.monotonic()

        folder = self.out / date.today().isoformat()
        check_folder(folder)
        for column in columns.values():
            for job in jobs(self.pipeline, column, models_dir=self.shelf, batch_size=self.batch_size, callback=look,
                            progress=False):
                watch.begin(job.requests[0], len(job.requests))
                if stop.is_set():
                    raise Stopped
                number = last_number(folder)
                for picture in map(Picture, job.draw(), job.requests):
                    number, path = save(picture, folder, number, "png")
                    watch.done += 1
                    tell(Saved(path, picture.settings, watch.done, watch.total, tuple(dict.fromkeys(told))))
                    told.clear()

    @cached_property
    def preview(self) -> Preview:
        """Fitted when it is first looked at."""
        with self.pipeline.at_work("vae"):
            return Preview.fit(self.pipeline.vae, min(16, self.pipeline.size // self.pipeline.vae.factor))

    def keep(self, picture: Image.Image) -> str:
        """The file that holds an uploaded picture, so that its settings name one that stays. The name is its content's.
        """
        bytes_ = BytesIO()
        picture.save(bytes_, "PNG")
        path = self.out / INPUTS / f"{sha256(bytes_.getvalue()).hexdigest()[:16]}.png"
        if not path.exists():
            check_folder(path.parent)
            with writing(path) as temporary:
                temporary.write_bytes(bytes_.getvalue())
        return str(path)

    def _kept(self, path: str) -> bool:
        return Path(path).parent == self.out / INPUTS and Path(path).suffix == ".png" and Path(path).is_file()

    def settings_of(self, path: str | Path) -> tuple[Form, str, list[str]]:
        """The form that a picture of ours or of the AUTOMATIC1111 web UI was drawn by, its text, and what is missing.

        Raises ValueError for a file without settings.
        """
        path, told = Path(path), list[str]()
        check_pixels(path)
        self._told.here = told
        try:
            request = Request.from_picture(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), "the picture")) from error
        finally:
            self._told.here = None
        form, left = filled(request)
        for name, what in (("start", "start picture"), ("mask", "mask"), ("control_picture", "control's picture")):
            if (file := getattr(form, name)) is not None and not self._kept(file):
                form = replace(form, **dict[str, Any]({name: None}))
                left.append(f"the {what} {file}, to be given again")
        for add_on in request.add_ons:
            try:
                self._check(add_on)
            except ValueError as error:
                told.append(str(error))
        if request.model not in ("", self.pipeline.name):
            told.append(f"it was drawn by {request.model}, and this is {self.pipeline.name}")
        told += ["not taken: " + "; ".join(left)] if left else []
        return form, request.parameters(), [each.replace(str(path), "the picture") for each in told]

    def _listen(self) -> None:
        """Warnings of a thread that asks for them go to it; `catch_warnings` is the process's, and draws are long."""
        before = warnings.showwarning

        def show(message: Warning | str, *args: Any, **more: Any) -> None:
            told = getattr(self._told, "here", None)
            if told is None:
                before(message, *args, **more)
            else:
                told.append(str(message))

        warnings.showwarning = show
        warnings.filterwarnings("always", category=UserWarning, module="ella_kd")


class Shelf(AddOns):
    """Add-ons of the models' folder alone."""

    def _found(self, place: Any, name: str) -> Path:
        if self.models_dir is None:
            raise FileNotFoundError(f"no {place} {name}: the page was started without --models-dir")
        return look_up(name, place, self.models_dir)


class Watch:
    """How far a draw of several batches is: steps counted against those expected, and the clock."""

    def __init__(self, asked: Sequence[Request]) -> None:
        self.total, self.done, self.now = len(asked), 0, 0
        self.batch, self.steps, self.since = 0, 1, time.monotonic()

    def begin(self, request: Request, batch: int) -> None:
        self.batch, self.steps, self.now, self.since = batch, expected_steps(request), 0, time.monotonic()

    def told(self, preview: tuple[Image.Image, ...]) -> Step:
        share = min(1.0, self.now / self.steps)
        spent = time.monotonic() - self.since
        rest = (1 - share) + (self.total - self.done - self.batch) / max(1, self.batch)
        left = spent / share * rest if self.now > 1 else None
        return Step(min(self.now, self.steps), self.steps, self.done, self.total,
                    (self.done + share * self.batch) / self.total, left, preview)


def expected_steps(request: Request) -> int:
    """Of all passes; a run that ends earlier or later is shown as it goes."""
    steps = (len(request.sigmas) - 1 if request.sigmas else request.steps) * request.repeats
    return steps + (0 if request.hires is None else request.hires_steps or request.steps)


def message_of(error: BaseException) -> str:
    """What a user is told of an error; ours with its traceback on the server's console."""
    if out_of_memory(error):
        return OUT_OF_MEMORY.replace("--batch, --width or --height", "count or size")
    if isinstance(error, (ValueError, TypeError, OSError)):
        return " ".join(str(error).split())
    traceback.print_exception(error)
    return f"something went wrong inside ({type(error).__name__}); the server's console tells more"
