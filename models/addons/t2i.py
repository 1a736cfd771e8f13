"""T2I-Adapter (Mou et al. 2023, arXiv 2302.08453): a small network that reads a picture once and adds to the UNet."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ella_kd.models.addons.control_files import ControlPart
from ella_kd.models.context import Context
from ella_kd.models.controls import PIXELS, Residuals
from ella_kd.models.devices import check_device, check_dtype
from ella_kd.models.files.building import build, check_dtypes, fill
from ella_kd.models.files.kinds import hint, kind_of_path
from ella_kd.models.files.layout import Part
from ella_kd.models.files.names import Source
from ella_kd.models.files.weights import Weights
from ella_kd.models.shapes import Shapes, count_of, shape_of

if TYPE_CHECKING:
    from ella_kd.models.unet import UNetConfig

PREFIX = "adapter."
LEVELS = 4  # features that one gives


class Residual(nn.Module):
    """x + block2(relu(block1(x))), after a 1x1 convolution where widths differ and, with down, at half the size."""

    def __init__(self, channels: int, wide: int, ksize: int = 1, down: bool = False) -> None:
        super().__init__()
        self.down = down
        if channels != wide:
            self.in_conv = nn.Conv2d(channels, wide, 1)
        self.block1 = nn.Conv2d(wide, wide, 3, padding=1)
        self.block2 = nn.Conv2d(wide, wide, ksize, padding=ksize // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = halved(x) if self.down else x
        x = self.in_conv(x) if hasattr(self, "in_conv") else x
        return x + self.block2(F.relu(self.block1(x)))


class Narrow(nn.Module):
    """A level of the light adapter: residual blocks of a quarter of the width between two 1x1 convolutions."""

    def __init__(self, channels: int, mid: int, wide: int, blocks: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.in_conv = nn.Conv2d(channels, mid, 1)
        self.body = nn.Sequential(*(Residual(mid, mid, 3) for _ in range(blocks)))
        self.out_conv = nn.Conv2d(mid, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_conv(self.body(self.in_conv(halved(x) if self.down else x)))


class T2IAdapter(nn.Module):
    """Features of a picture, one per level, added before the UNet's features become skips; SDXL's ends at the middle.

    channels: of the picture, 3, or 1 for a mean of them. widths: of the features. blocks: res blocks a level.
    unshuffle: pixels that become channels, along a side; 16 is SDXL's, which halves its features once only. light: the
    small kind.
    """

    pooled: bool | None = None  # it has no guess mode, and nothing is averaged over the picture

    def __init__(self, channels: int, widths: Sequence[int], blocks: int = 2, unshuffle: int = 8, light: bool = False,
                 ksize: int = 1, name: str = "") -> None:
        super().__init__()
        self.channels, self.widths, self.blocks = channels, tuple(widths), blocks
        self.unshuffle, self.light, self.name = unshuffle, light, name
        seen, self.xl = channels * unshuffle**2, unshuffle == 16
        halves = [i == 2 if self.xl else i > 0 for i in range(len(widths))]
        self.body = nn.ModuleList()
        if light:
            for channels, wide, down in zip((seen, *widths), widths, halves):
                self.body.append(Narrow(channels, wide // 4, wide, blocks, down))
            return
        self.conv_in = nn.Conv2d(seen, widths[0], 3, padding=1)
        for (before, wide), down in zip(pairwise((widths[0], *widths)), halves):
            self.body.append(Residual(before, wide, ksize, down))
            self.body.extend(Residual(wide, wide, ksize) for _ in range(blocks - 1))

    @classmethod
    def load(cls, path: str | Path, *, dtype: str | torch.dtype | None = None,
             device: str | torch.device = "cpu") -> "T2IAdapter":
        """Read one, full or light, SD's or SDXL's: a file in its authors' or diffusers' names, or diffusers' folder.

        dtype None: fp32 on a CPU, fp16 elsewhere. Raises FileNotFoundError, or ValueError naming what is missing,
        misshapen or extra, and for a file of another kind.
        """
        device = check_device(device)
        dtype, path = check_dtype(dtype, device), Path(path)
        weights = Weights(path)
        told = f"{path} is not a T2I-Adapter"
        part = part_of(weights)
        if not any(name.endswith("block1.weight") for name in part.sources):
            raise ValueError(f"{told}{hint(kind_of_path(path))}: expected body.0.block1.weight and so on")
        net = build(_of_shapes, part, told, path.stem if path.is_file() else path.name)
        check_dtypes(part)
        return fill(net, part, told, dtype, device)

    def places(self, unet: "UNetConfig") -> list[tuple[int, int]]:
        """Of each feature the input block after which it is added, -1 for the middle, and the width there."""
        each, levels = unet.num_res_blocks + 1, len(unet.channel_mult)
        widths = [mult * unet.model_channels for mult in unet.channel_mult]
        ends = [(each * level + unet.num_res_blocks, widths[level]) for level in range(levels)]
        return [(each, widths[0]), *ends[1:], (-1, widths[-1])] if self.xl else ends

    def check(self, unet: "UNetConfig") -> None:
        wanted = tuple(width for _, width in self.places(unet))
        if wanted != self.widths:
            kind = "SDXL" if self.xl else "Stable Diffusion 1.x"
            raise ValueError(f"the T2I-Adapter {self.name} is one for {kind}, its features have {list(self.widths)} "
                             f"channels, and this UNet wants {list(wanted)}: take one that was made for this UNet")

    def reading(self) -> list[Tensor]:
        return list(self.parameters())

    def read(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """The features of pictures [P, 3, 8h, 8w] in [0, 1]."""
        x = pictures.mean(1, keepdim=True) if self.channels == 1 else pictures
        size = [self.unshuffle * math.ceil(side / self.unshuffle) for side in x.shape[2:]]
        if size != list(x.shape[2:]):
            x = F.interpolate(x, size, mode="bilinear")
        x = F.pixel_unshuffle(x, self.unshuffle)
        x = x if self.light else self.conv_in(x)
        found = []
        for i, block in enumerate(self.body):
            x = block(x)
            if self.light or i % self.blocks == self.blocks - 1:
                found.append(x)
        return tuple(found)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return self.read(pictures)

    def residuals(self, x: Tensor, t: Tensor, seen: Context, read: Sequence[Tensor], unet: "UNetConfig",
                  stages: int | None = None) -> Residuals:
        placed = dict(zip((block for block, _ in self.places(unet)), read, strict=True))
        return Residuals(inside=placed, middle=placed.pop(-1, None))


def halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, ceil_mode=True)  # an odd side is rounded up, as in the UNet


def part_of(weights: Weights) -> Part:
    """The network's tensors under our names, its authors' own."""
    prefix = PREFIX if any(name.startswith(PREFIX) for name in weights) else ""
    shapes = {name.removeprefix(prefix): tuple(shape) for name, shape in weights.shapes.items()
              if name.startswith(prefix)}
    sources = {new: Source(prefix + name, shapes[name]) for name, new in to_authors(shapes).items()}
    return ControlPart("unet", weights, sources, prefix)


def to_authors(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name -> the authors', for all names of one adapter; theirs stay."""
    names = list(names)
    light, blocks = "body.0.out_conv.weight" in names, count_of(names, "body.0.resnets")
    found = {name: name for name in names}
    for name in names if blocks else ():
        parts = name.split(".")
        if parts[0] == "body" and parts[2] == "resnets":
            where = [parts[1], "body", parts[3]] if light else [str(int(parts[1]) * blocks + int(parts[3]))]
            found[name] = ".".join(["body", *where, *parts[4:]])
        elif parts[0] == "body" and not light:
            found[name] = ".".join(["body", str(int(parts[1]) * blocks), *parts[2:]])
    return found


def _of_shapes(part: Part, name: str) -> T2IAdapter:
    shapes: Shapes = part.shapes
    light = "body.0.out_conv.weight" in shapes
    if light:
        blocks, levels = count_of(shapes, "body.0.body"), count_of(shapes, "body")
        widths = [shape_of(shapes, f"body.{i}.out_conv.weight", 4)[0] for i in range(levels)]
        seen, ksize = shape_of(shapes, "body.0.in_conv.weight", 4)[1], 3
    else:
        blocks = count_of(shapes, "body") // LEVELS
        widths = [shape_of(shapes, f"body.{max(blocks, 1) * i}.block1.weight", 4)[0] for i in range(LEVELS)]
        seen, ksize = shape_of(shapes, "conv_in.weight", 4)[1], shape_of(shapes, "body.0.block2.weight", 4)[2]
    known = {channels * side**2: (channels, side) for side in (PIXELS, 16) for channels in (1, 3)}
    if seen not in known:
        raise ValueError(f"it reads {seen} numbers a place, expected one of {', '.join(map(str, known))}")
    channels, side = known[seen]
    return T2IAdapter(channels, widths, blocks, side, light, ksize, name)
