"""Prompts to pictures: what a prompt may say, which picture gets which seed, and the request each one keeps."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ella_kd.addon_words import AddOn
from ella_kd.addons import AddOns
from ella_kd.denoiser import Condition
from ella_kd.drawing import (
    begin_from,
    check_multiples,
    draw,
    innermost_scale,
    picture_size,
    refuse_unknown,
    seed_rows,
    several,
    small_of,
)
from ella_kd.encoding import reader, weights
from ella_kd.guidance import Guidance
from ella_kd.guidance.text import parse
from ella_kd.images import Picture
from ella_kd.pictures.hires import Hires
from ella_kd.pictures.hires_options import NO_SECOND, Enlargement, InTiles, Size
from ella_kd.pictures.inversion import load_latents
from ella_kd.pictures.reading import read_picture
from ella_kd.pictures.start import sigmas_by_strength
from ella_kd.pictures.upscale import upscale
from ella_kd.pictures.upscalers import enlarger
from ella_kd.pipeline import Pipeline
from ella_kd.placement import Placement
from ella_kd.prompts import check_wildcards, expand_wildcards
from ella_kd.refining import Refiner
from ella_kd.request import SCALE, VERSION, Mode, Request, whole
from ella_kd.samplers import get_schedule

OTHER_WORDS = {"cfg_scale": "scale", "cond_scale": "scale", "guidance_scale": "scale", "num_inference_steps": "steps",
               "uncond": "negative"}


def generate(
    pipeline: Pipeline,
    prompts: str | Sequence[str],
    *,
    negative: str | Sequence[str] = Request.negative,
    mode: Mode = Request.mode,
    negative_mode: Mode | None = Request.negative_mode,
    tags: str | None = Request.tags,
    syntax: bool = Request.syntax,
    wildcards: str | Path | None = None,
    models_dir: str | Path | AddOns | None = None,
    clip_skip: int = Request.clip_skip,
    tiling: bool = Request.tiling,
    sampler: str = Request.sampler,
    schedule: str = Request.schedule,
    steps: int = Request.steps,
    scale: float = SCALE,
    guidance: Guidance | str | None = None,
    width: int | None = Request.width,
    height: int | None = Request.height,
    seeds: int | Sequence[int] | None = None,
    count: int = 1,
    batch_size: int = 8,
    refiner: Pipeline | str | Path | None = None,
    refiner_at: float = Request.refiner_at,
    callback: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
    **picture: Any,
) -> list[Picture]:
    """Draw `count` pictures of every prompt, prompt by prompt.

    mode: how the text reaches the UNet: "flexible", ELLA on the prompt's own T5 tokens; "fixed", ELLA on 128 of them,
    padded or cut, as it was trained; "clip", CLIP and no ELLA. negative: one for all prompts, or a sequence of one for
    each. negative_mode: how it is read, if not as the prompt ("clip": ELLA for the prompt alone). tags: a text for CLIP
    whose tokens follow ELLA's (trigger words, styles). syntax: read `(phrase:1.3)`, `[phrase]`, `[from:to:when]` and
    `[a|b]` in every text, and `AND` in prompts, as A1111's web UI does (`ella_kd.models.emphasis`, `.prompt_editing`).
    wildcards: a folder of text files; `__name__` in a prompt becomes a line of name.txt, chosen by the picture's seed.
    clip_skip: the layer of CLIP, 1 the one that the model was trained with, 2 that before. tiling: a texture that meets
    itself at its edges.
    sampler, schedule: names in `ella_kd.samplers.SAMPLERS` and `SCHEDULES`. scale: of classifier-free guidance; lambda
    for a sampler in `_cfg_pp`. guidance: a rule in its place, `Rescale(CFG(7), 0.7)`, or its text.
    width, height: pixels; by default the size the model was trained on. seeds: a number s gives every prompt the seeds
    s, s + 1, ...; a sequence names one per picture; None draws them from torch's global generator. A picture depends on
    its own seed, not on those it is drawn with (to one of 255 grey levels in fp32 and fp16, three in bf16): batch_size,
    the pictures drawn at once, is a matter of memory.
    refiner: another system, or its file, that takes over when the share refiner_at of the timesteps is done, with the
    same prompts read by its own encoders (`ella_kd.refining.Refiner`); its latents must be of the same family.
    callback: called by the sampler at every step, as in k-diffusion. progress: show a bar.
    lora=["style.safetensors:0.8"], embedding, control=["canny.safetensors:edges.png:0.8"] and image_prompt, in picture:
    add-ons, as `ella_kd.addon_words` spells them; `<lora:style:0.8>` in a prompt. models_dir: the folder where their
    names are looked up (`ella_kd.models.files.folders`), or `AddOns(folder)`, whose files later calls need not read.
    freeu, tome=0.5, hidiffusion, deep_shrink, tile="512:64": what changes in the UNet and around it
    (`ella_kd.inside.FromInside`).
    hires="2:0.5", in picture: a second pass at strength 0.5 over the picture enlarged twice, width and height being the
    first one's; ":0.5" where they are the picture's. hires_upscaler, hires_steps and others: the fields of
    `ella_kd.pictures.hires_options.FromHires`.
    picture: the fields of `ella_kd.pictures.options.FromPicture`. start="room.jpg" (or a PIL image) is drawn over as
    far as strength says, 0.6, or where mask="lamp.png" is white; extend="left=64" draws on beyond its sides;
    strength_map, fill, crop_to_mask and others. eta, s_noise, s_churn, sigmas, variation, variation_seed: the noise.

    Raises ValueError or TypeError for an argument that cannot be met (an unknown name comes with the nearest ones), and
    ValueError if a network returns NaN.
    """
    known = [each.name for each in fields(Request) if each.kw_only]
    refuse_unknown(generate, {name: picture[name] for name in picture if name not in known}, OTHER_WORDS, known)
    rule = parse(guidance) if isinstance(guidance, str) else guidance
    found = rows(prompts, negative, seeds, whole("count", count), wildcards)
    second = refiner if isinstance(refiner, Pipeline) else None
    name = None if refiner is None else str(refiner) if second is None else second.name or "a refiner that is no file"
    asked = Request(found[0][0], "", mode, sampler, schedule, steps, scale if rule is None else innermost_scale(rule),
                    width=width, height=height, guidance="" if rule is None else repr(rule),
                    negative_mode=negative_mode, tags=tags, syntax=syntax, clip_skip=clip_skip,
                    refiner=name, refiner_at=refiner_at, tiling=tiling, **picture)
    requests = [replace(asked, prompt=prompt, negative=negative, seed=seed) for prompt, negative, seed in found]
    shelf = models_dir if isinstance(models_dir, AddOns) else AddOns(models_dir)
    for request in {each.prompt: each for each in requests}.values():  # before anything is drawn
        shelf.check(request.add_ons, request.hashes)
    pictures: list[Picture] = []
    with tqdm(total=len(requests), unit="picture", disable=not progress or len(requests) <= batch_size) as bar:
        for job in jobs(pipeline, requests, guidance=rule, refiner=second, models_dir=shelf, batch_size=batch_size,
                        callback=callback, progress=progress):
            pictures += map(Picture, job.draw(), job.requests)
            bar.update(len(job.requests))
    return pictures


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
        if second is not None and add_ons:
            warnings.warn(f"the refiner draws without the add-ons: {', '.join(map(str, add_ons))}", stacklevel=3)
        ready = _ready(dressed, asked, guidance or (parse(asked.guidance) if asked.guidance else None), second,
                       partial(shelf.steered, pipeline, add_ons), dress)
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
           dressed: Callable[[Sequence[AddOn], Request], Pipeline]) -> Callable[..., Job]:
    """What makes a job of requests that are like `asked` in all but prompt, negative and seed."""
    guidance = rule if rule is not None else SCALE if asked.scale is None else asked.scale
    sigmas = None if asked.sigmas is None else torch.tensor(asked.sigmas)
    latents: torch.Tensor | None = None
    size: dict[str, Any]
    more: dict[str, Any] = {"variation": asked.variation, "variation_seed": asked.variation_seed, **asked.of_method,
                            **asked.shown}
    larger_by = None if asked.upscale is None else InTiles.read(asked.upscale)
    if larger_by is not None and asked.start is not None:
        return _in_tiles(pipeline, asked, guidance, larger_by, steered, None)
    small = small_of(pipeline, asked)
    if small is not None:
        width, height = (side * pipeline.vae.factor for side in small.size)
        if (asked.width or width, asked.height or height) != (width, height):
            raise ValueError(f"the x4 upscaler draws {width}x{height} of a picture of {small.width}x{small.height}: "
                             "leave out width and height")
        sigmas = get_schedule(asked.schedule).sigmas(asked.steps, pipeline.denoiser()) if sigmas is None else sigmas
        size = {"start": small, "noise_level": asked.noise_level}
    elif asked.start is None:
        width, height = picture_size(pipeline, asked.width, asked.height)
        sigmas = get_schedule(asked.schedule).sigmas(asked.steps, pipeline.denoiser()) if sigmas is None else sigmas
        if asked.latents is not None:
            latents = load_latents(asked.latents, float(sigmas[0]))
            height, width = (side * pipeline.vae.factor for side in latents.shape[2:])
        asked, (width, height), larger = _sizes(pipeline, asked, (width, height))
        size = {"width": width, "height": height} if latents is None else {}
    else:
        begun = begin_from(pipeline, asked, asked.schedule, asked.steps, asked.width, asked.height, sigmas)
        (width, height), sigmas, size = begun.canvas.size, begun.sigmas, {}
        more["start"], steered = begun, partial(steered, part=begun.canvas.part)
    drawn = (width, height) if asked.start is None or small is not None else begun.canvas.image.size
    plain = pipeline
    pipeline = asked.changed(pipeline, *drawn, from_text=asked.mask is None and not asked.extend,
                             first=asked.hires is not None)
    levels = sigmas.tolist() if asked.syntax else None
    read = reader(pipeline, asked, levels)
    own = replace(asked, mode="clip", negative_mode=None) if refiner is not None and refiner.tsc is None else asked
    read_again = None if refiner is None else reader(refiner, own, levels)
    again = None if asked.hires is None else _second(asked, rule, larger, steered, dressed)

    def ready(batch: list[Request], **shown: Any) -> Job:
        cond, uncond = steered(*read(batch))
        start: dict[str, Any] = {} if latents is None else {"latents": latents.expand(len(batch), -1, -1, -1)}
        if refiner is not None and read_again is not None:
            start["refiner"] = Refiner(refiner, *read_again(batch), at=asked.refiner_at)
        if again is not None:
            start["hires"] = again(batch)
        call = partial(draw, pipeline, cond, uncond=uncond, guidance=guidance, sampler=asked.sampler, sigmas=sigmas,
                       seeds=[r.seed for r in batch], **size, **more, **start, **shown)
        found = {"width": width, "height": height, "hashes": asked.hashes,
                 **{name: getattr(asked, name) for name in NO_SECOND}}
        return Job([replace(r, **found, model=pipeline.name, version=VERSION,
                            dtype=str(pipeline.dtype).removeprefix("torch.")) for r in batch], call)

    return ready if larger_by is None else _in_tiles(plain, asked, guidance, larger_by, steered, ready)


def _in_tiles(pipeline: Pipeline, asked: Request, guidance: Guidance | float, how: InTiles,
              steered: Callable[..., tuple[Condition, Condition]],
              first: Callable[..., Job] | None) -> Callable[..., Job]:
    """What makes a job of requests that are enlarged in tiles: the start picture, or what `first` draws."""
    sigmas = sigmas_by_strength(asked.schedule, asked.steps, pipeline.denoiser(), how.strength, "comfyui")
    read = reader(pipeline, asked, sigmas.tolist() if asked.syntax else None)
    enlarger(asked.hires_upscaler)  # before anything is drawn

    def ready(batch: list[Request], **shown: Any) -> Job:
        start = None if asked.start is None else read_picture(asked.start)[0]
        job = Job([replace(r, model=pipeline.name, version=VERSION, hashes=asked.hashes, dtype=str(
            pipeline.dtype).removeprefix("torch.")) for r in batch], list) if first is None else first(batch, **shown)

        how_to: dict[str, Any] = {**asked.of_method, **shown}

        def larger() -> list[Image.Image]:
            pictures = job.draw() if start is None else [start] * len(batch)
            found = []
            for picture, r in zip(pictures, batch, strict=True):
                cond, uncond = steered(*read([r]))
                found.append(upscale(pipeline, picture, cond, uncond=uncond, scale=how.scale, strength=how.strength,
                                     upscaler=asked.hires_upscaler, schedule=asked.schedule, steps=asked.steps,
                                     seed=r.seed, guidance=guidance, sampler=asked.sampler, **how_to))
            return found

        return Job(job.requests, larger)

    return ready


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


def _second(asked: Request, rule: Guidance | None, size: Size, steered: Callable[..., tuple[Condition, Condition]],
            dressed: Callable[[Sequence[AddOn], Request], Pipeline]) -> Callable[[list[Request]], Hires]:
    """What makes of a batch its second pass, whose prompts are read for its own noise levels."""
    later = asked.second_pass()
    pipeline = later.changed(dressed(later.add_ons, later), *size)
    own = rule if asked.hires_scale is None and rule is not None else SCALE if later.scale is None else later.scale
    how = Hires(size, Enlargement.read(asked.hires).strength, asked.hires_upscaler, later.sampler, later.schedule,
                later.steps, own, network=lambda _: pipeline.unet)
    levels = how.sigmas(pipeline, later.schedule, later.steps).tolist() if later.syntax else None
    read = reader(pipeline, later, levels)

    def again(batch: list[Request]) -> Hires:
        cond, uncond = steered(*read([r.second_pass() for r in batch]))
        return replace(how, cond=cond, uncond=uncond)

    return again


def rows(prompts: str | Sequence[str], negative: str | Sequence[str], seeds: int | Sequence[int] | None, count: int,
         wildcards: str | Path | None) -> list[tuple[str, str, int]]:
    """Prompt, negative and seed of every picture, wildcards chosen. ValueError for counts that differ."""
    prompts = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts must be a string or a sequence of strings, at least one, got {prompts[:3]}")
    if not isinstance(negative, Iterable):
        raise TypeError(f"negative must be a string, or one per prompt, got {negative!r}")
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if len(negatives) != len(prompts):
        raise ValueError(f"negative must be one string, or one per prompt: expected {len(prompts)}, got "
                         f"{len(negatives)}")
    numbers = _seeds(seeds, len(prompts), count)
    if wildcards is not None:
        for prompt in prompts:
            check_wildcards(prompt, wildcards)
    found = [(prompt, negative) for prompt, negative in zip(prompts, negatives) for _ in range(count)]
    return [(prompt if wildcards is None else expand_wildcards(prompt, wildcards, seed), negative, seed)
            for (prompt, negative), seed in zip(found, numbers, strict=True)]


def _seeds(seeds: int | Sequence[int] | None, prompts: int, count: int) -> list[int]:
    if seeds is None:  # 32 bits: what torch's CPU generator uses of a seed, and what other tools can read back
        return torch.randint(0, 2**32, (prompts * count,)).tolist()
    found = seed_rows(seeds) if several(seeds) else seed_rows(seeds, count) * prompts
    if len(found) != prompts * count:
        raise ValueError(f"seeds must be one number, or one per picture: expected {prompts * count}, got {len(found)}")
    return found
