"""What changes inside a UNet by sigma: values that a UNet is given with each call. Nothing is patched in place.

`Inside(unet, FreeU.sd15(), ToMe(0.5))` is a network as the UNet is, which shares its tensors; give it to a denoiser, or
to a pipeline, `replace(sd, unet=Inside(sd.unet, ...))`. A change of your own is a frozen dataclass:

    @dataclass(frozen=True)
    class LouderSkips(Change):
        factor: float = 1.1

        def joined(self, n, x, skip):
            return x, skip * self.factor

    network = Inside(unet, LouderSkips(1.2, sigma_lo=1.0))
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Self

from torch import Tensor

from ella_kd.models.around import Around, AroundOne
from ella_kd.models.context import Context
from ella_kd.models.network import Deep, Levels, Patches, check_window, within
from ella_kd.models.networks import ByRow
from ella_kd.models.patches import Patch
from ella_kd.models.unet import UNet


@dataclass(frozen=True, kw_only=True)
class Change:
    """What all rows do differently where sigma_lo < sigma <= sigma_hi; a value, this one changes nothing.

    Stages are numbered as the UNet's input_blocks and output_blocks are. Raises ValueError for an empty window.
    """

    sigma_hi: float = math.inf
    sigma_lo: float = 0.0

    def __post_init__(self) -> None:
        check_window(self.sigma_lo, self.sigma_hi)

    def on(self, unet: UNet) -> "Change":
        """The same, with what it leaves to the UNet filled in. ValueError where the UNet has no place for it."""
        return self

    def at(self, level: float) -> "Change | None":
        """What it is at a sigma; None where it changes nothing."""
        return self if within(level, self.sigma_lo, self.sigma_hi) else None

    @property
    def patches(self) -> tuple[Patch, ...]:
        """What the rows do in place of transformer blocks."""
        return ()

    def wider(self, n: int) -> int:
        """How many times wider the stride of input_blocks[n] is, which makes features smaller; 1 as it is."""
        return 1

    def apart(self, part: str, level: int) -> int:
        """How many pixels apart the weights of 3x3 convolutions stand, 1 as they are; part: "down", "middle" or "up",
        level: 0 the finest; the convolution between two levels is of the one it leaves."""
        return 1

    def before_skip(self, n: int, x: Tensor) -> Tensor:
        """x [B, C, h, w] after input_blocks[n], before it is kept for the way up: it may get another size."""
        return x

    def after_skip(self, n: int, x: Tensor) -> Tensor:
        """x after input_blocks[n], once it is kept, so for the way down alone: it may get another size."""
        return x

    def joined(self, n: int, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """x and the skip, of one size now, before output_blocks[n] sees them as one."""
        return x, skip


class Inside(AroundOne):
    """A UNet with changes, a `models.network.Network`: `Inside(unet, FreeU(1.5, 1.6, 0.9, 0.2), ...)`.

    At a sigma where none of the changes holds it is the UNet itself. Changes act in the order given; what a guidance
    rule or a condition patches for rows of its own comes before them. The UNet may be compiled, or be `fast_on_cpu`,
    before or after. Raises TypeError for another network, ValueError for two changes of one transformer at one sigma.
    """

    changes: tuple[Change, ...]

    def __init__(self, unet: "UNet | Inside", *changes: Change) -> None:
        super().__init__()
        inner = unet.unet if isinstance(unet, Inside) else unet
        if not isinstance(inner, UNet):
            raise TypeError(f"Inside changes ella_kd's own UNet, got {type(unet).__name__}: put other networks around "
                            "it, with_changes(network, ...) does so for networks by sigma and by row")
        for change in changes:
            if not isinstance(change, Change):
                raise TypeError(f"Inside takes changes, such as FreeU(), got {type(change).__name__}")
        self.network = inner
        before = unet.changes if isinstance(unet, Inside) else ()
        self.changes = (*before, *(change.on(inner) for change in changes))
        self.now: tuple[Change, ...] = ()  # what holds, once sigma is known
        for one, other in combinations(self.changes, 2):
            both = set(_places(one)) & set(_places(other))
            if both and max(one.sigma_lo, other.sigma_lo) < min(one.sigma_hi, other.sigma_hi):
                raise ValueError(f"{type(one).__name__} and {type(other).__name__} both change {min(both)}: give them "
                                 "windows of sigma that do not meet, or other places")

    @property
    def unet(self) -> UNet:
        return self.network

    def of(self, network: Any, *others: Any) -> Self:
        """The same changes of another UNet."""
        return type(self)(network, *self.changes)

    def at(self, levels: Levels) -> Any:
        now = [tuple(found for change in self.changes if (found := change.at(level)) is not None) for level in levels]
        networks = {changes: self._with(changes) for changes in now}
        return ByRow([networks[changes] for changes in now]) if len(networks) > 1 else networks[now[0]]

    def _with(self, changes: tuple[Change, ...]) -> "UNet | Self":
        """With these changes at any sigma."""
        if not changes:
            return self.unet
        twin = copy(self)
        twin.now = changes
        return twin

    def forward(self, x: Tensor, t: Tensor, context: Context, patches: Patches = (),
                deep: Deep | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if not self.now:
            raise ValueError("what changes inside a UNet is decided by sigma, and t does not tell it: call "
                             "network.at((sigma,))(x, t, context), as a denoiser does")
        return self.unet(x, t, context, patches, self.now, deep)


def with_changes(network: Any, *changes: Change) -> Any:
    """A network with changes in every UNet of it: of networks around others, each."""
    if not changes:
        return network
    if isinstance(network, Around) and not isinstance(network, Inside):
        return network.each(lambda one: with_changes(one, *changes))
    return Inside(network, *changes)


def _places(change: Change) -> Sequence[str]:
    return [place for patch in change.patches for place in patch.places]


def places_on(unet: UNet, places: Sequence[str]) -> tuple[str, ...]:
    """These transformers of a UNet, or without any those of `finest`. ValueError for one that it has not."""
    unknown = set(places) - set(unet.places)
    if unknown or not unet.places:
        raise ValueError(f"this UNet has no transformer {min(unknown, default='with self-attention')}: choose from "
                         f"{', '.join(unet.places)}")
    return tuple(places) or finest(unet)


def finest(unet: UNet) -> tuple[str, ...]:
    """The transformers that can be patched at the finest level that has some, from input to output."""
    levels, blocks = len(unet.config.channel_mult), unet.config.num_res_blocks + 1

    def level(place: str) -> int:
        part, n = place.split(".")[:2]
        return {"input_blocks": int(n) // blocks, "output_blocks": levels - 1 - int(n) // blocks}.get(part, levels)

    levels_of = {place: level(place) for place in unet.places}
    return tuple(place for place, found in levels_of.items() if found == min(levels_of.values()))
