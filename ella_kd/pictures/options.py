"""What is asked of a picture to start from: the part of a `Request` that is about it."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from ella_kd.pictures.masks import read_sides
from ella_kd.pictures.start import CONVENTIONS, Convention, check_strength

Fill = Literal["original", "noise", "blur", "nothing"]
FILLS: tuple[Fill, ...] = get_args(Fill)
SOURCES = ("start", "mask", "strength_map")


@dataclass(frozen=True, kw_only=True)
class FromPicture:
    """A picture to start from, how far it may change, and where.

    start, mask, strength_map: files, or PIL images. strength: None for 0.6, or 1 where a mask, a map or `extend` says
    what is repainted; 1 is from noise alone. mask_blur: None for half a latent's pixels. Raises ValueError or TypeError
    for what no picture can have, and for an option without the picture that it is about.
    """

    start: str | Image.Image | None = field(default=None, metadata={
        "help": "A picture to start from.", "metavar": "PICTURE"})
    strength: float | None = field(default=None, metadata={
        "help": "How far the start picture may change, 0 to 1: from the noise of timestep strength * 999 on.  "
                "[default: 0.6; with a mask 1]", "type": float})
    convention: Convention = field(default="level", metadata={
        "help": "What strength means: level, the same noise on every schedule, or what another program makes of it.",
        "choices": CONVENTIONS})
    mask: str | Image.Image | None = field(default=None, metadata={
        "help": "Where the start picture is repainted: white.  [default: where it is transparent]",
        "metavar": "PICTURE"})
    invert_mask: bool = field(default=False, metadata={"help": "Repaint what is black."})
    mask_grow: int = field(default=0, metadata={
        "help": "Make what is repainted larger by so many pixels, or smaller.", "metavar": "PX", "type": int})
    mask_blur: float | None = field(default=None, metadata={
        "help": "Soften the edge along which the drawn part is pasted.  [default: half a latent]", "metavar": "PX",
        "type": float})
    fill: Fill = field(default="original", metadata={
        "help": "What is repainted starts, below strength 1, from this.", "choices": FILLS})
    crop_to_mask: bool = field(default=False, metadata={
        "help": "Draw only what the mask is on, at the full size, and paste it back."})
    padding: int = field(default=32, metadata={
        "help": "With --crop-to-mask, what is drawn around the mask.", "metavar": "PX", "least": 0})
    strength_map: str | Image.Image | None = field(default=None, metadata={
        "help": "A strength per pixel, white --strength and black none.", "metavar": "PICTURE"})
    extend: str = field(default="", metadata={
        "help": "Draw on beyond the picture's sides: left=64,top=0.", "metavar": "SIDES"})
    repeats: int = field(default=1, metadata={
        "help": "Take every step so many times, so that what is repainted agrees better with the rest.", "least": 1})
    match_colours: bool = field(default=False, metadata={
        "help": "Bring the drawn picture's colours back to those of the start picture."})

    def __post_init__(self) -> None:
        for name in SOURCES:
            value = getattr(self, name)
            if isinstance(value, Path):
                object.__setattr__(self, name, str(value))
            elif not isinstance(value, (str, Image.Image, type(None))):
                raise TypeError(f"{name} is a picture's file or a PIL image, got {type(value).__name__}")
        for name, known in (("convention", CONVENTIONS), ("fill", FILLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose {', '.join(known)}")
        if self.strength is not None:
            check_strength(self.strength)
        if self.mask_blur is not None and not 0 <= self.mask_blur < math.inf:
            raise ValueError(f"mask_blur is a number of pixels, 0 or more, got {self.mask_blur}")
        if self.extend:
            read_sides(self.extend)
        if self.start is None:
            given = [each.name for each in fields(FromPicture) if getattr(self, each.name) != each.default]
            if given:
                raise ValueError(f"{given[0]} is about a start picture: give it as start")
        if self.crop_to_mask and (self.extend or self.strength_map is not None):
            raise ValueError("crop_to_mask draws a part of the picture: it goes with a mask, without extend or "
                             "strength_map")

    @property
    def sides(self) -> dict[str, int]:
        return read_sides(self.extend) if self.extend else {}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(each.name for each in fields(FromPicture))

    def about_picture(self) -> dict[str, Any]:
        """Its fields alone, of a value that has more."""
        return {name: getattr(self, name) for name in self.names()}
