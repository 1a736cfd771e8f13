"""What is asked of the inside of the UNet: the part of a `Request` that is about it."""

import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ella_kd.models.freeu import FreeU
from ella_kd.models.hidiffusion import Shrink, hidiffusion
from ella_kd.models.inside import Change, with_changes
from ella_kd.models.tome import ToMe

if TYPE_CHECKING:
    from ella_kd.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class FromInside:
    """What changes inside the UNet (`ella_kd.models.inside`), with the published numbers of the model's family.

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

    def check_inside(self) -> None:
        ToMe(self.tome)
        if self.hidiffusion and (self.tome or self.deep_shrink):
            raise ValueError("hidiffusion changes the finest self-attention, as tome does, and the deeper features, as "
                             "deep_shrink does: choose one")

    def changed(self, pipeline: "Pipeline", width: int, height: int, from_text: bool = True) -> "Pipeline":
        """The pipeline with these changes, for pictures of this size; itself without any.

        from_text: nothing of a picture is kept. Warns of what is for larger pictures alone.
        """
        unet, changes = pipeline.unet, list[Change]()
        if self.hidiffusion or self.deep_shrink:
            if max(width, height) <= pipeline.size:
                warnings.warn(f"{'hidiffusion' if self.hidiffusion else 'deep_shrink'} is for pictures larger than the "
                              f"model's own {pipeline.size} px, and leaves {width}x{height} as it is", stacklevel=4)
            elif self.hidiffusion:
                sides = height // pipeline.vae.factor, width // pipeline.vae.factor
                changes += hidiffusion(unet, *sides, aggressive=from_text)
            else:
                changes.append(Shrink())
        if self.tome:
            changes.append(ToMe(self.tome))
        if self.freeu:
            changes.append(FreeU.of(unet))
        return replace(pipeline, unet=with_changes(unet, *changes)) if changes else pipeline
