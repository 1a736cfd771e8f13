"""Where a run starts: what is drawn on, its first x and noise levels, what a network sees of it, and what comes of it.

`Blank` is noise alone; `beginning.Beginning` is a picture that is drawn over, `x4.Small` one that the x4 upscaler
enlarges. All that `draw` has to know of them is here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ella_kd.conditioning import Conditioning
from ella_kd.denoiser import Condition, Denoiser
from ella_kd.models.files.kinds import RELIT
from ella_kd.models.network import as_network
from ella_kd.pictures.beside import has_channels, seen_beside
from ella_kd.pictures.canvas import Canvas
from ella_kd.pictures.reading import Source
from ella_kd.pictures.segments import sample_in_segments
from ella_kd.samplers import get_sampler
from ella_kd.samplers.registry import RANGE_SAMPLERS

if TYPE_CHECKING:
    from ella_kd.pipeline import Pipeline

Size = tuple[int, int]  # width, height


class Start:
    """The start of a run, of any number of rows. shape: C, h, w of the latents that are drawn. size: width and height
    in pixels that were asked for, or found. sigmas: the noise levels [n + 1]. latents: x at sigmas[0], [B or 1, C, h,
    w], where it is given as it is. canvas, picture, repaint: of a picture that is drawn over (`Beginning`)."""

    shape: tuple[int, int, int]
    size: Size
    sigmas: Tensor
    latents: Tensor | None = None
    canvas: Canvas | None = None
    picture: Tensor | None = None
    repaint: Tensor | None = None

    def drawn(self, factor: int) -> Size:
        """Width and height in pixels of what is drawn, factor to a latent."""
        return self.shape[2] * factor, self.shape[1] * factor

    def part(self, picture: Image.Image) -> Image.Image:
        """What is drawn on of another picture of the whole."""
        return picture

    def x(self, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """The first x, of noise [B, C, h, w] of unit variance."""
        return noise * self.sigmas[0].to(noise.device)

    def seen(self, pipeline: "Pipeline", lift: Callable[[Condition], Conditioning],
             conditions: Mapping[str, Condition | None], shown: Sequence[Source],
             seeds: Sequence[int]) -> Mapping[str, Condition | None]:
        """The conditions with what the network was trained to see beside x, unless they have channels of their own."""
        beside = as_network(pipeline.unet).in_channels - self.shape[0]
        if beside and not any(map(has_channels, conditions.values())):
            if pipeline.purpose == RELIT and not shown:
                raise ValueError("this network relights a picture: give it as foreground, best transparent around the "
                                 "thing")
            with pipeline.at_work("vae"):
                return seen_beside(beside, self, pipeline.vae, lift, conditions, shown)
        if shown and not beside:
            raise ValueError("a foreground is for a network that relights: load the pipeline with IC-Light's file, "
                             "offset=")
        return conditions

    def unkept(self) -> "Start":
        """The same for a network that sees what is to be kept: all of it is drawn."""
        return self

    def kept(self, model: Denoiser, device: torch.device) -> Denoiser:
        """The denoiser that lets stay what is to be kept."""
        return model

    def method(self, sampler: str, sigmas: Tensor, fresh: Sequence[int] = (),
               repeats: int = 1) -> Callable[..., Tensor]:
        """The sampler, in segments where steps are repeated, or begin without what it remembers (fresh)."""
        row = get_sampler(sampler)
        if repeats == 1 and (not fresh or row.name in RANGE_SAMPLERS):
            return row.function
        return partial(sample_in_segments, sampler, repeats=repeats, fresh=fresh)

    def back(self, drawn: Image.Image) -> Image.Image:
        """What comes of a picture that was drawn."""
        return drawn


@dataclass(frozen=True, eq=False)
class Blank(Start):
    """Noise alone, or latents that are given. shape: C, h, w of the latents; size: width and height in pixels."""

    shape: tuple[int, int, int]
    size: Size
    sigmas: Tensor
    latents: Tensor | None = None
