"""SD upscale: a picture is enlarged and drawn over in overlapping tiles of the model's own size, each with its prompt.

Every tile is a run of its own, so any size fits in the memory of one batch of tiles. They begin from one field of
noise, which overlapping tiles share, and are faded into one another along their overlaps.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from ella_kd.denoiser import Condition
from ella_kd.drawing import draw
from ella_kd.models.tiled import Tiles
from ella_kd.pictures.hires_options import IN_TILES, Size, Upscaler, check_scale
from ella_kd.pictures.segments import other_seeds
from ella_kd.pictures.start import sigmas_by_strength
from ella_kd.pictures.upscalers import enlarged, upscaler_of
from ella_kd.pipeline import Pipeline
from ella_kd.request import Request, seed_number, whole
from ella_kd.samplers import randn
from ella_kd.starting import check_multiples

OVERLAP = 8  # latents: 64 px of Stable Diffusion
STREAM = 2**20 + 1  # of the seeds


@torch.no_grad()
def upscale(
    pipeline: Pipeline,
    picture: Image.Image,
    cond: Condition | Callable[[list[Image.Image]], Condition],
    *,
    scale: float = 2.0,
    strength: float = IN_TILES,
    upscaler: Upscaler = "lanczos",
    tile: int | Size | None = None,
    overlap: int | None = None,
    schedule: str = Request.schedule,
    steps: int = Request.steps,
    seed: int = 0,
    batch_size: int = 4,
    **more: Any,
) -> Image.Image:
    """The picture so many times as large: `upscale(sd, picture, sd.encode("a castle"), uncond=sd.encode(""), scale=2)`.

    cond: for all tiles, or what makes of some tiles' pictures a condition of one row each, `lambda tiles:
    sd.encode([caption(tile) for tile in tiles])`. strength: as of hires fix, see `sigmas_by_strength`. upscaler: see
    `enlarged`. tile: width and height in pixels, the model's own size by default; overlap: at least so many pixels.
    more: as of `draw`, uncond, guidance, sampler among it; a picture depends on the seed and not on batch_size.
    Raises what `draw` raises, and ValueError for sizes that no latents have.
    """
    check_scale("upscale", scale)
    larger, batch_size = upscaler_of(upscaler, of_pictures=True), whole("batch_size", batch_size)
    factor, noise_seed = pipeline.vae.factor, other_seeds([seed_number(seed)], STREAM, 0)[0]
    width, height = (max(1, round(side * scale / factor)) * factor for side in picture.size)
    across, down = tile if isinstance(tile, tuple) else (pipeline.size if tile is None else tile,) * 2
    sides = whole("a tile's width", across), whole("a tile's height", down)
    apart = min(OVERLAP * factor, min(sides) // 4 // factor * factor) if overlap is None else overlap
    check_multiples(*sides, factor)
    check_multiples(apart, apart, factor)
    cells = (sides[1] // factor, sides[0] // factor)
    if not 0 <= apart < min(sides):
        raise ValueError(f"tiles of {sides[0]}x{sides[1]} px overlap by less than a side, got {apart}")
    boxes = Tiles(cells, (apart // factor,) * 2).boxes(height // factor, width // factor)
    large = enlarged(picture.convert("RGB"), (width, height), larger, pipeline.device)
    sigmas = sigmas_by_strength(schedule, steps, pipeline.denoiser(), strength, "comfyui")
    noise = randn((1, pipeline.vae.config.latent_channels, height // factor, width // factor), [noise_seed])
    total = np.zeros((height, width, 1))
    found = np.zeros((height, width, 3))
    for first in range(0, len(boxes), batch_size):
        numbers = range(len(boxes))[first:first + batch_size]
        some = [boxes[k] for k in numbers]
        places = [tuple(factor * n for n in box) for box in some]
        tiles = [large.crop((left, top, left + w, top + h)) for top, left, h, w in places]
        with pipeline.at_work("vae"):
            z = torch.cat([pipeline.vae.encode(each) for each in tiles]).float().cpu()
        own = torch.cat([noise[..., top:top + h, left:left + w] for top, left, h, w in some])
        seen: Any = cond(tiles) if callable(cond) and not hasattr(cond, "rows") else cond
        drawn = draw(pipeline, seen, latents=z + own * float(sigmas[0]), sigmas=sigmas,
                     seeds=[other_seeds([noise_seed], STREAM, k + 1)[0] for k in numbers], **more)
        for image, (top, left, h, w) in zip(drawn, places, strict=True):
            weight = _ramp(h, apart)[:, None, None] * _ramp(w, apart)[None, :, None]
            found[top:top + h, left:left + w] += weight * np.asarray(image, dtype=np.float64)
            total[top:top + h, left:left + w] += weight
    return Image.fromarray((found / total).round().astype(np.uint8))


def _ramp(n: int, over: int) -> np.ndarray:
    """How much the places along a side of n count: ever less towards both ends, over so many."""
    return np.minimum(1.0, (np.minimum(np.arange(n), np.arange(n)[::-1]) + 0.5) / max(over, 0.5))
