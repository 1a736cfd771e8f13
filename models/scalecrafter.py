"""ScaleCrafter: in pictures larger than a UNet was trained on, convolutions see as far as they did in training."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

from ella_kd.models.hidiffusion import AFTER_40
from ella_kd.models.inside import Change
from ella_kd.models.unet import UNet
from ella_kd.models.winograd import WinogradConv2d

AFTER_60 = 1.163  # sigma of Stable Diffusion's schedule, as those of models.hidiffusion


@dataclass(frozen=True)
class Dilation(Change):
    """ScaleCrafter's re-dilation (He et al. 2023, arXiv 2310.07702): 3x3 convolutions with their weights further apart.

    down, up: by how many pixels, level by level, the finest first; up None: as down. middle: of the middle. Maps keep
    their size, so that it costs more than `WiderStride`. `Inside(unet, Dilation.of(unet))` has the authors' numbers for
    four times the pixels of the training. Left out: factors that are not whole, which fade, and noise-damped guidance,
    which they use beyond that. Raises ValueError for factors below 1, for others than the UNet has levels, and for a
    `fast_on_cpu` UNet, whose convolutions cannot be dilated.
    """

    down: tuple[int, ...] = (1, 2, 2, 2)
    middle: int = 2
    up: tuple[int, ...] | None = None
    _: KW_ONLY
    sigma_lo: float = AFTER_60

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(type(n) is not int or n < 1 for n in (*self.down, self.middle, *(self.up or ()))):
            raise ValueError(f"weights stand a whole number of pixels apart, 1 as they are, got {self}")

    @classmethod
    def of(cls, unet: Any) -> Self:
        """As published for SDXL at 2048 px, SD2.1 and SD1.5 at 1024, whichever the UNet is of. (SDXL's settings name a
        fourth level on the way down, which it has not.)"""
        levels = len(unet.config.channel_mult)
        if levels == 3:
            return cls((1, 1, 1), 2, (1, 1, 2))
        return cls((1, *[2] * (levels - 1)), 2, sigma_lo=AFTER_40 if unet.config.context_dim == 1024 else AFTER_60)

    def on(self, unet: UNet) -> Self:
        levels = len(unet.config.channel_mult)
        if {len(self.down), len(self.up or self.down)} != {levels}:
            raise ValueError(f"this UNet has {levels} levels, and Dilation numbers for {len(self.down)} down and "
                             f"{len(self.up or self.down)} up")
        if any(isinstance(module, WinogradConv2d) for module in unet.modules()):
            raise ValueError("convolutions of fast_on_cpu cannot be dilated: give Dilation a plain UNet")
        return self

    def apart(self, part: str, level: int) -> int:
        if part == "middle":
            return self.middle
        return (self.down if part == "down" else self.up or self.down)[level]
