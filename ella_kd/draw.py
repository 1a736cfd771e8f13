"""Encoded prompts to pictures: denoiser, guidance, sampler and decoder put together."""

from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ella_kd.denoiser import Condition, ELLADenoiser, LDMDenoiser
from ella_kd.guidance import CFGDenoiser, Guidance, GuidedDenoiser
from ella_kd.pipeline import Pipeline
from ella_kd.samplers import get_sampler, get_schedule, randn


@torch.no_grad()
def draw(
    pipeline: Pipeline,
    cond: Condition,
    *,
    uncond: Condition | None = None,
    guidance: Guidance | float = 7.0,
    sampler: str = "dpmpp_2m",
    schedule: str = "karras",
    steps: int = 20,
    width: int | None = None,
    height: int | None = None,
    seeds: int | Sequence[int] = 0,
    callback: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
    **conditions: Condition,
) -> list[Image.Image]:
    """One picture per seed, in one batch, from encoded prompts: `draw(sd, Regions(...), uncond=sd.encode(""))`.

    cond, uncond, and other conditions by the names the rule asks for: conditionings (`pipeline.encode(prompts)`), T5
    features, or compositions, each of one row or of one per seed. guidance: a rule, or the scale of classifier-free
    guidance (lambda for a sampler in `_cfg_pp`). The rest is as in `generate`, which reads prompts and keeps settings.
    Raises ValueError or TypeError for an argument that cannot be met, and ValueError if a network returns NaN.
    """
    width, height = picture_size(pipeline, width, height)
    check_whole("steps", steps)
    sample, make_sigmas = get_sampler(sampler).function, get_schedule(schedule).sigmas
    rows = [index(seed) for seed in ([seeds] if isinstance(seeds, int) else seeds)]
    inner = (LDMDenoiser(pipeline.unet, pipeline.noise_schedule) if pipeline.tsc is None
             else ELLADenoiser(pipeline.unet, pipeline.tsc, pipeline.noise_schedule))
    extra_args: dict[str, Any] = {"cond": cond, "uncond": uncond, **conditions}
    if isinstance(guidance, Guidance):
        denoiser: GuidedDenoiser = GuidedDenoiser(inner, guidance)
    else:
        denoiser = CFGDenoiser(inner)
        extra_args["cond_scale"] = guidance
    sigmas = make_sigmas(steps, denoiser).to(pipeline.device)
    factor = pipeline.vae.factor
    noise = randn((len(rows), pipeline.unet.config.out_channels, height // factor, width // factor), rows,
                  device=pipeline.device)
    latents = sample(denoiser, noise * sigmas[0], sigmas, extra_args=extra_args, callback=callback,
                     disable=not progress, seeds=rows)
    return to_images(pipeline.vae.decode(latents.to(pipeline.vae.dtype)))


def to_images(decoded: Tensor) -> list[Image.Image]:
    """Decoded pictures [B, 3, H, W], about [-1, 1], as 8-bit images. Raises ValueError for NaN."""
    if not bool(decoded.isfinite().all()):
        raise ValueError("the autoencoder returned NaN or infinity; in float16 it may have overflowed: try float32")
    pixels = ((decoded.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def picture_size(pipeline: Pipeline, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height in pixels, the model's own where they are None. ValueError for what the decoder cannot do."""
    width, height = (pipeline.size if side is None else side for side in (width, height))
    check_whole("width", width)
    check_whole("height", height)
    multiple = pipeline.vae.factor
    if width % multiple or height % multiple:
        near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (width, height))
        raise ValueError(f"width and height must be multiples of {multiple} for this model, got {width}x{height}: "
                         f"try {near}")
    return width, height


def check_whole(name: str, number: object) -> None:
    """ValueError unless it is a whole number of at least 1."""
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}")
