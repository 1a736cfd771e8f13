"""Requests to jobs: which are drawn together, by which networks, and how each kind of run is put together."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ella_kd.addon_words import AddOn
from ella_kd.addons import AddOns
from ella_kd.denoiser import Condition
from ella_kd.drawing import draw
from ella_kd.encoding import reader, weights
from ella_kd.guidance import Guidance
from ella_kd.guidance.text import parse
from ella_kd.pictures.hires import Hires
from ella_kd.pictures.hires_options import NO_SECOND, Enlargement, InTiles, Size, Upscaler
from ella_kd.pictures.reading import read_picture
from ella_kd.pictures.start import sigmas_by_strength
from ella_kd.pictures.upscale import upscale
from ella_kd.pictures.upscalers import upscaler_of
from ella_kd.pipeline import Pipeline
from ella_kd.placement import Placement
from ella_kd.refining import Refiner
from ella_kd.request import SCALE, VERSION, Request, whole
from ella_kd.starting import begin, check_multiples, picture_size


@dataclass(frozen=True)
class Job:
    """Requests that are drawn together, each with what the pipeline adds to it, and the call that draws them."""

    requests: list[Request]
    draw: Callable[[], list[Image.Image]]


def jobs(
    pipeline: Pipeline,
    requests: Iterable[Request],
    *,
    guidance: Guidance | None = None,
    refiner: Pipeline | None = None,
    models_dir: str | Path | AddOns | None = None,
    batch_size: int = 8,
    callback: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> Iterator[Job]:
    """Any number of requests, batch by batch and ready to be drawn; they may be made on the way.

        for job in jobs(pipeline, requests):
            pictures = map(Picture, job.draw(), job.requests)

    Neighbours that differ in prompt, negative and seed only, and ask for the same add-ons, are drawn together, up to
    batch_size at once. What was encoded for a batch serves the next one if it says the same. guidance: a rule that no
    text can name, for all of them; refiner: a system in place of the file that they name; models_dir: where the names
    of add-ons are looked up. callback and progress as in `generate`, and the errors too.
    """
    size, load = whole("batch_size", batch_size), lru_cache(1)(partial(_loaded_beside, pipeline))
    shelf = models_dir if isinstance(models_dir, AddOns) else AddOns(models_dir)

    def dress(add_ons: Sequence[AddOn], asked: Request) -> Pipeline:
        dressed = shelf.dressed(pipeline, add_ons, asked)
        return dressed.seamless() if asked.tiling else dressed

    for (asked, add_ons, _), some in groupby(requests, alike):
        shelf.check(add_ons, asked.hashes)
        second = None if asked.refiner is None else refiner or load(asked.refiner)
        worn = [each for each in add_ons if each.place != "upscaler"]
        if second is not None and worn:
            warnings.warn(f"the refiner draws without the add-ons: {', '.join(map(str, worn))}", stacklevel=3)
        rule = guidance or (parse(asked.guidance) if asked.guidance else None)
        group = Group(replace(asked, hashes=shelf.hashes(add_ons)), dress(add_ons, asked), rule, second,
                      shelf.upscaler(asked), partial(shelf.steered, pipeline, add_ons), dress)
        ready, left = group.ready(), iter(some)
        while batch := list(islice(left, size)):
            yield ready(batch, callback=callback, progress=progress)


def alike(request: Request) -> tuple[Request, tuple[AddOn, ...], Any]:
    """What neighbours have in common that are drawn together."""
    return (replace(request, prompt="", negative="", seed=0), request.add_ons,
            weights(request.text) if request.syntax else ())


def _loaded_beside(pipeline: Pipeline, file: str) -> Pipeline:
    """A refiner's file, where the pipeline is; a single file's CLIP reads with the pipeline's tokenizer."""
    clip = getattr(pipeline.clip, "first", pipeline.clip)
    folder = Path(getattr(getattr(clip, "tokenizer", None), "name_or_path", "") or "-")
    return Pipeline.load(file, clip_tokenizer=folder if folder.is_dir() and not Path(file).is_dir() else None,
                         placement=pipeline.placement or Placement(pipeline.device, pipeline.dtype))


@dataclass(frozen=True, eq=False)
class Pass:
    """The networks of one run, and what makes of requests the conditions that it is drawn with, read for its noise
    levels: cond, uncond, and refiner where there is one."""

    pipeline: Pipeline
    read: Callable[[list[Request]], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Group:
    """Requests that are like `asked` in all but prompt, negative and seed, and what they are drawn with.

    pipeline: dressed for them. steered: conditions beside the controls. dress: the pipeline for other requests.
    """

    asked: Request
    pipeline: Pipeline
    rule: Guidance | None
    refiner: Pipeline | None
    upscaler: Upscaler
    steered: Callable[..., tuple[Condition, Condition]]
    dress: Callable[[Sequence[AddOn], Request], Pipeline]

    def guidance(self, asked: Request, by_rule: bool = True) -> Guidance | float:
        if by_rule and self.rule is not None:
            return self.rule
        return SCALE if asked.scale is None else asked.scale

    def ready(self) -> Callable[..., Job]:
        """What makes a job of some of them."""
        if self.asked.upscale is None:
            return self._drawn()
        return self._larger(InTiles.read(self.asked.upscale), None if self.asked.start is not None else self._drawn())

    def _drawn(self) -> Callable[..., Job]:
        """Jobs of one pass, or of two."""
        pipeline, sigmas = self.pipeline, None if self.asked.sigmas is None else torch.tensor(self.asked.sigmas)
        start = partial(begin, pipeline, self.asked, self.asked.schedule, self.asked.steps, sigmas=sigmas)
        begun = start(self.asked.width, self.asked.height)
        asked, first, larger = _sizes(pipeline, self.asked, begun.size)
        begun = begun if first == begun.size else start(*first)
        once = self._pass(asked, pipeline, begun.sigmas, begun.drawn(pipeline.vae.factor), begun.part,
                          from_text=asked.mask is None and not asked.extend, first=asked.hires is not None)
        again = None if asked.hires is None else self._second(asked, larger)
        kept = {name: getattr(asked, name) for name in NO_SECOND}

        def ready(batch: list[Request], **shown: Any) -> Job:
            told: dict[str, Any] = {**once.read(batch), **asked.shown, **asked.of_method, **shown}
            call = partial(draw, once.pipeline, guidance=self.guidance(asked), sampler=asked.sampler, start=begun,
                           seeds=[r.seed for r in batch], variation=asked.variation,
                           variation_seed=asked.variation_seed, hires=None if again is None else again(batch), **told)
            return Job(self._known(batch, width=begun.size[0], height=begun.size[1], **kept), call)

        return ready

    def _second(self, asked: Request, size: Size) -> Callable[[list[Request]], Hires]:
        """What makes of a batch its second pass."""
        later = asked.second_pass()
        pipeline = self.dress(later.add_ons, later)
        how = Hires(size, Enlargement.read(asked.hires).strength, self.upscaler, later.sampler, later.schedule,
                    later.steps, self.guidance(later, by_rule=asked.hires_scale is None))
        own = self._pass(later, pipeline, how.sigmas(pipeline, later.schedule, later.steps), size)
        return lambda batch: replace(how, **own.read([r.second_pass() for r in batch]),
                                     network=lambda _: own.pipeline.unet)

    def _larger(self, how: InTiles, first: Callable[..., Job] | None) -> Callable[..., Job]:
        """Jobs of pictures that are enlarged in tiles: the start picture, or what `first` draws. A tile has the model's
        own size, so what is for larger ones does not reach it."""
        own, pipeline = replace(self.asked, tile="", hidiffusion=False, deep_shrink=False), self.pipeline
        sigmas = sigmas_by_strength(own.schedule, own.steps, pipeline.denoiser(), how.strength, "comfyui")
        each = self._pass(own, pipeline, sigmas, (pipeline.size, pipeline.size))
        upscaler = upscaler_of(self.upscaler, of_pictures=True)

        def ready(batch: list[Request], **shown: Any) -> Job:
            start = None if own.start is None else read_picture(own.start)[0]
            job = Job(self._known(batch), list) if first is None else first(batch, **shown)

            def larger() -> list[Image.Image]:
                pictures = job.draw() if start is None else [start] * len(batch)
                told: dict[str, Any] = {**own.of_method, **shown}
                return [upscale(each.pipeline, picture, **each.read([r]), scale=how.scale, strength=how.strength,
                                upscaler=upscaler, schedule=own.schedule, steps=own.steps, seed=r.seed,
                                guidance=self.guidance(own), sampler=own.sampler, **told)
                        for picture, r in zip(pictures, batch, strict=True)]

            return Job(job.requests, larger)

        return ready

    def _pass(self, asked: Request, pipeline: Pipeline, sigmas: Tensor, size: Size,
              part: Callable[[Image.Image], Image.Image] = lambda picture: picture, **how: bool) -> Pass:
        """One pass over these noise levels, of pictures of this size; the refiner is as seamless, and as changed inside
        and around, as the pipeline."""
        begins, levels = float(sigmas[0]), sigmas.tolist() if asked.syntax else None
        system = asked.changed(pipeline, *size, begins=begins, **how)
        read = reader(system, asked, levels)

        def conditions(batch: list[Request]) -> dict[str, Any]:
            cond, uncond = self.steered(*read(batch), part=part)
            return {"cond": cond, "uncond": uncond}

        if self.refiner is None:
            return Pass(system, conditions)
        second = asked.changed(self.refiner.seamless() if asked.tiling else self.refiner, *size, begins=begins,
                               first=True)
        own = replace(asked, mode="clip", negative_mode=None) if second.tsc is None else asked
        read_again = reader(second, own, levels)
        return Pass(system, lambda batch: {**conditions(batch), "refiner": Refiner(
            second, *read_again(batch), at=asked.refiner_at)})

    def _known(self, batch: list[Request], **found: Any) -> list[Request]:
        """The requests with what is known once they are drawn."""
        return [replace(r, model=self.pipeline.name, version=VERSION, hashes=self.asked.hashes,
                        dtype=str(self.pipeline.dtype).removeprefix("torch."), **found) for r in batch]


def _sizes(pipeline: Pipeline, asked: Request, given: Size) -> tuple[Request, Size, Size]:
    """The request with the size of its second pass, and the sizes of both; without one where the first is as large."""
    if asked.hires is None:
        return asked, given, given
    how = Enlargement.read(asked.hires)
    first, larger = how.sizes(given, picture_size(pipeline, None, None), pipeline.vae.factor)
    check_multiples(*larger, pipeline.vae.factor)
    if how.scale is None and how.size is None:
        own = NO_SECOND if first == larger else {"hires": str(replace(how, size=larger))}
        asked = replace(asked, **own)
    return asked, first, larger
