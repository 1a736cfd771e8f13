"""Pictures larger than a UNet was trained on, with a smaller middle where the noise is strong.

A change makes what lies deeper smaller, and the UNet brings it back to a skip's size where the two are joined; sigma
says when. `Inside(unet, *hidiffusion(unet, 128, 128))` is HiDiffusion for 1024 px, `Inside(unet, Shrink())` deep
shrink.
"""

import math
import zlib
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ella_kd.models.blocks import Attention, Downsample
from ella_kd.models.inside import Change, places_on
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule
from ella_kd.models.patches import Patch, SelfAttentionPatch
from ella_kd.models.unet import UNet

SD15 = NoiseSchedule.sd15()


def after(share: float, schedule: NoiseSchedule | EDMSchedule = SD15, begins: float = math.inf) -> float:
    """The sigma where this share of the timesteps is done, of a run that begins at a sigma; an EDM model's timesteps
    are logarithms of sigma, as ComfyUI's percents of it are."""
    t, end = (schedule.sigma_to_t(torch.tensor([sigma], dtype=torch.float64))
              for sigma in (min(begins, schedule.sigma_max), schedule.sigma_min))
    return float(schedule.t_to_sigma(t + share * (end - t)))


AFTER_35, AFTER_40, AFTER_70 = (after(share) for share in (0.35, 0.4, 0.7))  # 2.739, 2.280, 0.832


@dataclass(frozen=True)
class WiderStride(Change):
    """RAU-Net's downsampler (Zhang et al. 2023, arXiv 2311.17528): stride and dilation of its convolution are doubled.

    stage: of the input_blocks. What lies deeper then has the size that it has for a picture half as large, odd sizes
    rounded up. Raises ValueError for a stage that is no downsampler.
    """

    stage: int = 3
    _: KW_ONLY
    sigma_lo: float = AFTER_40

    def on(self, unet: UNet) -> "WiderStride":
        samplers = [n for n, block in enumerate(unet.input_blocks)
                    if any(isinstance(layer, Downsample) for layer in block.children())]
        if self.stage not in samplers:
            raise ValueError(f"input_blocks.{self.stage} of this UNet is no downsampler: choose from {samplers}")
        return self

    def wider(self, n: int) -> int:
        return 2 if n == self.stage else 1


@dataclass(frozen=True)
class Shrink(Change):
    """Deep shrink (kohya 2023; ComfyUI's PatchModelAddDownscale, its first choices): what leaves a stage gets smaller.

    stage: of the input_blocks. factor: by which, bicubic; pooled: by the mean of factor x factor pixels. skip: what is
    kept for the way up gets smaller too, so that one stage more of the way up is small. Raises ValueError for a stage
    that there is not, and for a factor below 1, or one that is not whole where it is pooled.
    """

    stage: int = 3
    factor: float = 2.0
    skip: bool = False
    pooled: bool = False
    _: KW_ONLY
    sigma_lo: float = AFTER_35

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.factor < math.inf or (self.pooled and self.factor != int(self.factor)):
            raise ValueError("Shrink makes features smaller by a factor of at least 1, a whole one if they are "
                             f"pooled, got {self.factor}")

    def on(self, unet: UNet) -> "Shrink":
        if not 0 <= self.stage < len(unet.input_blocks):
            raise ValueError(f"this UNet has the stages 0 to {len(unet.input_blocks) - 1}, got {self.stage}")
        return self

    def at(self, level: float) -> Change | None:
        return super().at(level) if self.factor != 1 else None

    def before_skip(self, n: int, x: Tensor) -> Tensor:
        return self._smaller(x) if self.skip and n == self.stage else x

    def after_skip(self, n: int, x: Tensor) -> Tensor:
        return self._smaller(x) if not self.skip and n == self.stage else x

    def _smaller(self, x: Tensor) -> Tensor:
        if self.pooled:
            return F.avg_pool2d(x, int(self.factor), ceil_mode=True)
        return F.interpolate(x, [max(1, round(side * (1 / self.factor))) for side in x.shape[2:]], mode="bicubic")


@dataclass(frozen=True)
class WindowAttention(Change):
    """HiDiffusion's MSW-MSA: self-attention within 2 x 2 windows, whatever the size, so for a quarter of the cost.

    The windows are moved by 0 to 3 quarters of their sides, around the edges; by how many, sigma, place and seed say
    (the published code draws it anew for each block and call: then the denoised is no function of x and sigma). places:
    the transformers, () for those of the finest level that has some. An odd side is made even, bicubic, and odd again,
    which costs quality. Raises ValueError for a place that there is not.
    """

    places: tuple[str, ...] = ()
    seed: int = 0
    first: int = 0  # quarters at the first place; each one after it has one more

    def on(self, unet: UNet) -> "WindowAttention":
        return replace(self, places=places_on(unet, self.places))

    def at(self, level: float) -> Change | None:
        drawn = zlib.crc32(np.float32(level).tobytes() + str(self.seed).encode())
        return replace(self, first=drawn % 4) if super().at(level) else None

    @property
    def patches(self) -> tuple[Patch, ...]:
        return tuple(Windows(self.places[i::4], (self.first + i) % 4) for i in range(min(4, len(self.places))))


@dataclass(frozen=True)
class Windows(SelfAttentionPatch):
    """Self-attention in 2 x 2 windows, moved by so many quarters of a window."""

    places: tuple[str, ...]
    quarters: int

    def attention(self, attn: Attention, x: Tensor, size: tuple[int, int]) -> Tensor:
        side = [math.ceil(n / 2) for n in size]
        moved = [quarter * self.quarters for quarter in (side[0] // 4, side[1] // 4)]
        even = [2 * n for n in side]
        grid = _sized(x.unflatten(1, size), even)
        grid = torch.roll(grid, [-n for n in moved], (1, 2))
        windows = rearrange(grid, "b (i h) (j w) c -> (b i j) (h w) c", i=2, j=2)
        grid = rearrange(attn(windows, windows), "(b i j) (h w) c -> b (i h) (j w) c", i=2, j=2, h=side[0])
        return _sized(torch.roll(grid, moved, (1, 2)), size).flatten(1, 2)


def _sized(grid: Tensor, size: tuple[int, int] | list[int]) -> Tensor:
    """[B, h, w, C] at another size, bicubic."""
    if list(grid.shape[1:3]) == list(size):
        return grid
    return F.interpolate(grid.movedim(3, 1), list(size), mode="bicubic").movedim(1, 3)


def hidiffusion(unet: Any, height: int, width: int, aggressive: bool = True,
                schedule: NoiseSchedule | EDMSchedule = SD15, begins: float = math.inf) -> tuple[Change, ...]:
    """HiDiffusion as published (arXiv 2311.17528), for latents of this height and width: RAU-Net and MSW-MSA.

    unet: what has its config. Its shares of a run's steps are shares of the timesteps here, stated in sigma: of the
    model's schedule, from where the run begins (a start picture, a second pass). SD1.x, SD2.x: the first downsampler
    with a wider stride, and from 256 latents on pooling below it; SDXL, which has three levels: pooling, and from 512
    latents on the second downsampler. aggressive, for SDXL below 512: that downsampler first, and pooling after, as
    published for pictures from text alone, and not for EDM's (Playground). The published code's other shares, for
    SDXL-Turbo and beside a ControlNet (both .5), are left to `sigma_lo`. Meant for sizes beyond those of the training.
    """
    strong, medium, weak, faint = (after(share, schedule, begins) for share in (0.16, 0.3, 0.4, 0.7))
    blocks = unet.config.num_res_blocks + 1
    sdxl = len(unet.config.channel_mult) == 3
    large = min(height, width) >= (512 if sdxl else 256)
    pooled = Shrink(blocks + 1, skip=True, pooled=True, sigma_lo=weak)
    strided = WiderStride(2 * blocks if sdxl else blocks, sigma_lo=weak)
    if large:
        first, second = (pooled, strided) if sdxl else (strided, pooled)
        sizes: tuple[Change, ...] = replace(first, sigma_lo=faint), replace(second, sigma_lo=medium)
    elif sdxl and aggressive and not isinstance(schedule, EDMSchedule):
        sizes = replace(strided, sigma_lo=strong), replace(pooled, sigma_hi=strong)
    else:
        sizes = (pooled if sdxl else strided,)
    return *sizes, WindowAttention()
