"""How add-ons are asked for: the words of the doors, `--lora FILE:0.8`, and those in prompts, `<lora:name:0.8>`.

    LoRA          FILE [:OPTION ...]                  --lora style.safetensors:0.8
    embedding     FILE                                --embedding easynegative.pt
    control       NET:PICTURE [:OPTION ...]           --control canny.safetensors:room.png:0.8:preprocess=canny
    image prompt  ADAPTER:PICTURE [:OPTION ...]       --image-prompt ip-adapter_sd15.safetensors:cat.jpg:0.6
    OPTION      = NUMBER                              how strongly, 1 unless it is said
                | HIGH-LOW                            the noise levels (sigmas) where it acts: 14.6-2.5 (of a LoRA the
                                                      UNet's part; what it changes in CLIP is read once, for all)
                | unet=NUMBER | text=NUMBER | blocks=LIST          of a LoRA: each part, and its blocks
                | preprocess=canny | guess=ldm | guess=diffusers   of a control: see `Conditioning.with_control`
                | encoder=NAME                        of an image prompt: its image encoder's folder or file

What stands at the end and reads as an option is one; before that, a control's and an image prompt's picture is what
follows the last colon, so that FILE, NET and ADAPTER may be `org/repo:file` on the hub; the colon of a Windows drive
parts nothing. In a prompt a LoRA is A1111's: `<lora:NAME>`, `<lora:NAME:TEXT>`, `<lora:NAME:TEXT:UNET>`, with te= and
unet= for the same and lbw= for the blocks; `\\<lora:...>` is text. `embedding:NAME` in a text is ComfyUI's.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ella_kd.models.addons.lora.strength import Strength

Place = Literal["lora", "embedding", "control", "image_prompt", "upscaler"]
SHAPES: dict[Place, str] = {"lora": "FILE:0.8", "embedding": "FILE", "control": "NET:PICTURE:0.8",
                            "image_prompt": "ADAPTER:PICTURE:0.6"}
NAMED: dict[Place, tuple[str, ...]] = {"lora": ("unet", "text", "blocks"), "embedding": (),
                                       "control": ("preprocess", "guess"), "image_prompt": ("encoder",)}
GUESSES = ("ldm", "diffusers")
A1111 = {"te": "text", "unet": "unet", "lbw": "blocks"}

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_WINDOW = re.compile(r"(?P<high>[0-9]+\.?[0-9]*|\.[0-9]+|inf)-(?P<low>[0-9]+\.?[0-9]*|\.[0-9]+)")
_NAMED = re.compile(r"(?P<name>[a-z_]+)=(?P<value>[^=]*)")
_DRIVE = re.compile(r"(?:(?<=^)|(?<=:))([A-Za-z]):(?=[\\/])")
_IN_PROMPT = re.compile(r"(?P<escaped>\\)?[ ]?<(?P<kind>lora|lyco|hypernet):(?P<said>[^<>]*)>", re.IGNORECASE)
_WORD = re.compile(r"(?<!\w)embedding:(?=[^\s,:()\[\]|])", re.IGNORECASE)


@dataclass(frozen=True)
class AddOn:
    """One add-on that is asked for. window: (high, low) sigmas, None for all. options: those with a name."""

    place: Place
    file: str
    picture: str = ""
    weight: float = 1.0
    window: tuple[float, float] | None = None
    options: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The file's name without folders and ending: the word of an embedding, A1111's name of a LoRA."""
        last = re.split(r"[\\/:]", self.file.rstrip("\\/"))[-1]
        return re.sub(r"\.(safetensors|sft|pt|pth|bin|ckpt)$", "", last, flags=re.IGNORECASE)

    @property
    def strength(self) -> Strength:
        """Of a LoRA."""
        said = dict(self.options)
        text, blocks = said.get("text"), said.get("blocks")
        return Strength(float(said.get("unet", self.weight)), None if text is None and "unet" not in said
                        else float(self.weight if text is None else text), blocks)

    def __str__(self) -> str:
        """As a door takes it."""
        high_low = None if self.window is None else "-".join(f"{sigma:g}" for sigma in self.window)
        said = [self.file, self.picture, f"{self.weight:g}" if self.weight != 1 else "", high_low or "",
                *(f"{name}={value}" for name, value in self.options)]
        return ":".join(part for part in said if part)


def read(place: Place, text: object) -> AddOn:
    """What a door was given. Raises ValueError in the door's words, TypeError for what is no text."""
    what = f"{place} takes {SHAPES[place]}"
    if not isinstance(text, str):
        raise TypeError(f"{what}, got {type(text).__name__}")
    parts = [part.replace("\0", ":").strip() for part in _DRIVE.sub("\\1\0", text.strip()).split(":")]
    least, said = 2 if place in ("control", "image_prompt") else 1, dict[str, Any]()
    while len(parts) > least and place != "embedding" and (found := _option(place, parts[-1], text)):
        if found[0] in said:
            raise ValueError(f"{what}, and {text!r} says {found[0]} twice")
        said[found[0]] = found[1]
        del parts[-1]
    if len(parts) < least or not all(parts):
        wanted = "a file and a picture" if least == 2 else "a file or a name"
        raise ValueError(f"{what}: expected {wanted}, got {text!r}")
    picture = parts.pop() if least == 2 else ""
    options = tuple((name, said[name]) for name in NAMED[place] if name in said)
    add_on = AddOn(place, ":".join(parts), picture, said.get("weight", 1.0), said.get("window"), options)
    if place == "lora":
        add_on.strength  # noqa: B018  raises for blocks that there are not
    return add_on


def _option(place: Place, part: str, text: str) -> tuple[str, Any] | None:
    """A part as an option's name and value; None if it is none."""
    if _NUMBER.fullmatch(part):
        return "weight", float(part)
    if found := _WINDOW.fullmatch(part):
        high, low = float(found["high"]), float(found["low"])
        if high <= low:
            raise ValueError(f"the noise levels of {text!r} are HIGH-LOW, 14.6-2.5, got {part}")
        return "window", (high, low)
    found = _NAMED.fullmatch(part)
    if not found:
        return None
    if found["name"] not in NAMED[place]:
        known = f"{place} has {', '.join(NAMED[place])}" if NAMED[place] else f"{place} has none"
        raise ValueError(f"{text!r} says {found['name']}, and {known}")
    if found["name"] in ("unet", "text") and not _NUMBER.fullmatch(found["value"]):
        raise ValueError(f"{found['name']} is a number in {text!r}, got {found['value']!r}")
    if found["name"] == "guess" and found["value"] not in GUESSES:
        raise ValueError(f"guess is {' or '.join(GUESSES)}, got {text!r}")
    return found["name"], found["value"]


def in_prompt(prompt: str) -> tuple[str, tuple[AddOn, ...]]:
    r"""A prompt without the LoRAs that it asks for, and these: ("a cat", [`lora` x at 0.8]) of "a cat <lora:x:0.8>".

    They hold for the whole picture wherever they stand, in an AND or in `[from:to:when]` too, as in A1111's web UI.
    `\<lora:x>` is the text <lora:x>. Raises ValueError for what cannot be read, and for hypernetworks.
    """
    found: list[AddOn] = []

    def taken(one: re.Match[str]) -> str:
        if one["escaped"]:
            return one[0].removeprefix("\\")
        if one["kind"].lower() == "hypernet":
            raise ValueError(f"the prompt asks for {one[0].strip()}, and hypernetworks are not read: without it the "
                             "picture would be another one; take it out of the text to draw that")
        found.append(_of_a1111(one["said"], one[0].strip()))
        return ""

    text = _IN_PROMPT.sub(taken, prompt)
    return (text.strip(" ") if found else text), tuple(found)


def without(text: str, understood: bool = False) -> tuple[str, list[str]]:
    """A text without add-ons, and these as they stand there; understood: LoRAs that can be read stay."""
    taken: list[str] = []

    def kept(one: re.Match[str]) -> str:
        if one["escaped"] or (understood and _is_understood(one)):
            return one[0]
        taken.append(one[0].strip())
        return ""

    return _IN_PROMPT.sub(kept, text), taken


def in_text(add_on: AddOn) -> str:
    """A LoRA as A1111 writes it in a prompt."""
    blocks = dict(add_on.options).get("blocks")
    return f"<lora:{add_on.name}:{add_on.strength}{f':lbw={blocks}' if blocks else ''}>"


def _is_understood(one: re.Match[str]) -> bool:
    try:
        return one["kind"].lower() != "hypernet" and bool(_of_a1111(one["said"], one[0]))
    except ValueError:
        return False


def _of_a1111(said: str, whole: str) -> AddOn:
    name, *rest = (part.strip() for part in said.split(":"))
    numbers = [part for part in rest if "=" not in part]
    named = dict(part.split("=", 1) for part in rest if "=" in part)
    wrong = sorted(named.keys() - A1111.keys())
    values = [*numbers, *(value for key, value in named.items() if key in ("te", "unet"))]
    if not name or wrong or len(numbers) > 2 or not all(map(_NUMBER.fullmatch, values)):
        raise ValueError(f"{whole} in the prompt is not understood: expected <lora:NAME:0.8> or <lora:NAME:TEXT:UNET>, "
                         "with te=, unet= and lbw= if need be")
    text = named.get("te", numbers[0] if numbers else "1")
    unet = named.get("unet", numbers[1] if len(numbers) > 1 else text)
    blocks = (("blocks", named["lbw"]),) if "lbw" in named else ()
    if float(text) == float(unet):
        return AddOn("lora", name, weight=float(unet), options=blocks)
    return AddOn("lora", name, options=(("unet", unet), ("text", text), *blocks))


def words_in(text: str, known: Iterable[str] = ()) -> list[AddOn]:
    """The embeddings that a text calls as `embedding:NAME`, but for known names."""
    found = []
    for one in _WORD.finditer(text):
        rest = text[one.end() :]
        if not any(re.match(rf"{re.escape(name)}(?!\w)", rest, re.IGNORECASE) for name in known):
            name = re.split(r"[\s,:()\[\]|]", rest, maxsplit=1)[0].rstrip(".")
            found.append(AddOn("embedding", name))
    return list(dict.fromkeys(found))


def without_prefix(text: str) -> str:
    """What other encoders than CLIP read: the word without `embedding:`."""
    return _WORD.sub("", text)


def _door(help_: str, shape: str) -> Any:
    return field(default=(), metadata={"help": help_, "metavar": shape, "multiple": True})


@dataclass(frozen=True, kw_only=True)
class FromAddOns:
    """The add-ons of a request, each as its door's text or several of them. hashes: "NAME=SHA256" of their files, for
    the record: whoever draws it again compares."""

    lora: tuple[str, ...] = _door("A LoRA and how strongly it acts; in a prompt <lora:name:0.8>. Repeatable.",
                                  SHAPES["lora"])
    embedding: tuple[str, ...] = _door("A word that CLIP learns (textual inversion), called by the file's name. "
                                       "Repeatable.", SHAPES["embedding"])
    control: tuple[str, ...] = _door("A ControlNet or T2I-Adapter, its picture, how strongly; "
                                     ":preprocess=canny draws the edges of a photo. Repeatable.", SHAPES["control"])
    image_prompt: tuple[str, ...] = _door("An IP-Adapter, its picture, how strongly. Repeatable.",
                                          SHAPES["image_prompt"])
    hashes: tuple[str, ...] = ()

    def read_doors(self) -> tuple[AddOn, ...]:
        """What the doors ask for; the fields are set to tuples of texts."""
        found = []
        for each in fields(FromAddOns):
            value = getattr(self, each.name)
            texts = (value,) if isinstance(value, str) else tuple(value or ())
            object.__setattr__(self, each.name, texts)
            if each.name != "hashes":
                found += [read(each.name, text) for text in texts]  # type: ignore[arg-type]
        return tuple(found)

    @classmethod
    def add_on_names(cls) -> tuple[str, ...]:
        return tuple(each.name for each in fields(FromAddOns))

