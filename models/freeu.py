"""FreeU (Si et al. 2023, arXiv 2309.11497): the way up leans on its own features, and less on the skips."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ella_kd.models.inside import Change
from ella_kd.models.unet import UNet

By = Literal["channels", "level"]


@dataclass(frozen=True)
class FreeU(Change):
    """Where the way up has its most channels: half of them are multiplied by b, and the skip's lowest frequencies by s.

    b1, s1 hold where the UNet has 4 * model_channels, b2, s2 where it has twice (by="channels": the authors' code, and
    ComfyUI's); or at its two coarsest levels (by="level": diffusers', where 1280 channels of the second are given b2).
    adaptive: b holds where a pixel's mean of the channels is largest in its picture, 1 where it is smallest, as in the
    paper's last version, "v2"; else it holds everywhere. The authors' numbers are `sd14`, `sd15`, `sd21`, `sdxl`.
    Raises ValueError for a factor that is not a number of at least 0, and for a UNet without such a place.
    """

    b1: float = 1.5
    b2: float = 1.6
    s1: float = 0.9
    s2: float = 0.2
    adaptive: bool = True
    by: By = "channels"
    stages: tuple[tuple[int, float, float], ...] = ()  # of the UNet's output_blocks: number, b, s

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= factor < math.inf for factor in (self.b1, self.b2, self.s1, self.s2)):
            raise ValueError("FreeU's factors are numbers of at least 0, 1 for no change, got "
                             f"b {self.b1}, {self.b2} and s {self.s1}, {self.s2}")
        if self.by not in ("channels", "level"):
            raise ValueError(f"FreeU finds its places by channels or by level, got {self.by!r}")

    @classmethod
    def sd14(cls) -> Self:
        return cls(1.3, 1.4)

    @classmethod
    def sd15(cls) -> Self:
        return cls(1.5, 1.6)

    @classmethod
    def sd21(cls) -> Self:
        return cls(1.4, 1.6)

    @classmethod
    def sdxl(cls) -> Self:
        return cls(1.3, 1.4)

    @classmethod
    def of(cls, unet: Any) -> Self:
        """The authors' numbers for a network of this shape; by level where it has no stage of 4 or 2 times."""
        mults = unet.config.channel_mult
        found = cls.sdxl() if len(mults) == 3 else cls.sd21() if unet.config.context_dim == 1024 else cls.sd15()
        return found if {2, 4} & set(mults) else replace(found, by="level")

    def on(self, unet: UNet) -> "FreeU":
        config = unet.config
        blocks = config.num_res_blocks + 1
        mults = [mult for mult in reversed(config.channel_mult) for _ in range(blocks)]
        if self.by == "level":
            kinds = [n // blocks for n in range(len(mults))]
        else:  # what a stage is given is as wide as the stage before it
            kinds = [{4: 0, 2: 1}.get(mult, 2) for mult in (mults[0], *mults[:-1])]
        factors = (self.b1, self.s1), (self.b2, self.s2)
        stages = tuple((n, *factors[kind]) for n, kind in enumerate(kinds) if kind < 2 and factors[kind] != (1, 1))
        if not any(kind < 2 for kind in kinds):
            raise ValueError("FreeU acts where a UNet has 4 or 2 times its model_channels, and this one has "
                             f"{list(config.channel_mult)} times: by='level' takes its two coarsest levels")
        return replace(self, stages=stages)

    def at(self, level: float) -> Change | None:
        return super().at(level) if self.stages else None

    def joined(self, n: int, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        for stage, b, s in self.stages:
            if stage == n:
                half = x.shape[1] // 2
                factor = (b - 1) * _between(x.mean(1, keepdim=True)) + 1 if self.adaptive else b
                return torch.cat([x[:, :half] * factor, x[:, half:]], 1), skip + (s - 1) * lowest_frequencies(skip)
        return x, skip


def _between(x: Tensor) -> Tensor:
    """x [B, ...] as 0 at the smallest number of its row and 1 at the largest."""
    low, high = x.flatten(1).aminmax(dim=1)
    low, high = (end.view(-1, 1, 1, 1) for end in (low, high))
    return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)


def lowest_frequencies(x: Tensor) -> Tensor:
    """Of x [B, C, h, w] the part in the 2 x 2 frequencies 0 and -1, what FreeU's `Fourier_filter(x, 1, s)` scales.

    The real part of the inverse of that part of the Fourier transform; at most 7 waves, which are products rather than
    a transform, so it compiles, and runs in half precision: the sums are in fp32.
    """
    h, w = x.shape[2:]
    rows, columns = (torch.arange(n, device=x.device, dtype=torch.float64) * (2 * math.pi / n) for n in (h, w))
    angles = [u * rows[:, None] + v * columns for u in range(min(2, h)) for v in range(min(2, w))]
    precise = torch.promote_types(x.dtype, torch.float32)
    waves = torch.stack([f(angle) for angle in angles for f in (torch.cos, torch.sin)]).flatten(1).to(precise)
    flat = x.flatten(2).to(precise)
    return ((flat @ waves.mT / (h * w)) @ waves).view_as(x).to(x.dtype)
