"""Prompts to pictures: what a prompt may say, which picture gets which seed, and the request each one keeps."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ella_kd.addons import AddOns
from ella_kd.drawing import innermost_scale, refuse_unknown, seed_rows, several
from ella_kd.guidance import Guidance
from ella_kd.guidance.text import parse
from ella_kd.images import Picture
from ella_kd.jobs import jobs
from ella_kd.pipeline import Pipeline
from ella_kd.prompts import check_wildcards, expand_wildcards
from ella_kd.request import SCALE, Mode, Request, whole

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
    freeu, tome=0.5, hidiffusion, deep_shrink, tile="512:64", in picture: what changes in the UNet and around it;
    reuse="3:2": the UNet's deep features serve three steps, the answer about the negative prompt two
    (`ella_kd.inside.FromInside`).
    hires="2:0.5", in picture: a second pass at strength 0.5 over the picture enlarged twice, width and height being the
    first one's; ":0.5" where they are the picture's. upscale="tiles:2:0.3": the start picture, or what was drawn,
    enlarged twice and drawn over at strength 0.3 in tiles of the model's own size. hires_upscaler: what enlarges for
    both, a name, a network's file (a name in models_dir too) or a function of a PIL image. hires_steps and others: the
    fields of `ella_kd.pictures.hires_options.FromHires`. What goes with what:
    docs/how-to/big-pictures.md.
    picture: the fields of `ella_kd.pictures.options.FromPicture`. start="room.jpg" (or a PIL image) is drawn over as
    far as strength says, 0.6, or where mask="lamp.png" is white; extend="left=64" draws on beyond its sides;
    strength_map, fill, crop_to_mask and others. eta, s_noise, s_churn, sigmas, variation, variation_seed: the noise.

    Raises ValueError or TypeError for an argument that cannot be met (an unknown name comes with the nearest ones),
    FileNotFoundError for a file that is not there, and ValueError if a network returns NaN.
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
