"""What is asked of the network itself, whatever the prompt: the part of a `Request` that is about it."""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ella_kd.models.freeu import FreeU
from ella_kd.models.hidiffusion import Shrink, WiderStride, after, hidiffusion
from ella_kd.models.inside import Change, finest, with_changes
from ella_kd.models.network import above
from ella_kd.models.reuse import Reuse
from ella_kd.models.tiled import Tiled
from ella_kd.models.tome import ToMe

if TYPE_CHECKING:
    from ella_kd.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class FromInside:
    """What changes inside the UNet (`ella_kd.models.inside`), with the published numbers of the model's family, and how
    it is asked: in tiles, and not for everything at every step.

    Raises ValueError for a ratio that cannot be, and for two that change the same.
    """

    freeu: bool = field(default=False, metadata={
        "help": "FreeU: the UNet leans more on its deep features, less on those it passes by.", "label": "FreeU"})
    tome: float = field(default=0.0, metadata={
        "help": "Merge this share of the pixels in the finest self-attention, 0 to 0.75: faster, 0.5 as published.",
        "metavar": "RATIO", "label": "Token merging ratio"})
    hidiffusion: bool = field(default=False, metadata={
        "help": "For pictures larger than the model's own: fewer doubles, and faster.", "label": "HiDiffusion"})
    deep_shrink: bool = field(default=False, metadata={
        "help": "For pictures larger than the model's own: fewer doubles.", "label": "Deep shrink"})
    tile: str = field(default="", metadata={
        "help": "Draw in overlapping tiles of this side, in px: for large pictures whose prompt is true of each part, "
                "512:64.", "metavar": "SIDE:OVERLAP", "label": "Tile"})

    reuse: str | None = field(default=None, metadata={
        "help": "Work the UNet's deep features out once for so many steps, and the answer about the negative prompt "
                "for so many: 3, or 3:2. Faster, less exact.", "metavar": "N"})

    def check_inside(self) -> None:
        ToMe(self.tome)
        if self.reuse is not None:
            object.__setattr__(self, "reuse", ":".join(map(str, self.reused)))
        if self.hidiffusion and (self.tome or self.deep_shrink):
            raise ValueError("hidiffusion changes the finest self-attention, as tome does, and the deeper features, as "
                             "deep_shrink does: choose one")
        if self.tile and (self.hidiffusion or self.deep_shrink):
            raise ValueError("tiles have the size that the model knows, which hidiffusion and deep_shrink are not for: "
                             "choose one")
        if self.tile and getattr(self, "tiling", False):
            raise ValueError("with tiling each tile would meet itself at its edges: choose tile or tiling")
        if self.tile and self.reuse is not None and self.reused[0] > 1:
            raise ValueError("reuse keeps the deep features of a whole picture, and tile draws it in parts: leave one "
                             f"out, or reuse the answer about the negative prompt alone, 1:{self.reused[0]}")
        self.tiles(1)

    def tiles(self, factor: int) -> tuple[int, int] | None:
        """Side and overlap of `tile` in latents of `factor` px; None without. ValueError for what cannot be one."""
        if not self.tile:
            return None
        if not isinstance(self.tile, str):
            raise TypeError(f"tile is a text, 512:64, got {self.tile!r}")
        side, mark, overlap = self.tile.partition(":")
        numbers = [int(n) if n.isdecimal() else -1 for n in (side, overlap if mark else "0")]
        if not 0 <= numbers[1] < numbers[0] or any(n % factor for n in numbers):
            raise ValueError("tile is a side and an overlap less than it, in px"
                             f"{f', multiples of {factor}' * (factor > 1)}: 512:64, got {self.tile!r}")
        return numbers[0] // factor, numbers[1] // factor

    @property
    def reused(self) -> tuple[int, ...]:
        """For how many steps deep features and the uncond's answer are worked out once: what `Reuse` takes."""
        found = re.fullmatch(r"([1-9][0-9]*)(?::([1-9][0-9]*))?", str(self.reuse).strip())
        if not found:
            raise ValueError(f"reuse is how many steps share the deep features, 3, and perhaps the uncond, 3:2, got "
                             f"{self.reuse!r}")
        return tuple(int(number) for number in found.groups() if number)

    def changed(self, pipeline: "Pipeline", width: int, height: int, from_text: bool = True,
                first: bool = False, begins: float = math.inf) -> "Pipeline":
        """The pipeline with these changes, for pictures of this size; itself without any.

        from_text: nothing of a picture is kept. first: a larger pass follows; else it warns of what is for larger
        pictures alone. begins: the sigma that the run begins at.
        """
        unet, changes = pipeline.unet, list[Change]()
        if self.hidiffusion or self.deep_shrink:
            if max(width, height) <= pipeline.size:
                if not first:
                    name = "hidiffusion" if self.hidiffusion else "deep_shrink"
                    warnings.warn(f"{name} is for pictures larger than the model's own {pipeline.size} px, and leaves "
                                  f"{width}x{height} as it is", stacklevel=4)
            elif self.hidiffusion:
                sides = height // pipeline.vae.factor, width // pipeline.vae.factor
                changes += hidiffusion(unet, *sides, aggressive=from_text, schedule=pipeline.noise_schedule,
                                       begins=begins)
                _warn_of_odd(width, height, _halved(unet, changes) * pipeline.vae.factor)
            else:
                change = Shrink(sigma_lo=after(0.35, pipeline.noise_schedule))
                if not above(begins, change.sigma_lo):
                    warnings.warn(f"deep_shrink acts above sigma {change.sigma_lo:.3g}, and this run begins at "
                                  f"{begins:.3g}, below it: give it more strength, or take hidiffusion", stacklevel=4)
                changes.append(change)
        if self.tome:
            changes.append(ToMe(self.tome))
        if self.freeu:
            changes.append(FreeU.of(unet))
        network, tiles = with_changes(unet, *changes) if changes else unet, self.tiles(pipeline.vae.factor)
        if tiles is not None and max(width, height) > tiles[0] * pipeline.vae.factor:
            network = Tiled(network, *tiles)
        if self.reuse is not None:
            network = Reuse(network, *self.reused)
        return pipeline if network is unet else replace(pipeline, unet=network)


def _halved(unet: Any, changes: Sequence[Change]) -> int:
    """Latents' sides that are a multiple of this are even where HiDiffusion attends in windows, and whole before."""
    blocks = unet.config.num_res_blocks + 1
    last = max((int(place.split(".")[1]) for place in finest(unet) if place.startswith("input_blocks")), default=0)
    smaller = sum(isinstance(change, (Shrink, WiderStride)) and change.stage < last for change in changes)
    return int(2 ** (last // blocks + smaller + 1))


def _warn_of_odd(width: int, height: int, unit: int) -> None:
    if width % unit or height % unit:
        near = "x".join(str(max(1, round(side / unit)) * unit) for side in (width, height))
        warnings.warn(f"hidiffusion halves {width}x{height} unevenly, which costs quality: sides in multiples of "
                      f"{unit} px are even, such as {near}", stacklevel=5)
