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

    groups = groupby(requests, lambda r: (replace(r, prompt="", negative="", seed=0), r.add_ons,
                                          weights(r.text) if r.syntax else ()))
    for (asked, add_ons, _), group in groups:
        shelf.check(add_ons, asked.hashes)
        asked, dressed = replace(asked, hashes=shelf.hashes(add_ons)), dress(add_ons, asked)
        second = None if asked.refiner is None else refiner or load(asked.refiner)
        worn = [each for each in add_ons if each.place != "upscaler"]
        if second is not None and worn:
            warnings.warn(f"the refiner draws without the add-ons: {', '.join(map(str, worn))}", stacklevel=3)
        ready = _ready(dressed, asked, guidance or (parse(asked.guidance) if asked.guidance else None), second,
                       partial(shelf.steered, pipeline, add_ons), dress, shelf.upscaler(asked))
        left = iter(group)
        while batch := list(islice(left, size)):
            yield ready(batch, callback=callback, progress=progress)


def _loaded_beside(pipeline: Pipeline, file: str) -> Pipeline:
    """A refiner's file, where the pipeline is; a single file's CLIP reads with the pipeline's tokenizer."""
    clip = getattr(pipeline.clip, "first", pipeline.clip)
    folder = Path(getattr(getattr(clip, "tokenizer", None), "name_or_path", "") or "-")
    return Pipeline.load(file, clip_tokenizer=folder if folder.is_dir() and not Path(file).is_dir() else None,
                         placement=pipeline.placement or Placement(pipeline.device, pipeline.dtype))


def _ready(pipeline: Pipeline, asked: Request, rule: Guidance | None, refiner: Pipeline | None,
           steered: Callable[..., tuple[Condition, Condition]],
           dressed: Callable[[Sequence[AddOn], Request], Pipeline], upscaler: Upscaler) -> Callable[..., Job]:
    """What makes a job of requests that are like `asked` in all but prompt, negative and seed."""
    guidance = rule if rule is not None else SCALE if asked.scale is None else asked.scale
    sigmas = None if asked.sigmas is None else torch.tensor(asked.sigmas)
    larger_by = None if asked.upscale is None else InTiles.read(asked.upscale)
    if larger_by is not None and asked.start is not None:
        return _in_tiles(pipeline, asked, guidance, larger_by, steered, None, refiner, upscaler)
    begun = begin(pipeline, asked, asked.schedule, asked.steps, asked.width, asked.height, sigmas)
    asked, first, larger = _sizes(pipeline, asked, begun.size)
    if first != begun.size:
        begun = begin(pipeline, asked, asked.schedule, asked.steps, *first, sigmas)
    steered = partial(steered, part=begun.part)
    plain, (_, h, w), factor = pipeline, begun.shape, pipeline.vae.factor
    pipeline = asked.changed(pipeline, w * factor, h * factor, from_text=asked.mask is None and not asked.extend,
                             first=asked.hires is not None)
    read = reader(pipeline, asked, begun.sigmas.tolist() if asked.syntax else None)
    refined = _refined(refiner, asked, begun.sigmas, (w * factor, h * factor))
    again = None if asked.hires is None else _second(asked, rule, larger, steered, dressed, refiner, upscaler)

    def ready(batch: list[Request], **shown: Any) -> Job:
        cond, uncond = steered(*read(batch))
        more: dict[str, Any] = {**asked.of_method, **asked.shown, "refiner": refined(batch)}
        if again is not None:
            more["hires"] = again(batch)
        call = partial(draw, pipeline, cond, uncond=uncond, guidance=guidance, sampler=asked.sampler, start=begun,
                       seeds=[r.seed for r in batch], variation=asked.variation, variation_seed=asked.variation_seed,
                       **more, **shown)
        found = {"width": begun.size[0], "height": begun.size[1],
                 **{name: getattr(asked, name) for name in NO_SECOND}}
        return Job(drawn_by(pipeline, asked, batch, **found), call)

    if larger_by is None:
        return ready
    return _in_tiles(plain, asked, guidance, larger_by, steered, ready, refiner, upscaler)


def _in_tiles(pipeline: Pipeline, asked: Request, guidance: Guidance | float, how: InTiles,
              steered: Callable[..., tuple[Condition, Condition]], first: Callable[..., Job] | None,
              refiner: Pipeline | None, upscaler: Upscaler) -> Callable[..., Job]:
    """What makes a job of requests that are enlarged in tiles: the start picture, or what `first` draws. A tile has the
    model's own size, so what is for larger ones does not reach it."""
    sigmas = sigmas_by_strength(asked.schedule, asked.steps, pipeline.denoiser(), how.strength, "comfyui")
    size, own = (pipeline.size, pipeline.size), replace(asked, tile="", hidiffusion=False, deep_shrink=False)
    pipeline, refined = own.changed(pipeline, *size), _refined(refiner, own, sigmas, size)
    read = reader(pipeline, asked, sigmas.tolist() if asked.syntax else None)

    def ready(batch: list[Request], **shown: Any) -> Job:
        start = None if asked.start is None else read_picture(asked.start)[0]
        job = Job(drawn_by(pipeline, asked, batch), list) if first is None else first(batch, **shown)
        how_to: dict[str, Any] = {**asked.of_method, **shown}

        def larger() -> list[Image.Image]:
            pictures = job.draw() if start is None else [start] * len(batch)
            found = []
            for picture, r in zip(pictures, batch, strict=True):
                cond, uncond = steered(*read([r]))
                found.append(upscale(pipeline, picture, cond, uncond=uncond, scale=how.scale, strength=how.strength,
                                     upscaler=upscaler, schedule=asked.schedule, steps=asked.steps,
                                     seed=r.seed, guidance=guidance, sampler=asked.sampler, refiner=refined([r]),
                                     **how_to))
            return found

        return Job(job.requests, larger)

    return ready


def drawn_by(pipeline: Pipeline, asked: Request, batch: list[Request], **found: Any) -> list[Request]:
    """The requests with what is known once they are drawn."""
    return [replace(r, model=pipeline.name, version=VERSION, dtype=str(pipeline.dtype).removeprefix("torch."),
                    hashes=asked.hashes, **found) for r in batch]


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


def _refined(refiner: Pipeline | None, asked: Request, sigmas: Tensor,
             size: Size) -> Callable[[list[Request]], Refiner | None]:
    """What makes of a batch the refiner's part of a run over these noise levels: as seamless, as changed inside and
    around as the pipeline is, its prompts read for these levels."""
    if refiner is None:
        return lambda batch: None
    system = asked.changed(refiner.seamless() if asked.tiling else refiner, *size, first=True)
    own = replace(asked, mode="clip", negative_mode=None) if refiner.tsc is None else asked
    read = reader(system, own, sigmas.tolist() if asked.syntax else None)
    return lambda batch: Refiner(system, *read(batch), at=asked.refiner_at)


def _second(asked: Request, rule: Guidance | None, size: Size, steered: Callable[..., tuple[Condition, Condition]],
            dressed: Callable[[Sequence[AddOn], Request], Pipeline],
            refiner: Pipeline | None, upscaler: Upscaler) -> Callable[[list[Request]], Hires]:
    """What makes of a batch its second pass, whose prompts are read for its own noise levels."""
    later = asked.second_pass()
    pipeline = later.changed(dressed(later.add_ons, later), *size)
    own = rule if asked.hires_scale is None and rule is not None else SCALE if later.scale is None else later.scale
    how = Hires(size, Enlargement.read(asked.hires).strength, upscaler, later.sampler, later.schedule,
                later.steps, own, network=lambda _: pipeline.unet)
    sigmas = how.sigmas(pipeline, later.schedule, later.steps)
    read, refined = (reader(pipeline, later, sigmas.tolist() if later.syntax else None),
                     _refined(refiner, later, sigmas, size))

    def again(batch: list[Request]) -> Hires:
        own = [r.second_pass() for r in batch]
        cond, uncond = steered(*read(own))
        return replace(how, cond=cond, uncond=uncond, refiner=refined(own))

    return again
