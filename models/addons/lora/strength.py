"""How strongly a LoRA acts: one number, one for each part, and one for each block of the UNet."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

# Blocks of the UNet by LDM's numbers: Stable Diffusion 1.x has 25, kohya's list.
INPUTS, MIDDLE, OUTPUTS = (tuple(f"IN{n:02}" for n in range(12)), ("M00",), tuple(f"OUT{n:02}" for n in range(12)))
PLACES = (*INPUTS, *MIDDLE, *OUTPUTS)
BASE = "BASE"  # the text encoders


def _only(*numbers: str) -> tuple[str, ...]:
    return (BASE, *(place for place in PLACES if place in numbers))


# The lists that are used, by their length: where no transformer is nothing is said.
LISTS: Mapping[int, tuple[str, ...]] = MappingProxyType({
    25: PLACES,
    26: (BASE, *PLACES),
    17: _only("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *OUTPUTS[3:]),
    20: (BASE, *INPUTS[:9], "M00", *OUTPUTS[:9]),  # SDXL
    12: _only("IN04", "IN05", "IN07", "IN08", "M00", *OUTPUTS[:6]),  # SDXL's with transformers
})


@dataclass(frozen=True)
class Strength:
    """unet, text: the factor of each part; text None: as the UNet's. blocks: a factor of some blocks beside it.

    blocks: by name, {"IN04": 0.5, "OUT": 0} ("IN", "MID" and "OUT" are all of theirs, "BASE" the text encoders), or the
    list of 25 numbers that kohya takes (IN00 to IN11, M00, OUT00 to OUT11), of 26 or 17 with BASE first (17: where
    Stable Diffusion 1.x has transformers), SDXL's of 20 or 12; or the text of either, "1,0,0.5,...".
    What is in no block (time_embed, out) has the factor 1. Raises ValueError for another count, name or number.
    """

    unet: float = 1.0
    text: float | None = None
    blocks: Mapping[str, float] | Sequence[float] | str | None = None

    def __post_init__(self) -> None:
        for name in ("unet", "text"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _number(value, f"the strength of a LoRA ({name})"))
        object.__setattr__(self, "blocks", _blocks(self.blocks))

    @classmethod
    def of(cls, value: "float | Mapping[str, Any] | Strength") -> "Strength":
        """A number, or {"unet": .8, "text": .5, "blocks": ...}, as a strength."""
        if isinstance(value, Strength):
            return value
        if isinstance(value, Mapping):
            if unknown := set(value) - {"unet", "text", "blocks"}:
                raise ValueError(f"a LoRA's strength has unet, text and blocks, got {sorted(unknown)[0]!r}")
            return cls(**value)
        return cls(_number(value, "the strength of a LoRA"))

    def at(self, part: str, module: str) -> float:
        """The factor of a module, by its LDM name, of "unet", "text" or "text_2"."""
        blocks = self.blocks
        assert blocks is None or isinstance(blocks, Mapping)
        if part != "unet":
            return (self.unet if self.text is None else self.text) * (blocks or {}).get(BASE, 1.0)
        return self.unet * (blocks or {}).get(place_of(module), 1.0)

    def __str__(self) -> str:
        """As A1111 writes it behind a LoRA's name, text first where the parts differ: 0.8 or 0.5:0.8."""
        return f"{self.unet:g}" if self.text in (None, self.unet) else f"{self.text:g}:{self.unet:g}"


def place_of(module: str) -> str:
    """The block of a module of the UNet, "" if it is in none."""
    found = re.match(r"(input|middle|output)_block(?:s\.(\d+))?", module)
    if found is None:
        return ""
    return "M00" if found[1] == "middle" else f"{found[1].removesuffix('put').upper()}{int(found[2]):02}"


def _blocks(said: Any) -> Mapping[str, float] | None:
    if said is None:
        return None
    if isinstance(said, str):
        said = [part.strip() for part in said.split(",")]
    if not isinstance(said, Mapping):
        if len(said) not in LISTS:
            raise ValueError(f"block weights are {', '.join(map(str, sorted(LISTS)))} numbers, or by name, got "
                             f"{len(said)}")
        return MappingProxyType({place: _number(value, place) for place, value in zip(LISTS[len(said)], said)})
    groups = {"IN": INPUTS, "MID": MIDDLE, "M": MIDDLE, "OUT": OUTPUTS}
    found: dict[str, float] = {}
    for name, value in sorted(said.items(), key=lambda item: item[0] not in groups):  # a block's own wins
        places = groups.get(name, (name,))
        if not set(places) <= {BASE, *PLACES}:
            raise ValueError(f"unknown block {name!r}: expected BASE, IN, MID, OUT, or one of {', '.join(PLACES)}")
        found |= dict.fromkeys(places, _number(value, name))
    return MappingProxyType(found)


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{what} must be a number, got {value!r:.60}")
    return number
