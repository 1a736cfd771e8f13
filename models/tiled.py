"""A network that sees a picture in overlapping tiles and answers with the mean of what it says of them.

The denoised is affine in the output at one sigma, so this blends the tiles' denoised, under guidance: every sampler,
CFG++ and rule works unchanged, with one history for the whole picture. Uniform weights are MultiDiffusion (Bar-Tal et
al. 2023, arXiv 2302.08113, eq. 5), gaussian ones Mixture of Diffusers (Barbero Jimenez 2023, arXiv 2302.02412).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ella_kd.models.added import PIXELS, count_told
from ella_kd.models.around import AroundOne
from ella_kd.models.context import Context
from ella_kd.models.network import Patches, as_network
from ella_kd.models.partial import Box, cut, rows_of, runs
from ella_kd.models.patches import Patch, Recorder, in_part
from ella_kd.models.seamless import is_seamless

Where = Sequence[Tensor | None]
"""Of each answer of a call (cond, uncond, the prompt of a region), all of as many rows: where in the picture it counts,
bool [h, w] on the CPU; None: everywhere."""
VARIANCE = 0.01  # of a gaussian weight, in the tile's side squared: at an edge it is exp(-12.5) of the middle's


@dataclass(frozen=True)
class Tiles:
    """How a picture is cut: tiles of `size` (height, width) that overlap by at least `overlap`, spread evenly so that
    the last ones touch the edges; wrap: the picture's right edge goes on at its left one."""

    size: tuple[int, int]
    overlap: tuple[int, int]
    weights: Literal["uniform", "gaussian"] = "uniform"
    wrap: bool = False

    def boxes(self, h: int, w: int) -> tuple[Box, ...]:
        """Top, left, height and width of the tiles of a picture, row by row; a box may go beyond an edge that wraps."""
        (height, width), (down, along) = self.size, self.overlap
        return tuple((top, left, min(height, h), min(width, w)) for top, left in product(
            _starts(h, height, down, False), _starts(w, width, along, self.wrap)))

    def weight(self, height: int, width: int) -> Tensor:
        """[height, width] float64: how much each place of a tile counts."""
        if self.weights == "uniform":
            return torch.ones(height, width, dtype=torch.float64)
        rows, columns = (torch.exp(-((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / n) ** 2 / (2 * VARIANCE))
                         for n in (height, width))
        return rows[:, None] * columns


class Tiled(AroundOne):
    """A `models.network.Network` around another one: `Tiled(unet, 64, 16)`, sizes in latents, each a number or
    (height, width).

    weights: "uniform", or "gaussian", softer where tiles differ. wrap: a panorama whose right edge meets its left one.
    at_once: how many tiles go into one call of the network. Each tile sees the tokens of its rows, its part of their
    channels and controls, and SDXL's sizes as those of a crop of the picture. Where a prompt counts for a part of the
    picture only (`Regions`), only the tiles there are asked about it. A picture as large as one tile is the network's
    own answer, bit for bit; a pointwise network's answer is the same in tiles. Raises ValueError for tiles that cannot
    cover a picture, and for a seamless network.
    """

    takes_where = True

    def __init__(self, network: Any, size: int | tuple[int, int] = 64, overlap: int | tuple[int, int] = 16,
                 weights: Literal["uniform", "gaussian"] = "uniform", wrap: bool = False, at_once: int = 4) -> None:
        super().__init__()
        sizes, overlaps = (n if isinstance(n, tuple) else (n, n) for n in (size, overlap))
        if not all(type(n) is int and n > 0 for n in sizes) or not all(
                type(o) is int and 0 <= o < n for o, n in zip(overlaps, sizes)):
            raise ValueError(f"tiles need a size of at least 1 and an overlap from 0 to less than it, in latents, got "
                             f"{size} and {overlap}")
        if weights not in ("uniform", "gaussian"):
            raise ValueError(f'the weights of tiles are "uniform" or "gaussian", got {weights!r}')
        if type(at_once) is not int or at_once < 1:
            raise ValueError(f"at_once is how many tiles go into one call, at least 1, got {at_once!r}")
        if is_seamless(network):
            raise ValueError("each tile of a seamless network would meet itself at its edges: give tiles an ordinary "
                             "one, wrap=True for a panorama")
        self.network, self.at_once = as_network(network), at_once
        self.tiles = Tiles(sizes, overlaps, weights, wrap)

    def of(self, network: Any, *others: Any) -> Self:
        """The same tiles of another network."""
        return type(self)(network, self.tiles.size, self.tiles.overlap, self.tiles.weights, self.tiles.wrap,
                          self.at_once)

    @property
    def wraps(self) -> bool:
        return self.tiles.wrap or super().wraps

    def extra_repr(self) -> str:
        return f"{self.tiles}"

    def forward(self, x: Tensor, t: Tensor, context: Context | Tensor, patches: Patches = (),
                where: Where = ()) -> Tensor:
        """As the network's; where: of each answer, the part of the picture that is wanted, zeros may be elsewhere."""
        seen, canvas = Context.of(context), (x.shape[2], x.shape[3])
        boxes = self.tiles.boxes(*canvas)
        if len(boxes) == 1:
            return self.network(x, t, seen, patches)
        seen = self._told(x, seen)
        rows = [_wanted(tuple(where), box, len(x)) for box in boxes]
        found: Tensor | None = None
        maps: dict[Recorder, Tensor] = {}
        for some in _calls([len(own) for own in rows], self.at_once * len(x)):
            mine = [row for k in some for row in rows[k]]
            own = [in_part(tuple(_of_rows(patches, rows[k]))) for k in some]
            out = self.network(
                torch.cat([cut(rows_of(x, rows[k]), boxes[k]) for k in some]), rows_of(t, mine),
                Context.stack([_crop(seen.take(rows[k]), boxes[k], canvas) for k in some]),
                [patch for part, _ in own for patch in part])
            if found is None:
                found = out.new_zeros(len(x), out.shape[1], *canvas,
                                      dtype=torch.promote_types(out.dtype, torch.float32))
            shares = _shares(self.tiles, canvas, out.device, found.dtype)
            for k, answer in zip(some, out.to(found.dtype).split([len(rows[k]) for k in some]), strict=True):
                _blend(found, answer, rows[k], boxes[k], shares[k])
            for k, (_, recorders) in zip(some, own, strict=True):
                for whole, part in recorders.items():
                    received = F.interpolate(part.received, boxes[k][2:])
                    mean = maps.setdefault(whole, received.new_zeros(len(received), 1, *canvas))
                    _blend(mean, received, range(len(mean)), boxes[k], shares[k])
        for whole, mean in maps.items():
            whole.keep(mean)
        assert found is not None
        return found.to(out.dtype)

    def _told(self, x: Tensor, seen: Context) -> Context:
        """The context with SDXL's sizes, where the network is told any and the context leaves them to it."""
        if self.vector_dim is None or seen.vector is None or seen.sizes is not None or not count_told(
                seen.vector, x, self.vector_dim):
            return seen
        sizes = torch.zeros(len(x), 6, dtype=torch.float32, device=x.device)
        for column, side in ((0, x.shape[2]), (1, x.shape[3])):
            sizes[:, column::4] = PIXELS * side
        return replace(seen, sizes=sizes)


def _starts(n: int, size: int, overlap: int, wrap: bool) -> list[int]:
    """Where tiles begin along a side of n."""
    if n <= size:
        return [0]
    if wrap:
        count = math.ceil(n / (size - overlap))
        return [i * n // count for i in range(count)]
    last = math.ceil((n - size) / (size - overlap))
    return [round(i * (n - size) / last) for i in range(last + 1)]


@lru_cache(16)
def _shares(tiles: Tiles, canvas: tuple[int, int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of each tile, the share of its answer in the mean of the tiles so far: blended one after another, answers that
    are equal stay so to the last bit. In float64 until the end, since a gaussian's corner is 1e-11 of its middle."""
    total, found = torch.zeros(canvas, dtype=torch.float64), []
    for box in tiles.boxes(*canvas):
        weight = tiles.weight(*box[2:])
        for there, here in _parts(box, canvas):
            total[there] += weight[here]
        found.append((weight / cut(total, box)).to(device, dtype))
    return tuple(found)


def _parts(box: Box, canvas: tuple[int, int]) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Where a tile lies in the picture, and the part of the tile that lies there; several where it wraps around."""
    top, left, height, width = box
    inside = min(width, canvas[1] - left)
    rows = slice(top, top + height), slice(0, height)
    for there, here in ((slice(left, left + inside), slice(0, inside)), (slice(0, width - inside),
                                                                        slice(inside, width))):
        if here.stop > here.start:
            yield (rows[0], there), (rows[1], here)


def _blend(found: Tensor, answer: Tensor, rows: Sequence[int], box: Box, share: Tensor) -> None:
    """Takes a tile's answer [rows, C, height, width] into the mean of those so far, in place."""
    for (ys, xs), (own_ys, own_xs) in _parts(box, (found.shape[2], found.shape[3])):
        start = 0
        for part in runs(rows):
            mean = found[part, :, ys, xs]
            stop = start + part.stop - part.start
            mean += share[own_ys, own_xs] * (answer[start:stop, :, own_ys, own_xs] - mean)
            start = stop


def _calls(rows: Sequence[int], limit: int) -> list[list[int]]:
    """Tiles that have so many rows, in few calls of at most `limit` rows and of about one size."""
    fair = sum(rows) / math.ceil(sum(rows) / limit)
    found: list[list[int]] = []
    free = 0.0
    for k, count in enumerate(rows):
        if count and (free <= 0 or sum(rows[i] for i in found[-1]) + count > limit):
            found.append([])
            free = fair
        if count:
            found[-1].append(k)
            free -= count
    return found


@lru_cache(1024)
def _wanted(where: tuple[Tensor | None, ...], box: Box, batch: int) -> tuple[int, ...]:
    """The rows of a batch whose answers count somewhere in the box."""
    own = batch // max(len(where), 1)
    return tuple(row for i, area in enumerate(where or (None,)) if area is None or bool(cut(area, box).any())
                 for row in range(i * own, (i + 1) * own))


def _of_rows(patches: Patches, rows: Sequence[int]) -> Iterator[tuple[int, Patch | None]]:
    """The patches of a tile's rows, with the rows each had together: it may look from one at another."""
    start = 0
    for count, patch in patches:
        if own := sum(start <= row < start + count for row in rows):
            yield own, patch
        start += count


def _crop(seen: Context, box: Box, canvas: tuple[int, int]) -> Context:
    """What is seen of a tile; SDXL's sizes say where in the picture it was cut out."""
    part = seen.crop(box, canvas)
    if part.sizes is None:
        return part
    sizes, (top, left, height, width) = part.sizes.clone(), (PIXELS * n for n in box)
    for column, number in ((2, top), (3, left)):
        sizes[:, column] += number
    sizes[:, 4], sizes[:, 5] = height, width
    return replace(part, sizes=sizes)
