"""What is asked of a second pass over an enlarged picture, hires fix, and what the AUTOMATIC1111 web UI calls it."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from PIL import Image

from ella_kd.pictures.start import check_strength
from ella_kd.samplers.names import a1111_sampler, a1111_schedule, sampler_named, schedule_named

Size = tuple[int, int]  # width, height
Upscaler = str | Callable[[Image.Image], Image.Image]
"""A name of `LATENTS` or `PIXELS`, the file of a network, or a function that makes a picture larger."""

LATENTS = {"latent": ("bilinear", False), "latent (antialiased)": ("bilinear", True),
           "latent (bicubic)": ("bicubic", False), "latent (bicubic antialiased)": ("bicubic", True),
           "latent (nearest)": ("nearest", False), "latent (nearest-exact)": ("nearest-exact", False)}
PIXELS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC,
          "bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}
# The web UI's names of networks, and the files that it fetches for them, without their ending.
WEB_UI = {"r-esrgan 2x+": "RealESRGAN_x2plus", "r-esrgan 4x+": "RealESRGAN_x4plus",
          "r-esrgan 4x+ anime6b": "RealESRGAN_x4plus_anime_6B", "r-esrgan general 4xv3": "realesr-general-x4v3",
          "r-esrgan general wdn 4xv3": "realesr-general-wdn-x4v3", "r-esrgan animevideo": "realesr-animevideov3",
          "swinir 4x": "SwinIR_4x", "dat x2": "DAT_x2", "dat x3": "DAT_x3", "dat x4": "DAT_x4"}
FUNCTION = "the function "
STRENGTH, IN_TILES = 0.5, 0.3  # where nobody says
_TILES = re.compile(r"tiles:(\d*\.?\d+)(?::(\d*\.?\d+))?")
_SAID = re.compile(r"(?:(\d+)x(\d+)|(\d*\.?\d+))?(?::(\d*\.?\d+))?")


@dataclass(frozen=True)
class Enlargement:
    """How large and how strong: scale, size, or neither for the picture's own size after a smaller first pass. A side
    of 0 follows the proportions, as in the web UI."""

    scale: float | None = None
    size: Size | None = None
    strength: float = STRENGTH

    @classmethod
    def read(cls, said: object) -> "Enlargement":
        """Of "2:0.5", "1536x1024:0.5", ":0.5", or one number: a scale above 1, else a strength. ValueError for others.
        """
        found = _SAID.fullmatch(str(said).strip())
        if not found or not any(found.groups()):
            raise ValueError(f"hires is SCALE:STRENGTH, such as 2:0.5, WIDTHxHEIGHT:STRENGTH, or :STRENGTH for the "
                             f"picture's own size, got {said!r}")
        width, height, scale, strength = found.groups()
        if width and not int(width) + int(height):
            raise ValueError(f"hires enlarges to a width or a height of at least 1, got {said!r}")
        if scale and not strength and float(scale) <= 1:
            scale, strength = None, scale
        if scale:
            check_scale("hires", float(scale))
        return cls(float(scale) if scale else None, (int(width), int(height)) if width else None,
                   check_strength(float(strength) if strength else STRENGTH))

    def __str__(self) -> str:
        how = f"{self.size[0]}x{self.size[1]}" if self.size else "" if self.scale is None else f"{self.scale:g}"
        return f"{how}:{self.strength:g}"

    def sizes(self, given: Size, own: Size, factor: int) -> tuple[Size, Size]:
        """Of both passes in whole latents: given is the first one's, or where neither scale nor size is said the
        second one's, after a first of the model's own area and of these proportions, in multiples of 8 latents."""
        if self.size is not None:
            width, height = self.size
            width = width or max(1, round(height * given[0] / given[1] / factor)) * factor
            height = height or max(1, round(width * given[1] / given[0] / factor)) * factor
            return given, (width, height)
        if self.scale is not None:
            width, height = (max(1, round(side * self.scale / factor)) * factor for side in given)
            return given, (width, height)
        shrunk = min(1.0, math.sqrt(own[0] * own[1] / (given[0] * given[1])))
        unit = factor * (8 if min(own) >= 64 * factor else 1)
        width, height = (max(1, round(side * shrunk / unit)) * unit if shrunk < 1 else side for side in given)
        return (width, height), given


@dataclass(frozen=True)
class InTiles:
    """By how much a picture is enlarged, and how far it may change: "tiles:2" or "tiles:2:0.3"."""

    scale: float
    strength: float = IN_TILES

    @classmethod
    def read(cls, said: str) -> "InTiles":
        """Raises ValueError for another text."""
        found = _TILES.fullmatch(said.strip())
        if not found:
            raise ValueError(f"upscale is tiles:SCALE or tiles:SCALE:STRENGTH, tiles:2:0.3, got {said!r}")
        check_scale("upscale", float(found[1]))
        return cls(float(found[1]), check_strength(float(found[2] or IN_TILES)))

    def __str__(self) -> str:
        return f"tiles:{self.scale:g}:{self.strength:g}"


@dataclass(frozen=True, kw_only=True)
class FromHires:
    """A second pass over the picture, enlarged, as img2img of it: A1111's hires fix. None: as in the first pass.

    strength: as in A1111 and ComfyUI, the last hires_steps + 1 levels of a schedule of int(hires_steps / strength).
    hires_upscaler: a name of `LATENTS` or `PIXELS`, a network's file, or a function of a PIL image.
    """

    hires: str | None = field(default=None, metadata={
        "help": "Enlarge the picture and draw over it: SCALE:STRENGTH (2:0.5), WIDTHxHEIGHT:STRENGTH, or :STRENGTH for "
                "--width and --height after a first pass of the model's own size.", "metavar": "HOW"})
    hires_upscaler: Upscaler = field(default="lanczos", metadata={
        "help": "How it is enlarged: latent, latent (nearest-exact) ..., lanczos, bicubic ..., or a network's file.",
        "metavar": "NAME"})
    upscale: str | None = field(default=None, metadata={
        "help": "Enlarge the start picture, or what was drawn, and draw over it tile by tile: tiles:SCALE:STRENGTH, "
                "tiles:2:0.3.", "metavar": "HOW"})
    hires_steps: int | None = field(default=None, metadata={
        "help": "Steps of the second pass.  [default: --steps]", "metavar": "N", "least": 1})
    hires_sampler: str | None = field(default=None, metadata={
        "help": "[default: --sampler]", "metavar": "NAME"})
    hires_schedule: str | None = field(default=None, metadata={
        "help": "[default: --schedule]", "metavar": "NAME"})
    hires_scale: float | None = field(default=None, metadata={
        "help": "Guidance of the second pass.  [default: as the first one's]", "type": float})
    hires_prompt: str | None = field(default=None, metadata={
        "help": "[default: the prompt]", "metavar": "TEXT"})
    hires_negative: str | None = field(default=None, metadata={
        "help": "[default: --negative]", "metavar": "TEXT"})

    def check_hires(self) -> None:
        """Brings the fields to our spelling. Raises ValueError or TypeError for what no second pass can have."""
        def own(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        own("hires_upscaler", check_upscaler(self.hires_upscaler))
        if not isinstance(self.upscale, (str, type(None))):
            raise TypeError(f"upscale is a text, tiles:2:0.3, got {self.upscale!r}")
        own("upscale", self.upscale and str(InTiles.read(self.upscale)))
        if self.hires in (None, ""):
            own("hires", None)
            allowed = {"upscale", "hires_upscaler"} if self.upscale else set()
            if given := [name for name, each in FromHires.__dataclass_fields__.items()
                         if name not in allowed and getattr(self, name) != each.default]:
                raise ValueError(f"{given[0]} is about a second pass: give hires, such as 2:0.5")
            return
        own("hires", str(Enlargement.read(self.hires)))
        if getattr(self, "start", None) is not None:
            raise ValueError("hires draws over what was drawn from noise: a start picture is enlarged by width and "
                             "height, or by upscale")
        if self.hires_sampler is not None:
            own("hires_sampler", sampler_named(self.hires_sampler)[0])
        if self.hires_schedule is not None:
            own("hires_schedule", schedule_named(self.hires_schedule))

    @property
    def enlarged_by(self) -> str | None:
        """The file of the network that enlarges, if one does."""
        name = self.hires_upscaler
        asked = isinstance(name, str) and (self.hires, self.upscale) != (None, None)
        return name if asked and name not in LATENTS and name not in PIXELS else None  # type: ignore[return-value]

    def second(self) -> dict[str, Any]:
        """What the second pass asks for in other words than the first."""
        given = {name: getattr(self, f"hires_{name}")
                 for name in ("prompt", "negative", "sampler", "schedule", "steps", "scale")}
        return {name: value for name, value in given.items() if value is not None}


def check_scale(what: str, scale: float) -> None:
    """TypeError for what is no number, ValueError for one that makes a picture smaller, or beyond all sizes."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{what} enlarges a picture by a number, got {scale!r}")
    if not 1 <= scale <= 64:
        raise ValueError(f"{what} enlarges a picture, by 1 to 64, got {scale:g}")


NO_SECOND = {name: each.default for name, each in FromHires.__dataclass_fields__.items() if name != "upscale"}


def check_upscaler(upscaler: object) -> Upscaler:
    """A name in our spelling. Raises TypeError for what is neither a name nor a function."""
    if isinstance(upscaler, Path):
        return str(upscaler)
    if not isinstance(upscaler, str):
        if not callable(upscaler):
            raise TypeError("an upscaler is a name, the file of a network, or a function of a PIL image, got "
                            f"{type(upscaler).__name__}")
        return upscaler
    name = upscaler.strip().lower()
    name = "lanczos" if name == "none" else name  # the web UI's: by nothing but the resizing that comes after
    return name if name in LATENTS or name in PIXELS else upscaler


def no_upscaler(name: str) -> str:
    """What to say where no file has this name."""
    if name.startswith(FUNCTION):
        return f"the picture was enlarged by {name}, which settings cannot hold: give it again as hires_upscaler"
    if name.lower() in WEB_UI:
        return (f"{name} is what the web UI calls the network {WEB_UI[name.lower()]}.pth: give that file, or let it "
                "lie in the folder of --models-dir")
    if name.lower() == "ldsr":
        return "LDSR is a diffusion model of the web UI's own: choose the file of a network (ESRGAN, SwinIR, DAT ...)"
    near = get_close_matches(name.lower(), (*LATENTS, *PIXELS), 1)
    return f"no upscaler at {name}: " + (f"did you mean {near[0]}?" if near else f"choose {', '.join(LATENTS)}, "
                                         f"{', '.join(PIXELS)}, or the file of a network (ESRGAN, SwinIR, DAT ...)")


def upscaler_said(upscaler: Upscaler) -> str:
    """As the web UI has it: "Latent (nearest)"."""
    if not isinstance(upscaler, str):
        return f"{FUNCTION}{getattr(upscaler, '__name__', type(upscaler).__name__)}"
    return upscaler.capitalize() if upscaler in LATENTS or upscaler in PIXELS else upscaler


def write(values: Mapping[str, Any]) -> dict[str, Any]:
    """The web UI's words for a request's fields about hires."""
    if values["hires"] is None:
        return {} if values["upscale"] is None else {
            "Upscale": values["upscale"], "Hires upscaler": upscaler_said(values["hires_upscaler"])}
    how, named = Enlargement.read(values["hires"]), values["hires_sampler"]
    scheduled = values["hires_schedule"]
    return {"Upscale": values["upscale"], "Denoising strength": f"{how.strength:g}",
            "Hires upscale": None if how.scale is None else f"{how.scale:g}",
            "Hires resize": None if how.size is None else f"{how.size[0]}x{how.size[1]}",
            "Hires steps": values["hires_steps"], "Hires upscaler": upscaler_said(values["hires_upscaler"]),
            "Hires sampler": None if named is None else a1111_sampler(named),
            "Hires schedule type": None if scheduled is None else a1111_schedule(scheduled),
            "Hires CFG Scale": None if values["hires_scale"] is None else f"{values['hires_scale']:g}",
            "Hires prompt": values["hires_prompt"], "Hires negative prompt": values["hires_negative"]}


def read(given: dict[str, str]) -> dict[str, Any]:
    """A request's fields of the web UI's words, which are taken out of given."""
    if "Hires upscaler" not in given:
        return {}
    larger = {"upscale": given.pop("Upscale")} if "Upscale" in given else {}
    if larger and "Denoising strength" not in given:
        return {**larger, "hires_upscaler": given.pop("Hires upscaler")}
    scale, size = given.pop("Hires upscale", None), given.pop("Hires resize", None)
    strength = given.pop("Denoising strength", f"{STRENGTH}")
    found: dict[str, Any] = {**larger, "hires": f"{size or scale or ''}:{strength}"}
    for label, name, kind in (("Hires upscaler", "upscaler", str), ("Hires steps", "steps", int),
                              ("Hires sampler", "sampler", str), ("Hires schedule type", "schedule", str),
                              ("Hires CFG Scale", "scale", float), ("Hires prompt", "prompt", str),
                              ("Hires negative prompt", "negative", str)):
        if label in given:
            value = given.pop(label)
            if not value.startswith("Use same"):
                found[f"hires_{name}"] = kind(value)
    if found.get("hires_steps") == 0:
        del found["hires_steps"]
    return found
