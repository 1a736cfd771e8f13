"""Prompts to pictures: text encoders, denoiser, guidance, sampler and decoder put together."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from operator import index
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ella_kd.conditioning import ELLA, Conditioning, Constant
from ella_kd.denoiser import LDMDenoiser
from ella_kd.guidance import CFGDenoiser
from ella_kd.images import Picture, Settings
from ella_kd.models.text import TextFeatures
from ella_kd.pipeline import Pipeline
from ella_kd.samplers import get_sampler, get_schedule, randn

Mode = Literal["flexible", "fixed", "plain"]
FIXED_LENGTH = 128  # the T5 tokens that ELLA was trained on, padding included


@torch.no_grad()
def generate(
    pipeline: Pipeline,
    prompts: str | Sequence[str],
    *,
    negative: str = "",
    mode: Mode = "flexible",
    sampler: str = "dpmpp_2m",
    schedule: str = "karras",
    steps: int = 20,
    scale: float = 7.0,
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
    padded or cut, as it was trained; "plain", CLIP and no ELLA. sampler, schedule: names in `ella_kd.samplers.SAMPLERS`
    and `SCHEDULES`. scale: of classifier-free guidance; lambda for a sampler in `_cfg_pp`.
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
    width, height = (pipeline.size if side is None else side for side in (width, height))
    for name, number in {"steps": steps, "count": count, "batch_size": batch_size, "width": width,
                         "height": height}.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}")
    multiple = pipeline.vae.factor
    if width % multiple or height % multiple:
        raise ValueError(f"width and height must be multiples of {multiple} for this model, got {width}x{height}: "
                         f"try {_nearest(width, multiple)}x{_nearest(height, multiple)}")
    sample, make_sigmas = get_sampler(sampler).function, get_schedule(schedule).sigmas
    encode = encoder(pipeline, mode)

    repeated = [prompt for prompt in prompts for _ in range(count)]
    settings = [
        Settings(prompt, negative, mode, sampler, schedule, steps, float(scale), seed, width, height, pipeline.name,
                 version("ella-kd"))
        for prompt, seed in zip(repeated, _seeds(seeds, len(prompts), count), strict=True)
    ]
    denoiser = CFGDenoiser(LDMDenoiser(pipeline.unet, pipeline.noise_schedule))
    sigmas = make_sigmas(steps, denoiser).to(pipeline.device)
    uncond = encode([negative])
    shape = (pipeline.unet.config.out_channels, height // pipeline.vae.factor, width // pipeline.vae.factor)

    pictures: list[Picture] = []
    batches = [settings[i : i + batch_size] for i in range(0, len(settings), batch_size)]
    for batch in tqdm(batches, unit="batch", disable=not progress or len(batches) == 1):
        row_seeds = [s.seed for s in batch]
        noise = randn((len(batch), *shape), row_seeds, device=pipeline.device)
        latents = sample(
            denoiser,
            noise * sigmas[0],
            sigmas,
            extra_args={"cond": encode([s.prompt for s in batch]), "uncond": uncond, "cond_scale": scale},
            callback=callback,
            disable=not progress or len(batches) > 1,
            seeds=row_seeds,
        )
        images = to_images(pipeline.vae.decode(latents.to(pipeline.vae.dtype)))
        pictures += [Picture(image, s) for image, s in zip(images, batch, strict=True)]
    return pictures


def encoder(pipeline: Pipeline, mode: Mode) -> Callable[[Sequence[str]], Conditioning]:
    """The function that turns prompts into a conditioning of one row each, in a mode of `generate`.

    A prompt that comes more than once is encoded once. Raises ValueError if the pipeline lacks the part the mode needs.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}: choose {', '.join(get_args(Mode))}")
    clip, tsc, t5 = pipeline.clip, pipeline.tsc, pipeline.t5

    def distinct(prompts: Sequence[str]) -> tuple[list[str], Tensor]:
        texts = list(dict.fromkeys(prompts))
        return texts, torch.tensor([texts.index(prompt) for prompt in prompts], device=pipeline.device)

    if mode == "plain":
        if clip is None:
            raise ValueError('mode "plain" needs CLIP\'s tokenizer: load the pipeline with clip_tokenizer=<folder>')

        def encode_clip(prompts: Sequence[str]) -> Conditioning:
            texts, row = distinct(prompts)
            return Constant(TextFeatures(clip(texts).tokens[row]))

        return encode_clip
    if tsc is None or t5 is None:
        raise ValueError(f'mode "{mode}" needs ELLA: load the pipeline with tsc=<file> and t5=<folder>, or use '
                         'mode "plain"')

    def encode_ella(prompts: Sequence[str]) -> Conditioning:
        texts, row = distinct(prompts)
        return ELLA(tsc, t5(texts, max_length=FIXED_LENGTH if mode == "fixed" else None), row)

    return encode_ella


def to_images(decoded: Tensor) -> list[Image.Image]:
    """Decoded pictures [B, 3, H, W], about [-1, 1], as 8-bit images. Raises ValueError for NaN."""
    if not bool(decoded.isfinite().all()):
        raise ValueError("the autoencoder returned NaN or infinity; in float16 it may have overflowed: try float32")
    pixels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def _seeds(seeds: int | Sequence[int] | None, prompts: int, count: int) -> list[int]:
    if seeds is None:  # 32 bits: what torch's CPU generator uses of a seed, and what other tools can read back
        return torch.randint(0, 2**32, (prompts * count,)).tolist()
    if isinstance(seeds, int):
        return [seeds + i for _ in range(prompts) for i in range(count)]
    if len(seeds) != prompts * count:
        raise ValueError(f"seeds must be one number, or one per picture: expected {prompts * count}, got {len(seeds)}")
    return [index(seed) for seed in seeds]


def _nearest(side: int, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple
