"""The autoencoder on pictures too large to be whole in memory: a few rows of every map at a time, the same answer.

A map is held, or worked out from another one whenever its rows are read. A convolution reads a row more on either side
than it answers for, a GroupNorm has the statistics of the whole map, attention asks a strip of queries about all
pixels: no edge is seen between strips, and the answer is the whole one's to rounding (1e-15 in float64).
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ella_kd.models.attention import attend

STRIP = 1 << 26  # bytes of a map worked out at once: 32 rows of 128 channels, 4096 wide, in float32
HELD = 1 << 28  # bytes of a map kept where the network is; a larger one waits in the host's memory, or in a file


class InStrips(nn.Sequential):
    """What `nn.Sequential` of the same layers of an autoencoder answers, without gradients, in strips."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> what the layers say to it, picture by picture."""
        return torch.cat([self._one(picture) for picture in x.split(1)])

    def _one(self, picture: Tensor) -> Tensor:
        x = Map(picture.shape[1:], picture.new_empty(0), lambda a, b: picture[:, :, a:b])
        for layer in self:
            x = conv(layer, x) if isinstance(layer, nn.Conv2d) else _coder(layer, x)
        out = picture.new_empty(1, *x.shape)
        for a, b in x.strips():
            out[:, :, a:b] = x.read(a, b)
        return out


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each channel, [C], over the pixels seen so far; in float32 at least."""

    mean: Tensor | float = 0.0
    var: Tensor | float = 0.0
    pixels: int = 0

    def and_of(self, x: Tensor) -> "Moments":
        """With the pixels of x [1, C, h, w] (Chan, Golub and LeVeque 1979: means of parts have a variance too)."""
        x, here = x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[2] * x.shape[3]
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square_().mean((0, 2, 3))
        pixels = self.pixels + here
        share, apart = here / pixels, mean - self.mean
        return Moments(self.mean + share * apart, torch.lerp(apart * 0 + self.var, var, share)
                       + share * (1 - share) * apart.square(), pixels)


@dataclass(frozen=True)
class Map:
    """A feature map of one picture, by its rows: read(a, b) -> [1, C, b - a, w] in the dtype and on the device of like.

    shape: C, h, w. moments: of the whole map, where they have been taken. store: where it is held, if it is. widest:
    the most channels on the way from held maps to this one, which a strip has to leave room for.
    """

    shape: torch.Size
    like: Tensor
    read: Callable[[int, int], Tensor]
    moments: Moments | None = None
    store: "Store | None" = None
    widest: int = 0

    def strips(self) -> Iterator[tuple[int, int]]:
        """From where to where the rows of each strip go."""
        channels, h, w = self.shape
        rows = max(1, STRIP // (max(channels, self.widest) * w * self.like.element_size()))
        return ((a, min(a + rows, h)) for a in range(0, h, rows))

    def to(self, shape: Sequence[int], read: Callable[[int, int], Tensor]) -> "Map":
        """Another map, worked out from this one."""
        return Map(torch.Size(shape), self.like, read, widest=max(self.shape[0], self.widest, shape[0]))


class Store:
    """The numbers of a map: beside the network if they are few (`HELD`), else row by row, [h, C, w], in pinned memory
    of the host or, where that is the network's own memory, in a temporary file."""

    def __init__(self, shape: torch.Size, like: Tensor) -> None:
        channels, h, w = shape
        self.by_row, self.like, self.row = (h, channels, w), like, channels * w * like.element_size()
        self.here: Tensor | None = None
        self.away: Tensor | None = None
        self.file: Any = None
        if h * self.row <= HELD:
            self.here = like.new_empty(1, *shape)
        elif like.device.type == "cpu":
            self.file = tempfile.TemporaryFile()  # noqa: SIM115
        else:
            self.away = torch.empty(self.by_row, dtype=like.dtype, pin_memory=like.device.type == "cuda")

    def read(self, a: int, b: int) -> Tensor:
        if self.here is not None:
            return self.here[:, :, a:b]
        if self.away is not None:
            rows = self.away[a:b].to(self.like.device, non_blocking=True)
        else:
            rows = self.like.new_empty(b - a, *self.by_row[1:])
            self.file.seek(a * self.row)
            self.file.readinto(rows.view(torch.uint8).numpy())
        return rows.permute(1, 0, 2)[None].contiguous()

    def write(self, a: int, x: Tensor) -> None:
        b = a + x.shape[2]
        if self.here is not None:
            self.here[:, :, a:b] = x
            return
        rows = x[0].permute(1, 0, 2).contiguous()
        if self.away is not None:
            self.away[a:b].copy_(rows, non_blocking=True)
        else:
            self.file.seek(a * self.row)
            self.file.write(rows.view(torch.uint8).numpy())


def hold(x: Map, onto: "Store | None" = None) -> Map:
    """The map worked out once and held; onto: over a map of which the rows written are no longer read."""
    store, moments = onto or Store(x.shape, x.like), Moments()
    for a, b in x.strips():
        rows = x.read(a, b)
        store.write(a, rows)
        moments = moments.and_of(rows)
    return Map(x.shape, x.like, store.read, moments, store)


def around(x: Map, a: int, b: int, layer: nn.Conv2d | Any) -> tuple[Tensor, int]:
    """Rows a .. b of x for a layer, and the number of the first: as far as there are any, or, where the layer is
    seamless, those of the opposite edge."""
    h = x.shape[1]
    if "circular" not in (getattr(layer, "padding_mode", None), getattr(layer, "padding", None)):
        return x.read(max(a, 0), min(b, h)), max(a, 0)
    parts = [(h + a, h)] * (a < 0) + [(max(a, 0), min(b, h))] + [(0, b - h)] * (b > h)
    return torch.cat([x.read(*part) for part in parts], 2), a


def conv(layer: nn.Conv2d, x: Map) -> Map:
    """A convolution of stride 1 that keeps the size; what it pads at the edge of a strip is cut off."""
    (_, h, w), beyond = x.shape, layer.kernel_size[0] // 2

    def read(a: int, b: int) -> Tensor:
        rows, top = around(x, a - beyond, b + beyond, layer)
        return layer(rows)[:, :, a - top:b - top]

    return x.to((layer.out_channels, h, w), read)


def upsample(layer: Any, x: Map) -> Map:
    _, h, w = x.shape

    def read(a: int, b: int) -> Tensor:
        rows, top = around(x, a // 2 - 1, (b + 1) // 2 + 1, layer.conv)
        return layer(rows)[:, :, a - 2 * top:b - 2 * top]

    return x.to((layer.conv.out_channels, 2 * h, 2 * w), read)


def downsample(layer: Any, x: Map) -> Map:
    """Rows 2a .. 2b of x, and the one below that the layer pads at the bottom of the picture."""
    _, h, w = x.shape
    return x.to((layer.conv.out_channels, h // 2, w // 2), lambda a, b: layer(around(x, 2 * a, 2 * b + 1, layer)[0]))


def normed(norm: nn.GroupNorm, x: Map, silu: bool = True) -> Map:
    """GroupNorm by the moments of the whole map, then SiLU."""
    assert isinstance(x.moments, Moments)
    mean, var = (torch.as_tensor(m).view(norm.num_groups, -1) for m in (x.moments.mean, x.moments.var))
    center = mean.mean(1, keepdim=True)
    spread = (var + (mean - center).square()).mean(1, keepdim=True)
    scale = norm.weight * (spread + norm.eps).rsqrt().expand_as(mean).flatten()
    shift = norm.bias - center.expand_as(mean).flatten() * scale
    scale, shift = scale[:, None, None], shift[:, None, None]

    def read(a: int, b: int) -> Tensor:
        y = torch.addcmul(shift, x.read(a, b).to(shift.dtype), scale).to(x.like.dtype)
        return F.silu(y, inplace=True) if silu else y

    return x.to(x.shape, read)


def block(layer: Any, x: Map) -> Map:
    """A VAEResBlock; x has its moments, and is no longer valid afterwards."""
    h = hold(conv(layer.conv1, normed(layer.norm1, x)))
    h = conv(layer.conv2, normed(layer.norm2, h))
    skip = conv(layer.nin_shortcut, x) if hasattr(layer, "nin_shortcut") else x
    return hold(x.to(h.shape, lambda a, b: h.read(a, b) + skip.read(a, b)), x.store if skip is x else None)


def attention(layer: Any, x: Map) -> Map:
    """An AttnBlock: the keys and values of all pixels are held, the queries come in strips."""
    (channels, h, w), seen = x.shape, normed(layer.norm, x, silu=False)
    keys, values = (x.like.new_empty(1, h * w, channels) for _ in range(2))

    def pixels(rows: Tensor) -> Tensor:
        return rearrange(rows, "b c h w -> b (h w) c")

    for a, b in x.strips():
        rows = seen.read(a, b)
        keys[:, a * w:b * w], values[:, a * w:b * w] = pixels(layer.k(rows)), pixels(layer.v(rows))

    def read(a: int, b: int) -> Tensor:
        queries = pixels(layer.q(seen.read(a, b))).contiguous()  # else torch's kernel makes a matrix of all pairs
        found = rearrange(attend(queries, keys, values, heads=1), "b (h w) c -> b c h w", w=w)
        return x.read(a, b) + layer.proj_out(found)

    return hold(x.to(x.shape, read), x.store)


def _coder(coder: Any, x: Map) -> Map:
    """An Encoder or a Decoder, up to and with its conv_out."""
    x = hold(conv(coder.conv_in, x))
    if encodes := hasattr(coder, "down"):
        for level in coder.down:
            x = _level(level, x)
    x = block(coder.mid.block_2, attention(coder.mid.attn_1, block(coder.mid.block_1, x)))
    if not encodes:
        for level in reversed(coder.up):
            x = _level(level, x)
    return conv(coder.conv_out, normed(coder.norm_out, x))


def _level(level: Any, x: Map) -> Map:
    for each in level.block:
        x = block(each, x)
    if hasattr(level, "downsample"):
        x = hold(downsample(level.downsample, x))
    if hasattr(level, "upsample"):
        x = hold(upsample(level.upsample, x))
    return x
