"""What the page's inputs hold, as requests, and a request as what they would hold; nothing here knows a web server."""

import json
import math
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from PIL import Image

from ella_kd.addon_words import FromAddOns, read
from ella_kd.cli import COLUMNS
from ella_kd.drawing import innermost_scale
from ella_kd.guidance.text import parse
from ella_kd.infotext import said
from ella_kd.pictures.hires_options import LATENTS, PIXELS, Enlargement, InTiles
from ella_kd.pictures.options import SOURCES
from ella_kd.pipeline import Pipeline
from ella_kd.prompts import split_and
from ella_kd.request import MODES, Mode, Request
from ella_kd.samplers import SAMPLERS

COMPARE = "compare"  # a mode of the page: each of COLUMNS from the same seeds
SEEDS = 2**32  # what torch's CPU generator uses of a seed, and what a number of JavaScript holds
RANDOM = -1  # the seed that stands for any
CFG_PP = "_cfg_pp"


@dataclass(frozen=True)
class Limits:
    """The most that one draw may ask for. side: pixels of the larger side, whatever enlarges it."""

    side: int = 2048
    steps: int = 200
    count: int = 16
    letters: int = 20_000
    prompts: int = 16  # between the ANDs of one, each an answer of the network at every step
    cells: int = 2000  # of a grid


LIMITS = Limits()


@dataclass(frozen=True)
class Form:
    """One value per input, by its name. scale counts without CFG++, lam with it; guidance replaces either.

    width, height, strength: 0 or None for the model's own, or what is usual for the start picture. seed: of the first
    picture, RANDOM for any. lora: lines of NAME:STRENGTH. control: a name, beside its picture's file. start, mask:
    files. more: lines of `name: value`, for the rest of what a request has (`MORE`).
    """

    prompt: str = ""
    negative: str = Request.negative
    mode: str = Request.mode
    sampler: str = Request.sampler
    cfg_pp: bool = False
    schedule: str = Request.schedule
    steps: int = Request.steps
    scale: float = 7.0
    lam: float = 0.6
    guidance: str = ""
    width: int | None = None
    height: int | None = None
    seed: int = RANDOM
    count: int = 1
    tags: str = ""
    lora: str = ""
    embedding: tuple[str, ...] = ()
    control: str = ""
    control_picture: str | None = None
    control_weight: float = 1.0
    control_edges: bool = False
    start: str | None = None
    mask: str | None = None
    strength: float | None = None
    more: str = ""


# What a line of `more` may say: every option of a request that has no input of its own and names no file.
MORE: dict[str, Field[Any]] = {
    each.name: each for each in fields(Request)
    if "help" in each.metadata and each.name not in (*(f.name for f in fields(Form)), *SOURCES, "refiner", "refiner_at",
                                                     "latents", *FromAddOns.add_on_names())}


def requests(form: Form, limits: Limits, modes: tuple[Mode, ...] = MODES,
             any_seed: Callable[[], int] = lambda: 0) -> dict[Mode, list[Request]]:
    """The pictures that a form asks for, mode by mode; more than one with COMPARE, in the order of the columns.

    modes: those that the pipeline has. Raises ValueError or TypeError in the words of whoever fills the form in.
    """
    for name in ("prompt", "negative", "tags", "guidance", "more"):
        value = getattr(form, name)
        if not isinstance(value, str):
            raise TypeError(f"{name} must be text, got {type(value).__name__}")
        if len(value) > limits.letters:
            raise ValueError(f"{name} may have {limits.letters} letters, got {len(value)}")
    count = _whole("count", form.count, 1, limits.count)
    seed = any_seed() if form.seed in (None, RANDOM) else form.seed
    seed = _whole("seed", seed, 0, SEEDS - count)
    sampler = str(form.sampler)
    if form.cfg_pp and not sampler.endswith(CFG_PP):
        sampler += CFG_PP
    rule = parse(form.guidance) if form.guidance.strip() else None
    scale = (_number("lambda", form.lam, 0, 2) if sampler.endswith(CFG_PP) else _number("scale", form.scale, -50, 50))
    asked: dict[str, Any] = {
        "negative": form.negative, "sampler": sampler, "schedule": str(form.schedule),
        "steps": _whole("steps", form.steps, 1, limits.steps), "scale": scale,
        **{name: None if getattr(form, name) in (None, 0) else _whole(name, getattr(form, name), 1, limits.side)
           for name in ("width", "height")},
        "tags": form.tags or None, **_picture(form), **_add_ons(form), **_more(form.more)}
    if rule is not None:
        asked |= {"guidance": repr(rule), "scale": innermost_scale(rule)}
    if form.mode == COMPARE:
        if "negative_mode" in asked or form.tags:
            raise ValueError("compare reads the prompt in each way: leave out tags and negative_mode")
        chosen = tuple(mode for mode in COLUMNS if mode in modes)
    else:
        first = Request("", mode=form.mode).mode  # type: ignore[arg-type]
        if first not in modes:
            raise ValueError(f"this model has no mode {first}: choose {', '.join(modes)}")
        chosen = (first,)
    found = {mode: [Request(form.prompt, mode=mode, seed=seed + i, **asked) for i in range(count)] for mode in chosen}
    for column in found.values():
        check(column[0], limits)
    return found


def filled(request: Request) -> tuple[Form, list[str]]:
    """The form that asks for this request, as far as it goes, and what it cannot ask for.

    `requests(filled(request)[0], ...)` is the request, but for what is for the record alone, and the files.
    """
    cfg_pp = request.sampler.endswith(CFG_PP) and request.sampler.removesuffix(CFG_PP) in SAMPLERS
    sampler = request.sampler.removesuffix(CFG_PP) if cfg_pp else request.sampler
    name = "lam" if request.sampler.endswith(CFG_PP) else "scale"
    own: dict[str, Any] = {} if request.scale is None else {name: request.scale}
    form = Form(prompt=request.prompt, negative=request.negative, mode=request.mode, sampler=sampler, cfg_pp=cfg_pp,
                schedule=request.schedule, steps=request.steps, guidance=request.guidance, width=request.width,
                height=request.height, seed=request.seed if request.seed < SEEDS else RANDOM, tags=request.tags or "",
                lora="\n".join(request.lora), embedding=request.embedding, strength=request.strength,
                more="\n".join(_line(each, getattr(request, name)) for name, each in MORE.items()
                               if getattr(request, name) != each.default), **own)
    left = [] if request.seed < SEEDS else [f"the seed {request.seed}, which is beyond {SEEDS - 1}"]
    for name in ("start", "mask"):
        if isinstance(value := getattr(request, name), str):
            form = replace(form, start=value) if name == "start" else replace(form, mask=value)
        elif value is not None:
            left.append(f"the {name} picture, which is no file")
    for door in request.control:
        control = read("control", door)
        known = {"preprocess": "canny"}
        if form.control or control.window or dict(control.options) not in ({}, known):
            left.append(f"the control {door}")
            continue
        form = replace(form, control=control.file, control_picture=control.picture, control_weight=control.weight,
                       control_edges=bool(control.options))
    for name in ("strength_map", "depth", "foreground", "background", "latents", "refiner"):
        if getattr(request, name) is not None:
            left.append(name.replace("_", " "))
    return form, left + [f"the image prompt {door}" for door in request.image_prompt]


def largest_side(request: Request, pipeline: Pipeline) -> int:
    """Of all that is drawn for a request, in pixels: second passes, tiles and sides included."""
    own = given = (request.width or pipeline.size, request.height or pipeline.size)
    sides = list(given)
    if isinstance(request.start, str):
        with Image.open(request.start) as image:
            own = image.size if (request.width, request.height) == (None, None) else given
            sides += image.size
        sides += [own[0] + sum(request.sides.get(name, 0) for name in ("left", "right")),
                  own[1] + sum(request.sides.get(name, 0) for name in ("top", "bottom"))]
    if request.hires is not None:
        sides += Enlargement.read(request.hires).sizes(given, (pipeline.size,) * 2, pipeline.vae.factor)[1]
    if request.upscale is not None:
        sides.append(math.ceil(max(sides) * InTiles.read(request.upscale).scale))
    return max(sides)


def check(request: Request, limits: Limits) -> None:
    """ValueError for what would take too long, or would read a file that nobody gave."""
    if (upscaler := str(request.hires_upscaler)) not in {*LATENTS, *PIXELS}:
        raise ValueError(f"unknown upscaler {upscaler[:80]!r}: choose {', '.join((*LATENTS, *PIXELS))}")
    for name, number, most in (("steps", request.steps, limits.steps), ("repeats", request.repeats, 20),
                               ("hires_steps", request.hires_steps or 0, limits.steps),
                               ("the number of sigmas", len(request.sigmas or ()), limits.steps + 1),
                               ("mask_grow", abs(request.mask_grow), limits.side),
                               ("mask_blur", request.mask_blur or 0, limits.side),
                               ("padding", request.padding, limits.side),
                               ("the number of prompts between AND", _prompts(request), limits.prompts)):
        if number > most:
            raise ValueError(f"{name} may be {most} here, got {number}")


def _prompts(request: Request) -> int:
    """The most that a text of the request holds."""
    texts = (request.text, request.negative, request.hires_prompt or "", request.hires_negative or "")
    return max(len(split_and(text)) for text in texts) if request.syntax else 1


def _picture(form: Form) -> dict[str, Any]:
    if form.start is None:
        return {}
    strength = None if form.strength in (None, 0) else _number("strength", form.strength, 0, 1)
    return {"start": form.start, "strength": strength, **({"mask": form.mask} if form.mask else {})}


def _add_ons(form: Form) -> dict[str, Any]:
    found: dict[str, Any] = {"lora": tuple(line.strip() for line in str(form.lora).splitlines() if line.strip()),
                             "embedding": tuple(form.embedding or ())}
    if form.control:
        if not form.control_picture:
            raise ValueError(f"the control {form.control} needs a picture: give it one, or choose no control")
        weight = _number("the control's strength", form.control_weight, 0, 5)
        found["control"] = (f"{form.control}:{form.control_picture}:{weight:g}"
                            + ":preprocess=canny" * bool(form.control_edges),)
    return found


def _more(text: str) -> dict[str, Any]:
    """The lines as arguments of a request."""
    found: dict[str, Any] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, colon, value = line.partition(":")
        name = name.strip().replace("-", "_").lower()
        if not colon or name not in MORE:
            raise ValueError(f"more options are lines such as hires: 2:0.5, got {line[:80]!r}; there are "
                             f"{', '.join(MORE)}")
        if name in found:
            raise ValueError(f"{name} is said twice in more options")
        found[name] = _read(MORE[name], value.strip())
    return found


def _read(each: Field[Any], text: str) -> Any:
    if text.startswith('"') and text.endswith('"') and len(text) > 1:
        return str(json.loads(text))
    if each.type is bool:
        if text.lower() not in ("on", "off", "true", "false"):
            raise ValueError(f"{each.name} is on or off, got {text[:80]!r}")
        return text.lower() in ("on", "true")
    own: Any = each.metadata.get("type") or (str if each.default is None else type(each.default))
    kind = int if "least" in each.metadata else own
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{each.name} is a number, got {text[:80]!r}") from error


def _line(each: Field[Any], value: object) -> str:
    text = said(value)
    if "\n" in text or text.startswith('"') or text != text.strip():
        text = json.dumps(text, ensure_ascii=False)
    return f"{each.name}: {'off' if value is False else text}"


def _whole(name: str, value: object, least: int, most: int) -> int:
    """A whole number in a range, of floats too, which is what JavaScript sends."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value not in range(
            least, most + 1):
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {_short(value)}")
    return int(value)


def _number(name: str, value: object, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {_short(value)}")
    return float(value)


def _short(value: object) -> str:
    return repr(value)[:80]
