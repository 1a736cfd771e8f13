"""What is asked of a run's noise and of a picture to start from: the parts of a `Request` that are about them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from ella_kd.pictures.masks import read_sides
from ella_kd.pictures.start import CONVENTIONS, Convention, check_strength

Fill = Literal["original", "noise", "blur", "nothing"]
FILLS: tuple[Fill, ...] = get_args(Fill)
SHOWN = ("foreground", "background")  # to a network that relights, with a start picture or without
SOURCES = ("start", "mask", "strength_map", "depth", *SHOWN)


@dataclass(frozen=True, kw_only=True)
class FromNoise:
    """Where a run's noise comes from and goes to, where that is not the seed, the schedule and the method alone.

    variation: how far the first noise lies on the arc to that of variation_seed. latents: a file of `ella-kd invert`.
    Raises ValueError or TypeError for what no run can have.
    """

    variation: float = field(default=0.0, metadata={
        "help": "How far the picture goes towards that of --variation-seed, 0 to 1.",
        "label": "Variation seed strength"})
    variation_seed: int = field(default=0, metadata={"help": "See --variation.", "metavar": "SEED", "least": 0})
    eta: float | None = field(default=None, metadata={
        "help": "The sampler's share of added noise.  [default: its own]", "type": float})
    s_noise: float | None = field(default=None, metadata={
        "help": "The amplitude of added noise.  [default: its own]", "type": float})
    s_churn: float | None = field(default=None, metadata={
        "help": "Noise added before each step, by euler, heun and dpm_2.  [default: none]", "type": float})
    sigmas: tuple[float, ...] | None = field(default=None, metadata={
        "help": "The noise levels themselves, in place of --schedule and --steps: 14.6,5,1,0.", "metavar": "NUMBERS"})
    latents: str | None = field(default=None, metadata={
        "help": "Latents to start from, of ella-kd invert, in place of noise.", "metavar": "FILE"})

    def __post_init__(self) -> None:
        if not 0 <= self.variation <= 1:
            raise ValueError(f"variation is a share from 0 to 1, got {self.variation}")
        for name in ("eta", "s_noise", "s_churn"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is a number of 0 or more, got {value}")
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", _numbers(self.sigmas))
        if self.latents is not None:
            object.__setattr__(self, "latents", str(self.latents))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The class's fields, where a value has more."""
        return tuple(each.name for each in fields(cls))

    @property
    def of_method(self) -> dict[str, float]:
        """The method's own options that are given."""
        given = {name: getattr(self, name) for name in ("eta", "s_noise", "s_churn")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class FromPicture(FromNoise):
    """A picture to start from, how far it may change, and where.

    start, mask, strength_map, depth, foreground, background: files, or PIL images. strength: None for 0.6, or 1 where a
    mask, a map or `extend` says what is repainted; 1 is from noise alone. mask_blur: None for half a latent's pixels.
    Raises ValueError or TypeError for what no picture can have, and for an option without the picture that it is about.
    """

    start: str | Image.Image | None = field(default=None, metadata={
        "help": "A picture to start from.", "metavar": "PICTURE"})
    strength: float | None = field(default=None, metadata={
        "help": "How far the start picture may change, 0 to 1: from the noise of timestep strength * 999 on.  "
                "[default: 0.6; with a mask 1]", "type": float, "label": "Denoising strength"})
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
    depth: str | Image.Image | None = field(default=None, metadata={
        "help": "How far things are, white near, for a network that sees it (depth2img).", "metavar": "PICTURE"})
    noise_level: int = field(default=20, metadata={
        "help": "With the x4 upscaler, how much noise the start picture gets, 0 to 350.", "metavar": "N", "least": 0})
    foreground: str | Image.Image | None = field(default=None, metadata={
        "help": "What a network that relights (IC-Light) shows in another light; best transparent around it.",
        "metavar": "PICTURE"})
    background: str | Image.Image | None = field(default=None, metadata={
        "help": "What is behind it, for a network that sees both.", "metavar": "PICTURE"})
    extend: str = field(default="", metadata={
        "help": "Draw on beyond the picture's sides: left=64,top=0.", "metavar": "SIDES"})
    repeats: int = field(default=1, metadata={
        "help": "Take every step so many times, so that what is repainted agrees better with the rest.", "least": 1})
    match_colours: bool = field(default=False, metadata={
        "help": "Bring the drawn picture's colours back to those of the start picture."})

    def __post_init__(self) -> None:
        super().__post_init__()
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
        own = [each for each in fields(FromPicture) if each.name not in (*FromNoise.__dataclass_fields__, *SHOWN)]
        if self.start is None and (given := [e.name for e in own if getattr(self, e.name) != e.default]):
            raise ValueError(f"{given[0]} is about a start picture: give it as start")
        if self.background is not None and self.foreground is None:
            raise ValueError("a background is behind a foreground: give both")
        if self.start is not None and self.latents is not None:
            raise ValueError("give a start picture or latents, not both: latents are x at the first noise level")
        if self.crop_to_mask and (self.extend or self.strength_map is not None or self.depth is not None):
            raise ValueError("crop_to_mask draws a part of the picture: it goes with a mask, without extend, "
                             "strength_map or depth")
        if self.depth is not None and self.extend:
            raise ValueError("a depth picture is of the whole: draw it without extend")

    @property
    def shown(self) -> dict[str, str | Image.Image]:
        """The pictures for a network that relights, those that are given."""
        return {name: getattr(self, name) for name in SHOWN if getattr(self, name) is not None}

    @property
    def sides(self) -> dict[str, int]:
        return read_sides(self.extend) if self.extend else {}


def _numbers(given: object) -> tuple[float, ...]:
    """Noise levels, as text too. ValueError for what is no falling list of them."""
    parts: Iterable[Any] = given.split(",") if isinstance(given, str) else given  # type: ignore[assignment]
    try:
        found = tuple(float(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sigmas are numbers, 14.6,5,1,0, got {given!r}") from error
    if len(found) < 2 or any(not b < a for a, b in pairwise(found)) or found[-1] < 0:
        raise ValueError(f"sigmas fall from the first noise level to the last, 0 or above, got {given!r}")
    return found
