"""What is asked for: everything a picture depends on is one frozen value.

`generate`, `draw`, the command and a picture's texts share it: an option's default, range and help stand here alone.
"""

import inspect
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from operator import index
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from ella_kd import infotext
from ella_kd.addon_words import AddOn, FromAddOns, in_prompt, words_in
from ella_kd.inside import FromInside
from ella_kd.models import emphasis
from ella_kd.pictures.hires_options import LATENTS, NO_SECOND, PIXELS, FromHires
from ella_kd.pictures.options import FromNoise, FromPicture
from ella_kd.prompt_editing import edits
from ella_kd.prompts import check_text, split_and
from ella_kd.samplers.names import get_sampler, sampler_named, schedule_named
from ella_kd.texts import texts_of

Mode = Literal["flexible", "fixed", "clip", "plain"]
MODES: tuple[Mode, ...] = ("flexible", "fixed", "clip")  # "plain" is an older word for "clip", taken everywhere

SCALE = 7.0  # of classifier-free guidance, where nobody says

try:
    VERSION = version("ella-kd")
except PackageNotFoundError:
    VERSION = "unknown"


def mode_named(mode: object) -> Mode:
    """A mode by its name. ValueError for one that there is not."""
    if mode == "plain":
        return "clip"
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: choose {', '.join(MODES)}")
    return mode


@dataclass(frozen=True)
class Request(FromPicture, FromHires, FromAddOns, FromInside):
    """Everything that decides a picture: with the same model and the same request it comes out the same.

    A field with metadata is an option that a user chooses: what the command says of it, its smallest value (`least`).
    A start picture and what is asked of it, and of the noise, are the fields of `FromPicture` and `FromNoise`; add-ons
    those of `FromAddOns`, and the LoRAs that the prompt asks for; a second pass those of `FromHires`; what changes in
    the UNet those of `FromInside`.

    prompt: as it is read, wildcards chosen. scale: of classifier-free guidance; None beside a rule without one number.
    guidance: the rule as text, "" for none. width, height: None for the model's own. model, dtype: the pipeline's name
    and its networks' dtype; version: of ella_kd. Those three are for the record, "" where nobody said.
    refiner: the file of another system, which takes over at refiner_at (`ella_kd.refining.Refiner`).
    Raises ValueError or TypeError for a value that no picture can have.
    """

    prompt: str
    negative: str = field(default="", metadata={"help": "What the picture should not show.", "metavar": "TEXT"})
    mode: Mode = field(default="flexible", metadata={
        "help": "How the prompt is read. flexible: ELLA, prompts of any length; fixed: ELLA on 128 tokens, as it was "
                "trained; clip: plain Stable Diffusion, no ELLA."})
    sampler: str = field(default="dpmpp_2m", metadata={"help": "See ella-kd samplers.", "metavar": "NAME"})
    schedule: str = field(default="karras", metadata={"help": "See ella-kd samplers.", "metavar": "NAME"})
    steps: int = field(default=20, metadata={"help": "Steps from noise to picture.", "least": 1})
    scale: float | None = field(default=SCALE, metadata={
        "help": "Guidance: how much the prompt counts; with a _cfg_pp sampler lambda, 0 to 1."})
    seed: int = 0
    width: int | None = field(default=None, metadata={
        "help": "[default: the model's own: 512 for SD1.5]", "metavar": "PX", "least": 1})
    height: int | None = field(default=None, metadata={
        "help": "[default: the model's own]", "metavar": "PX", "least": 1})
    model: str = ""
    version: str = VERSION
    guidance: str = field(default="", metadata={
        "help": 'A guidance rule in place of --scale: "Rescale(CFG(7), 0.7)". See ella-kd rules.', "metavar": "RULE"})
    negative_mode: Mode | None = field(default=None, metadata={
        "help": "How the negative prompt is read, if not as the prompt: clip leaves ELLA to the prompt alone."})
    tags: str | None = field(default=None, metadata={
        "help": "A text for CLIP, whose tokens follow ELLA's: trigger words, styles.", "metavar": "TEXT"})
    syntax: bool = field(default=False, metadata={
        "help": "Read (phrase:1.3), [phrase], [from:to:0.5], [a|b] and AND, as the AUTOMATIC1111 web UI does."})
    clip_skip: int = field(default=1, metadata={
        "help": "CLIP's layer: 1 the one that the model was trained with, 2 that before.", "metavar": "N", "least": 1})
    dtype: str = ""
    tiling: bool = field(default=False, kw_only=True, metadata={
        "help": "Draw a texture that meets itself at its edges, to be laid side by side."})
    refiner: str | None = field(default=None, kw_only=True, metadata={
        "help": "Another checkpoint, such as SDXL's refiner, that takes over on the way.", "metavar": "FILE"})
    refiner_at: float = field(default=0.8, kw_only=True, metadata={
        "help": "When: the share of the timesteps done, whatever the schedule.", "metavar": "SHARE"})

    def __post_init__(self) -> None:
        super().__post_init__()
        by_window = [each for each in self.read_doors() if each.place == "lora" and each.window]
        self.check_inside()
        if by_window and self.reuse is not None and self.reused[0] > 1:
            raise ValueError(f"reuse keeps the deep features of one network, and the window of the LoRA {by_window[0]} "
                             "makes another above and below: leave out the window or reuse, or reuse the answer about "
                             f"the negative prompt alone, 1:{self.reused[0]}")
        self.check_hires()
        for name in ("prompt", "negative", "tags", "hires_prompt", "hires_negative"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        for each in fields(self):
            value = getattr(self, each.name)
            if "least" in each.metadata and value is not None:
                self._set(each.name, whole(each.name, value, each.metadata["least"]))
            if each.type is bool and not isinstance(value, bool):
                raise TypeError(f"{each.name} must be True or False, got {value!r}")
        self._set("seed", seed_number(self.seed))
        self._set("mode", mode_named(self.mode))
        negative_mode = None if self.negative_mode in (None, "") else mode_named(self.negative_mode)
        self._set("negative_mode", None if negative_mode == self.mode else negative_mode)
        sampler, schedule = method_named(self.sampler, self.schedule)
        self._set("sampler", sampler)
        self._set("schedule", schedule)
        check_method_options(sampler, self.of_method)
        if self.scale is not None:
            self._set("scale", _number("scale", self.scale))
        self._set("refiner_at", refiner_share(self.refiner_at))
        if self.syntax:
            for text in (*(text for text, _ in split_and(self.text)), self.negative, self.tags or ""):
                for said in set(edits(text, self.steps)):
                    emphasis.parse(said)
        if self.hires is not None:
            self.second_pass()
        if self.upscale is not None:
            self._check_upscale()

    def _check_upscale(self) -> None:
        """ValueError for what a picture that is enlarged in tiles cannot have."""
        whole_picture = {each.name for each in fields(FromPicture)} - {*FromNoise.names(), "start"} | {"control"}
        if self.hires_upscaler in LATENTS:
            raise ValueError(f"upscale enlarges a picture's pixels, not its latents, got {self.hires_upscaler}: choose "
                             f"{', '.join(PIXELS)}, or the file of a network")
        if self.tiling:
            raise ValueError("with tiling each tile of upscale would meet itself at its edges: enlarge with hires, "
                             "whose second pass is a texture too")
        first = ("width", "height", "sigmas", "variation", "tile", "hidiffusion", "deep_shrink")
        given = {each.name for each in fields(self) if getattr(self, each.name) != each.default}
        if clash := sorted(given & whole_picture):
            raise ValueError(f"upscale draws over a whole picture tile by tile, without {clash[0]}: leave it out, or "
                             "draw the enlarged picture with it")
        if self.start is not None and (clash := [name for name in first if name in given]):
            raise ValueError(f"{clash[0]} is about what is drawn before it is enlarged, and upscale begins with the "
                             f"start picture, in tiles of the model's own size: leave out {clash[0]}, or upscale")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def text(self) -> str:
        """The prompt without the add-ons that it asks for."""
        return in_prompt(self.prompt)[0]

    @property
    def add_ons(self) -> tuple[AddOn, ...]:
        """All that is asked for: by the doors, by the prompt, by `embedding:name` in any text, and to enlarge."""
        asked = (*self.read_doors(), *in_prompt(self.prompt)[1])
        known = [Path(each.file).stem for each in asked if each.place == "embedding"]
        texts = (self.prompt, self.negative, self.tags or "")
        larger = () if self.enlarged_by is None else (AddOn("upscaler", self.enlarged_by),)
        return (*asked, *dict.fromkeys(word for text in texts for word in words_in(text, known)), *larger)

    def second_pass(self) -> "Request":
        """What its second pass asks for, a request of its own; without one, the request itself."""
        own = self.second()
        rule = {"guidance": ""} if "scale" in own else {}
        return replace(self, **{**own, **rule, "sigmas": None, "latents": None, **NO_SECOND, "upscale": None})

    def arguments(self) -> dict[str, Any]:
        """What `generate` takes to draw the picture again: `generate(pipeline, **request.arguments())`."""
        kept = {each.name: getattr(self, each.name) for each in fields(self) if "help" in each.metadata}
        kept |= {"prompts": self.prompt, "seeds": self.seed, "guidance": self.guidance or None}
        if self.hashes:
            kept["hashes"] = self.hashes
        if self.guidance or self.scale is None:
            del kept["scale"]  # the rule has it
        return kept

    def parameters(self) -> str:
        """The text that other tools read: prompt, `Negative prompt:`, a line of `Key: value`."""
        return infotext.write(vars(self))

    def json(self) -> str:
        """The request itself, as `from_picture` reads it back."""
        return json.dumps(vars(self), ensure_ascii=False, default=infotext.said)

    @classmethod
    def from_json(cls, text: str) -> "Request":
        """What `json` wrote, by this version or another; what is not understood is named in a warning."""
        values = json.loads(text)
        if not isinstance(values, dict) or "prompt" not in values:
            raise ValueError(f"expected a JSON object with a prompt, got {text[:80]!r}")
        known = {each.name for each in fields(cls)}
        _warn_of(sorted(values.keys() - known))
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_text(cls, text: str) -> "Request":
        """The `parameters` text of a picture of ours or of the AUTOMATIC1111 web UI, understood as far as it goes.

        A picture without ELLA's mode is CLIP's, its prompt in the web UI's syntax. What is left out is named in a
        warning. Raises ValueError for another text.
        """
        values, unknown = infotext.read(text)
        _warn_of(unknown)
        return cls(**values)

    @classmethod
    def from_picture(cls, path: str | Path) -> "Request":
        """How a picture was made, from the text `ella_kd` in its PNG, JPEG or WebP, else from `parameters`.

        Warns of what is not understood and of another version of ella_kd, whose pictures may differ.
        Raises FileNotFoundError, or ValueError for a file that is no picture or carries no settings.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no picture at {path}")
        try:
            with Image.open(path) as image:
                image.load()  # texts may come after the pixels
                texts = texts_of(image)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{path} is not a whole picture: {error}") from error
        try:
            if "ella_kd" in texts:
                request = cls.from_json(texts["ella_kd"])
            elif "parameters" in texts:
                request = cls.from_text(texts["parameters"])
            else:
                raise ValueError("it carries no settings: expected a picture with the text `ella_kd` or `parameters`")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        if request.version not in ("", VERSION):
            warnings.warn(f"{path} was drawn by ella_kd {request.version}, this is {VERSION}: pictures may differ",
                          stacklevel=2)
        return request

    from_png = from_picture  # its older name


def read_settings(path: str | Path) -> dict[str, Any]:
    """The arguments of `generate` that drew a picture: `generate(pipeline, **read_settings("out/00001-1-a-cat.png"))`.

    Warns and raises as `Request.from_picture` does, whose value also names the model and its dtype.
    """
    return Request.from_picture(path).arguments()


def method_named(sampler: str, schedule: str) -> tuple[str, str]:
    """Our names of a sampler and a schedule, of "DPM++ 2M Karras" too. ValueError for unknown ones, the nearest named.
    """
    name, said = sampler_named(sampler)
    schedule = schedule_named(schedule)
    if said in (None, schedule):
        return name, schedule
    if schedule != Request.schedule:  # not the default
        raise ValueError(f"the sampler {sampler!r} says schedule {said!r}, and the schedule is {schedule!r}: give one")
    return name, said


def check_method_options(sampler: str, given: Mapping[str, float]) -> None:
    """Raises ValueError for one that the sampler does not have."""
    known = inspect.signature(get_sampler(sampler).function).parameters
    for name in given:
        if name not in known and not hasattr(get_sampler(sampler).method, name):
            raise ValueError(f"{sampler} has no {name}: leave it out or choose another sampler")


def refiner_share(at: object) -> float:
    """The share of the timesteps before the refiner's. ValueError for one that leaves either model nothing."""
    if isinstance(at, bool) or not isinstance(at, (int, float)) or not 0 < at < 1:
        raise ValueError(f"refiner_at is the share of the timesteps before the refiner's, between 0 and 1, got {at!r}")
    return float(at)


def whole(name: str, number: object, least: int = 1) -> int:
    """A whole number of at least `least`, of any integer type; ValueError for anything else."""
    try:
        value = index(number)  # type: ignore[arg-type]
    except TypeError:
        value = None
    if value is None or isinstance(number, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {number!r}")
    return value


def seed_number(seed: object) -> int:
    """A seed of any integer type. TypeError for another type, ValueError beyond [0, 2^63)."""
    try:
        value = index(seed)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"a seed must be a whole number, got {seed!r}") from error
    if not 0 <= value < 2**63:
        raise ValueError(f"seeds must lie in [0, 2^63), got {value}")
    return value


def _number(name: str, number: object) -> float:
    try:
        if isinstance(number, (bool, str)):
            raise TypeError
        value = float(number)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {number!r}") from error
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _warn_of(unknown: list[str]) -> None:
    if unknown:
        warnings.warn(f"not understood and left out: {', '.join(unknown)}", stacklevel=4)
