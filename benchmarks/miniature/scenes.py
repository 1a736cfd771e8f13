"""The miniature world: 48 x 48 px pictures of patterned sprites, which can be read back from their pixels exactly.

A scene is a background and up to nine things, each at one of 3 x 3 places. What a thing is and where it stands is
decided early in sampling, at high noise; how it is filled and rimmed is small in amplitude, hence decided late
(`benchmarks/miniature/bayes.py` prints at which noise each fact can be seen).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

SIZE, CELL = 48, 16  # a sprite is 14 px wide and stands in the middle of its cell

COLOURS = {
    "red": (212, 58, 54),
    "yellow": (206, 186, 52),
    "green": (60, 168, 70),
    "blue": (60, 88, 206),
    "pink": (208, 96, 188),
    "cyan": (54, 184, 200),
}
#: Top and bottom row of a vertical gradient.
BACKGROUNDS = {
    "night": ((34, 30, 84), (10, 8, 30)),
    "snow": ((250, 252, 255), (214, 224, 240)),
    "forest": ((22, 82, 48), (8, 40, 24)),
    "desert": ((226, 190, 140), (190, 148, 96)),
}
SHAPES = ("square", "ring", "triangle", "cross", "heart")
FILLS = ("plain", "striped", "barred", "checked")
RIMS = ("no", "dark", "light")
PLACES = (
    "top left", "top center", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom center", "bottom right",
)  # fmt: skip
COLOUR_NAMES, BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)

#: How much lighter and darker than its colour the parts of a filled sprite are, and its rim (of 255).
FILL, RIM = 28, 32
#: A cell whose best template is further away than this (root mean square, 0 to 255) holds nothing that has a name.
SMUDGE = 40.0
#: A pattern of less than the first amplitude (1: as rendered) is none, of more than the second it is one; else unclear.
UNCLEAR = (0.4, 0.6)


@dataclass(frozen=True, order=True)
class Thing:
    """One object; `place` counts 0 to 8 in reading order."""

    place: int
    shape: str
    colour: str
    fill: str = "plain"
    rim: str = "no"

    @property
    def row(self) -> int:
        return self.place // 3

    @property
    def column(self) -> int:
        return self.place % 3

    @property
    def unseen(self) -> bool:
        """Whether this combination is kept out of all training: one (shape, colour, place) in eleven, spread evenly,
        and one (shape, colour, fill) in eleven."""
        code = 3 * SHAPES.index(self.shape) + 5 * COLOUR_NAMES.index(self.colour)
        fill = FILLS.index(self.fill)
        return (code + 7 * self.place) % 11 == 0 or (self.fill != "plain" and (code + 2 * fill) % 11 == 5)


@dataclass(frozen=True)
class Scene:
    """A background and its objects in reading order; `smudges` counts cells of a parsed picture without a name."""

    background: str
    things: tuple[Thing, ...]
    smudges: int = 0

    @property
    def unseen(self) -> bool:
        return any(thing.unseen for thing in self.things)


def random_thing(rng: random.Random, place: int) -> Thing:
    return Thing(place, rng.choice(SHAPES), rng.choice(COLOUR_NAMES), rng.choice(FILLS), rng.choice(RIMS))


def random_scene(rng: random.Random, count: int, unseen: bool = False) -> Scene:
    """A scene of `count` things in distinct places: all combinations seen in training, or at least one never seen."""
    background = rng.choice(BACKGROUND_NAMES)
    while True:
        things = []
        for place in sorted(rng.sample(range(9), count)):
            thing = random_thing(rng, place)
            while thing.unseen and not unseen:
                thing = random_thing(rng, place)
            things.append(thing)
        scene = Scene(background, tuple(things))
        if scene.unseen == unseen:
            return scene


@cache
def _grid() -> np.ndarray:
    """Rows and columns of a cell in px, counted from its middle: [2, 16, 16]."""
    return np.mgrid[:CELL, :CELL] - (CELL - 1) / 2


@cache
def _mask(shape: str) -> np.ndarray:
    y, x = _grid()
    inside = np.maximum(abs(x), abs(y)) < 7
    if shape == "square":
        return inside
    if shape == "ring":
        return (np.hypot(x, y) < 7.2) & (np.hypot(x, y) > 2.6)
    if shape == "triangle":
        return inside & (abs(x) <= (y + 7.5) / 2)
    if shape == "cross":
        return inside & (np.minimum(abs(x), abs(y)) < 3)
    u, v = x / 5.8, (1.2 - y) / 5.6
    return inside & ((u**2 + v**2 - 1) ** 3 - u**2 * v**3 <= 0)


@cache
def _rim(shape: str) -> np.ndarray:
    """The outline of a sprite: its pixels with a neighbour outside."""
    mask = np.pad(_mask(shape), 1)
    return _mask(shape) & ~(mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:])


@cache
def _patterns(shape: str) -> dict[str, np.ndarray]:
    """What fill and rim add to a sprite's colour, in units of their amplitudes: float [16, 16] each, in -1 to 1."""
    rows, columns = (np.where(axis // 2 % 2 < 1, 1.0, -1.0) for axis in np.mgrid[:CELL, :CELL])
    inner, rim = _mask(shape) & ~_rim(shape), _rim(shape).astype(float)
    fills = {"striped": rows * inner, "barred": columns * inner, "checked": rows * columns * inner}
    return {**fills, "dark": -rim, "light": rim}


def _sprite(thing: Thing) -> np.ndarray:
    """The pixels of a thing in its cell: float [16, 16, 3], its colour also where it is not."""
    patterns = _patterns(thing.shape)
    change = FILL * patterns.get(thing.fill, 0.0) + RIM * patterns.get(thing.rim, 0.0)
    return np.array(COLOURS[thing.colour], float) + np.broadcast_to(change, (CELL, CELL))[..., None]


@cache
def _canvas(background: str) -> np.ndarray:
    top, bottom = (np.array(colour, float) for colour in BACKGROUNDS[background])
    rows = np.linspace(0, 1, SIZE)[:, None]
    gradient = np.round(top + rows * (bottom - top)).astype(np.uint8)
    return np.repeat(gradient[:, None], SIZE, axis=1)


def _cell(place: int) -> tuple[slice, slice]:
    return tuple(slice(CELL * n, CELL * (n + 1)) for n in divmod(place, 3))  # type: ignore[return-value]


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene: uint8 [48, 48, 3]."""
    picture = _canvas(scene.background).copy()
    for thing in scene.things:
        mask = _mask(thing.shape)
        picture[_cell(thing.place)][mask] = _sprite(thing)[mask].round().astype(np.uint8)
    return picture


@cache
def _templates(background: str, place: int) -> np.ndarray:
    """What can stand in a cell, empty first, without fill and rim: float [31, 16 * 16 * 3]."""
    scenes = [Scene(background, ())]
    scenes += [Scene(background, (Thing(place, s, c),)) for s in SHAPES for c in COLOUR_NAMES]
    return np.stack([render(scene)[_cell(place)] for scene in scenes]).reshape(len(scenes), -1).astype(np.float32)


@cache
def _reader(shape: str) -> np.ndarray:
    """The matched filters of a shape: least squares for its mean, three fills and rim, [5, pixels of the mask]."""
    patterns, mask = _patterns(shape), _mask(shape)
    columns = [np.ones(mask.sum())]
    columns += [amplitude * patterns[name][mask] for name, amplitude in
                (("striped", FILL), ("barred", FILL), ("checked", FILL), ("light", RIM))]
    return np.linalg.pinv(np.stack(columns, axis=1))


def _details(crop: np.ndarray, shape: str, colour: str) -> tuple[str, str]:
    """Fill and rim of a sprite of known shape and colour; "unclear" if one is between two, or two at once."""
    rest = (crop - np.array(COLOURS[colour]))[_mask(shape)].mean(axis=1)
    *fills, rim = (_reader(shape) @ rest)[1:]
    none, full = UNCLEAR
    found = [name for name, amount in zip(FILLS[1:], fills, strict=True) if amount > full]
    clear = len(found) <= 1 and min(fills) > -none and not any(none < amount <= full for amount in fills)
    fill = "unclear" if not clear else found[0] if found else "plain"
    return fill, "no" if abs(rim) < none else "unclear" if abs(rim) <= full else "light" if rim > 0 else "dark"


def colour_at(picture: np.ndarray, thing: Thing) -> np.ndarray:
    """The mean colour of the pixels where a thing should be: float [3]."""
    return picture[_cell(thing.place)][_mask(thing.shape)].mean(axis=0)


def stripes_at(picture: np.ndarray, thing: Thing) -> float:
    """How strongly the pixels where a thing should be are striped: 0 not, 1 as rendered."""
    rest = picture[_cell(thing.place)][_mask(thing.shape)].mean(axis=1)
    return float((_reader(thing.shape) @ rest)[1])


def parse(picture: np.ndarray) -> Scene:
    """Reads a uint8 [48, 48, 3] picture back, cell by cell: the nearest shape and colour, then fill and rim.

    A cell that is near to nothing is a smudge; a fill or rim between two is "unclear". Raises ValueError for another
    size.
    """
    if picture.shape != (SIZE, SIZE, 3):
        raise ValueError(f"expected a picture of shape ({SIZE}, {SIZE}, 3), got {picture.shape}")
    pixels = picture.astype(np.float32)
    free = np.tile(np.pad(np.zeros((CELL - 2, CELL - 2), bool), 1, constant_values=True), (3, 3))  # no sprite is there
    background = min(BACKGROUND_NAMES, key=lambda name: float(((_canvas(name) - pixels)[free] ** 2).mean()))
    things, smudges = [], 0
    for place in range(9):
        crop = pixels[_cell(place)]
        errors = ((_templates(background, place) - crop.reshape(-1)) ** 2).mean(axis=1)
        best = int(errors.argmin())
        if errors[best] > SMUDGE**2:
            smudges += 1
        elif best:
            shape, colour = SHAPES[(best - 1) // len(COLOUR_NAMES)], COLOUR_NAMES[(best - 1) % len(COLOUR_NAMES)]
            things.append(Thing(place, shape, colour, *_details(crop, shape, colour)))
    return Scene(background, tuple(things), smudges)


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 pictures to float32 [B, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: Tensor) -> list[np.ndarray]:
    """[B, 3, h, w] in [-1, 1] to uint8 pictures, clamped and rounded."""
    scaled = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(scaled.permute(0, 2, 3, 1).numpy())
