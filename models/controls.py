"""What steers the UNet from outside: networks that read a picture and add to its features, for rows that want it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ella_kd.models.blocks import resized
from ella_kd.models.context import Context
from ella_kd.models.devices import upload
from ella_kd.models.partial import Box, ForRows, add_to_rows, cut, rows_of, scaled

if TYPE_CHECKING:
    from ella_kd.models.unet import UNetConfig

PIXELS = 8  # of a hint per latent, along one side


class Residuals(NamedTuple):
    """What is added to a UNet's features: by input block, before they become skips; to the skips, by their number; and
    to what leaves the middle."""

    inside: Mapping[int, Tensor] = {}
    skips: Mapping[int, Tensor] = {}
    middle: Tensor | None = None


class ControlNetwork(Protocol):
    """A ControlNet, a T2I-Adapter: an nn.Module of its own device and dtype."""

    name: str

    @property
    def pooled(self) -> bool | None:
        """Whether its outputs are averaged over the picture; None: they cannot be, and it has no guess mode."""
        ...

    def check(self, unet: "UNetConfig") -> None:
        """Raises ValueError if it was made for UNets of another kind."""

    def read(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """What it makes of pictures [P, 3, 8h, 8w] in [0, 1] alone, which no step changes: [P, ...] each."""
        ...

    def reading(self) -> Sequence[Tensor]:
        """The parameters that `read` uses."""
        ...

    def residuals(self, x: Tensor, t: Tensor, seen: Context, read: Sequence[Tensor], unet: "UNetConfig",
                  stages: int | None = None) -> Residuals:
        """What is added for latents x [n, C, h, w] (scaled, as the UNet takes them) at t [n], read [n, ...].

        stages: how many input blocks will run, so that what belongs deeper may be left out; None for all, and the
        middle.
        """
        ...


@dataclass(frozen=True, eq=False)
class Hint:
    """One picture that is followed: [1, 3, H, W] in [0, 1], stretched to the canvas, 8 pixels a latent.

    part: None for the whole picture; else the size of the canvas, and the box of it that is seen, in latents. What a
    network reads in it is kept with it, as long as the network's weights and the canvas are the same.
    """

    picture: Tensor
    part: tuple[tuple[int, int], Box] | None = None
    _read: "WeakKeyDictionary[object, tuple[object, tuple[Tensor, ...]]]" = field(
        default_factory=WeakKeyDictionary, init=False, repr=False)
    _crops: "dict[object, Hint]" = field(default_factory=dict, init=False, repr=False)

    def crop(self, box: Box, canvas: tuple[int, int]) -> "Hint":
        key = box, canvas
        if key not in self._crops:
            top, left, height, width = box
            whole, (above, before, *_) = self.part or (canvas, (0, 0))
            self._crops[key] = Hint(self.picture, (whole, (above + top, before + left, height, width)))
        return self._crops[key]

    def drawn(self, size: tuple[int, int], like: Tensor) -> Tensor:
        """[1, 3, 8h, 8w] for latents of this size, on the device and in the dtype of like."""
        (height, width), box = self.part or (size, (0, 0, *size))
        if box[2:] != size:
            raise ValueError(f"a hint was cut for latents of {list(box[2:])}, and they are {list(size)}")
        picture = upload(self.picture, like.device).float()
        if picture.shape[2:] != (PIXELS * height, PIXELS * width):
            picture = F.interpolate(picture, (PIXELS * height, PIXELS * width), mode="bilinear", antialias=True)
        top, left, h, w = (PIXELS * n for n in box)
        return cut(picture, (top, left, h, w)).to(like.dtype)


@dataclass(frozen=True, eq=False)
class Control(ForRows):
    """A network that steers some rows of a context.

    hints: one per row. factors: of each output, those of the skips and then the middle's, by a name of FACTORS. pooled:
    outputs are averaged over the picture (shuffle). own: what the network sees in place of the rows' tokens, a row for
    each; None: the same tokens as the UNet.
    """

    columns: ClassVar[tuple[str, ...]] = ("hints", "strengths", "own")
    network: ControlNetwork
    hints: tuple[Hint, ...]
    factors: str = ""
    pooled: bool = False
    own: Context | None = None

    def crop(self, box: Box, canvas: tuple[int, int]) -> Self:
        return replace(self, hints=tuple(hint.crop(box, canvas) for hint in self.hints))

    def residuals(self, x: Tensor, t: Tensor, seen: Context, unet: "UNetConfig",
                  stages: int | None = None) -> Residuals:
        """What is added to these rows, for the whole batch's x [B, C, h, w], t [B] and context; stages: see above."""
        weight = self.network.reading()[0]
        if weight.device != x.device:
            raise ValueError(f"the control {self.network.name or type(self.network).__name__} is on {weight.device} "
                             f"and the latents on {x.device}: move it, net.to({str(x.device)!r})")
        self.network.check(unet)
        rows = replace(seen, controls=None, images=None, references=None).take(self.rows)
        if self.own is not None:
            vector = rows.vector if self.own.vector is None else self.own.vector
            rows = replace(rows, tokens=self.own.tokens, mask=self.own.mask, vector=vector)
        read = read_hints(self.network, self.hints, (x.shape[2], x.shape[3]), weight)
        found = self.network.residuals(rows_of(x, self.rows).to(weight.dtype), rows_of(t, self.rows),
                                       rows.to(weight.dtype), read, unet, stages)
        last = len(unet.channel_mult) * (unet.num_res_blocks + 1)  # the middle, after so many input blocks
        skips = {i: self._weighed(out, i, last) for i, out in found.skips.items()}
        middle = None if found.middle is None else self._weighed(found.middle, last, last)
        return Residuals({i: self._scaled(out) for i, out in found.inside.items()}, skips, middle)

    def _weighed(self, out: Tensor, i: int, last: int) -> Tensor:
        if self.pooled:
            out = out.mean((2, 3), keepdim=True)
        return self._scaled(out, FACTORS[self.factors](i, last))

    def _scaled(self, out: Tensor, factor: float = 1.0) -> Tensor:
        return scaled(out, [strength * factor for strength in self.strengths])


# Guess mode, the factor of output i of 0 .. last: none; as ControlNet's authors have it; as diffusers has it.
FACTORS = {"": lambda i, last: 1.0, "ldm": lambda i, last: 0.825 ** (last - i),
           "diffusers": lambda i, last: 10 ** (i / last - 1)}


def read_hints(network: ControlNetwork, hints: Sequence[Hint], size: tuple[int, int],
               like: Tensor) -> tuple[Tensor, ...]:
    """What a network reads in the pictures of its rows, [n, ...] each; every picture is read once."""
    parameters = network.reading()
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in parameters)
    key = size, like.device, like.dtype, tuple((x.data_ptr(), _version(x)) for x in parameters)
    distinct = list(dict.fromkeys(hints))
    known: dict[Hint, tuple[Tensor, ...]] = {}
    for hint in distinct:
        kept = None if learning else hint._read.get(network)
        if kept is not None and kept[0] == key:
            known[hint] = kept[1]
    new = [hint for hint in distinct if hint not in known]
    if new:
        drawn = torch.cat([hint.drawn(size, like) for hint in new])
        for hint, *found in zip(new, *(out.split(1) for out in network.read(drawn))):
            known[hint] = tuple(found)
            if not learning:
                hint._read[network] = key, known[hint]
    if len(distinct) == 1:
        return tuple(out.expand(len(hints), *out.shape[1:]) for out in known[distinct[0]])
    return tuple(torch.cat(outs) for outs in zip(*(known[hint] for hint in hints)))


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Added:
    """What the controls of one call add, in the UNet's dtype."""

    def __init__(self, found: Sequence[tuple[tuple[int, ...], Residuals]], dtype: torch.dtype) -> None:
        self.found, self.dtype = found, dtype

    def inside(self, block: int, x: Tensor) -> Tensor:
        """What leaves an input block, with what is added before it becomes a skip."""
        return self._add(x, [(rows, each.inside.get(block)) for rows, each in self.found])

    def outside(self, middle: Tensor | None, skips: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """What leaves the middle, if it was worked out, and the skips."""
        added = [self._add(skip, [(rows, each.skips.get(i)) for rows, each in self.found])
                 for i, skip in enumerate(skips)]
        if middle is not None:
            middle = self._add(middle, [(rows, each.middle) for rows, each in self.found])
        return middle, added

    def _add(self, x: Tensor, terms: Sequence[tuple[tuple[int, ...], Tensor | None]]) -> Tensor:
        for rows, term in terms:
            if term is not None:
                size = x if term.shape[2:] != (1, 1) else term  # a change in the UNet may have made features smaller
                x = add_to_rows(x, rows, resized(term.to(self.dtype), size))
        return x


def added(seen: Context, x: Tensor, t: Tensor, unet: "UNetConfig", stages: int | None = None) -> Added:
    """What the controls of a context add to the features of a UNet that runs so many input blocks, None for all.

    Raises ValueError for one that does not fit the UNet.
    """
    return Added([(control.rows, control.residuals(x, t, seen, unet, stages)) for control in seen.controls or ()],
                 x.dtype)
