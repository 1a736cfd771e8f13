"""Prompts to pictures: what a prompt may say, which picture gets which seed, and the settings each one keeps."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import groupby
from operator import index
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ella_kd.conditioning import And, Concat, Conditioning
from ella_kd.denoiser import Condition
from ella_kd.draw import check_whole, draw, picture_size
from ella_kd.guidance import Guidance
from ella_kd.images import Picture, Settings
from ella_kd.pipeline import Mode, Pipeline
from ella_kd.prompts import expand_wildcards, split_and
from ella_kd.samplers import get_sampler, get_schedule


def generate(
    pipeline: Pipeline,
    prompts: str | Sequence[str],
    *,
    negative: str = "",
    mode: Mode = "flexible",
    negative_mode: Mode | None = None,
    tags: str | None = None,
    syntax: bool = False,
    wildcards: str | Path | None = None,
    clip_skip: int = 1,
    sampler: str = "dpmpp_2m",
    schedule: str = "karras",
    steps: int = 20,
    scale: float = 7.0,
    guidance: Guidance | None = None,
    width: int | None = None,
    height: int | None = None,
    seeds: int | Sequence[int] | None = None,
    count: int = 1,
    batch_size: int = 8,
    callback: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> list[Picture]:
    """Draw `count` pictures of every prompt, prompt by prompt.

    mode: how the text reaches the UNet: "flexible", ELLA on the prompt's own T5 tokens; "fixed", ELLA on 128 of them,
    padded or cut, as it was trained; "plain", CLIP and no ELLA. negative_mode: the negative prompt's, if it differs
    ("plain": ELLA for the prompt alone). tags: a text for CLIP whose tokens follow ELLA's (trigger words, styles).
    syntax: read `(phrase:1.3)`, `[phrase]` and `AND` in prompts, the weights in tags and negative too. wildcards: a
    folder of text files; `__name__` in a prompt becomes a line of name.txt, chosen by the picture's seed. clip_skip:
    the layer of CLIP, counted from the last, 1.
    sampler, schedule: names in `ella_kd.samplers.SAMPLERS` and `SCHEDULES`. scale: of classifier-free guidance; lambda
    for a sampler in `_cfg_pp`. guidance: a rule in its place, `Rescale(CFG(7), 0.7)`.
    width, height: pixels; by default the size the model was trained on. seeds: a number s gives every prompt the seeds
    s, s + 1, ...; a sequence names one per picture; None draws them from torch's global generator. A picture depends on
    its own seed, not on those it is drawn with: batch_size, the pictures drawn at once, is a matter of memory.
    callback: called by the sampler at every step, as in k-diffusion. progress: show a bar.

    Raises ValueError or TypeError for an argument that cannot be met (an unknown name comes with the nearest ones), and
    ValueError if a network returns NaN.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts must be a string or a sequence of strings, at least one, got {prompts[:3]}")
    for name, number in {"steps": steps, "count": count, "batch_size": batch_size}.items():
        check_whole(name, number)
    width, height = picture_size(pipeline, width, height)
    get_sampler(sampler), get_schedule(schedule)

    def encode(texts: Sequence[str], mode: Mode, extra: str | None) -> Conditioning:
        encoded = pipeline.encode(texts, mode, weighted=syntax, clip_skip=clip_skip)
        if extra is None:
            return encoded
        return Concat(encoded, pipeline.encode(extra, "plain", weighted=syntax, clip_skip=clip_skip))

    drawn_prompts = [prompt for prompt in prompts for _ in range(count)]
    row_seeds = _seeds(seeds, len(prompts), count)
    if wildcards is not None:
        drawn_prompts = [expand_wildcards(prompt, wildcards, seed) for prompt, seed in zip(drawn_prompts, row_seeds)]
    settings = [
        Settings(prompt, negative, mode, sampler, schedule, steps, _scale(guidance, scale), seed, width, height,
                 pipeline.name, version("ella-kd"), "" if guidance is None else repr(guidance), negative_mode or mode,
                 tags, syntax, clip_skip)
        for prompt, seed in zip(drawn_prompts, row_seeds, strict=True)
    ]
    # ELLA's tokens of "" and CLIP's of "" stand against ELLA's and the tags': the same kinds on both sides.
    uncond = encode([negative], negative_mode or mode, "" if tags is not None and negative_mode is None else None)

    pictures: list[Picture] = []
    batches = [batch for _, group in groupby(settings, lambda s: _weights(s.prompt) if syntax else ())
               for batch in _chunks(list(group), batch_size)]
    for batch in tqdm(batches, unit="batch", disable=not progress or len(batches) == 1):
        images = draw(
            pipeline,
            _condition([s.prompt for s in batch], lambda texts: encode(texts, mode, tags), syntax),
            uncond=uncond,
            guidance=scale if guidance is None else guidance,
            sampler=sampler,
            schedule=schedule,
            steps=steps,
            width=width,
            height=height,
            seeds=[s.seed for s in batch],
            callback=callback,
            progress=progress and len(batches) == 1,
        )
        pictures += [Picture(image, s) for image, s in zip(images, batch, strict=True)]
    return pictures


def _condition(prompts: Sequence[str], encode: Callable[[Sequence[str]], Conditioning], syntax: bool) -> Condition:
    """Prompts of equal weights, one row each, as what they say: one conditioning, or the AND of several."""
    if not syntax:
        return encode(prompts)
    terms = list(zip(*(split_and(prompt) for prompt in prompts), strict=True))  # term by term, each of all the prompts
    if len(terms) == 1 and terms[0][0][1] == 1:
        return encode([text for text, _ in terms[0]])
    return And(*((encode([text for text, _ in term]), term[0][1]) for term in terms))


def _weights(prompt: str) -> tuple[float, ...]:
    return tuple(weight for _, weight in split_and(prompt))


def _chunks(settings: list[Settings], size: int) -> list[list[Settings]]:
    return [settings[i : i + size] for i in range(0, len(settings), size)]


def _scale(rule: Guidance | None, scale: float) -> float | None:
    """The scale that a picture's settings name: that of the innermost rule, if it is a number."""
    while rule is not None and isinstance(base := getattr(rule, "base", None), Guidance):
        rule = base
    found = scale if rule is None else getattr(rule, "scale", None)
    return float(found) if isinstance(found, (int, float)) else None


def _seeds(seeds: int | Sequence[int] | None, prompts: int, count: int) -> list[int]:
    if seeds is None:  # 32 bits: what torch's CPU generator uses of a seed, and what other tools can read back
        return torch.randint(0, 2**32, (prompts * count,)).tolist()
    if isinstance(seeds, int):
        return [seeds + i for _ in range(prompts) for i in range(count)]
    if len(seeds) != prompts * count:
        raise ValueError(f"seeds must be one number, or one per picture: expected {prompts * count}, got {len(seeds)}")
    return [index(seed) for seed in seeds]
