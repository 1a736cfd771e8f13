"""The miniature world: 32 x 32 px pictures of coloured sprites, which can be read back from their pixels exactly.

A scene is a background and one to three objects, each a shape in a colour at one of 3 x 3 places. Rendering is a pure
function of the scene, so a picture can be compared with the templates of everything that could stand in each cell.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

SIZE, SPRITE, PITCH, MARGIN = 32, 8, 10, 2

BITMAPS = {
    "square": "######## ######## ######## ######## ######## ######## ######## ########",
    "ring": "..####.. .######. ###..### ##....## ##....## ###..### .######. ..####..",
    "triangle": "...##... ...##... ..####.. ..####.. .######. .######. ######## ########",
    "cross": "##....## ###..### .######. ..####.. ..####.. .######. ###..### ##....##",
    "heart": ".##..##. ######## ######## ######## .######. ..####.. ...##... ........",
}
COLOURS = {
    "red": (228, 40, 40),
    "yellow": (255, 222, 40),
    "green": (60, 214, 70),
    "blue": (40, 90, 255),
    "pink": (255, 105, 215),
    "cyan": (50, 225, 240),
}
#: Top and bottom row of a vertical gradient.
BACKGROUNDS = {
    "night": ((34, 30, 84), (10, 8, 30)),
    "snow": ((250, 252, 255), (214, 224, 240)),
    "forest": ((22, 82, 48), (8, 40, 24)),
    "desert": ((226, 190, 140), (190, 148, 96)),
}
PLACES = (
    "top left", "top center", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom center", "bottom right",
)  # fmt: skip
SHAPES, COLOUR_NAMES, BACKGROUND_NAMES = tuple(BITMAPS), tuple(COLOURS), tuple(BACKGROUNDS)

#: A cell whose best template is further away than this (root mean square, 0 to 255) holds nothing that has a name.
SMUDGE = 45.0


@dataclass(frozen=True, order=True)
class Thing:
    """One object; `place` counts 0 to 8 in reading order."""

    place: int
    shape: str
    colour: str

    @property
    def row(self) -> int:
        return self.place // 3

    @property
    def column(self) -> int:
        return self.place % 3

    @property
    def unseen(self) -> bool:
        """Whether this (shape, colour, place) is kept out of all training: one triple in eleven, spread evenly."""
        code = 3 * SHAPES.index(self.shape) + 5 * COLOUR_NAMES.index(self.colour) + 7 * self.place
        return code % 11 == 0


@dataclass(frozen=True)
class Scene:
    """A background and its objects in reading order; `smudges` counts cells of a parsed picture without a name."""

    background: str
    things: tuple[Thing, ...]
    smudges: int = 0

    @property
    def unseen(self) -> bool:
        return any(thing.unseen for thing in self.things)


def random_scene(rng: random.Random, count: int, unseen: bool = False) -> Scene:
    """A scene of `count` objects in distinct places: all triples seen in training, or at least one never seen."""
    while True:
        places = rng.sample(range(9), count)
        things = tuple(sorted(Thing(p, rng.choice(SHAPES), rng.choice(COLOUR_NAMES)) for p in places))
        scene = Scene(rng.choice(BACKGROUND_NAMES), things)
        if scene.unseen == unseen:
            return scene


def _corner(place: int) -> tuple[int, int]:
    return MARGIN + PITCH * (place // 3), MARGIN + PITCH * (place % 3)


@cache
def _canvas(background: str) -> np.ndarray:
    top, bottom = (np.array(colour, float) for colour in BACKGROUNDS[background])
    rows = np.linspace(0, 1, SIZE)[:, None]
    gradient = np.round(top + rows * (bottom - top)).astype(np.uint8)
    return np.repeat(gradient[:, None], SIZE, axis=1)


@cache
def _mask(shape: str) -> np.ndarray:
    return np.array([[char == "#" for char in row] for row in BITMAPS[shape].split()])


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene: uint8 [32, 32, 3]."""
    picture = _canvas(scene.background).copy()
    for thing in scene.things:
        y, x = _corner(thing.place)
        picture[y : y + SPRITE, x : x + SPRITE][_mask(thing.shape)] = COLOURS[thing.colour]
    return picture


@cache
def _templates(background: str, place: int) -> np.ndarray:
    """What can stand in a cell, empty first: float [31, 8 * 8 * 3]."""
    y, x = _corner(place)
    scenes = [Scene(background, ())]
    scenes += [Scene(background, (Thing(place, s, c),)) for s in SHAPES for c in COLOUR_NAMES]
    crops = [render(scene)[y : y + SPRITE, x : x + SPRITE] for scene in scenes]
    return np.stack(crops).reshape(len(crops), -1).astype(np.float32)


@cache
def _between_cells() -> np.ndarray:
    free = np.ones((SIZE, SIZE), bool)
    for place in range(9):
        y, x = _corner(place)
        free[y : y + SPRITE, x : x + SPRITE] = False
    return free


def parse(picture: np.ndarray) -> Scene:
    """Reads a uint8 [32, 32, 3] picture back: the nearest template in every cell, if it is near enough."""
    if picture.shape != (SIZE, SIZE, 3):
        raise ValueError(f"expected a picture of shape ({SIZE}, {SIZE}, 3), got {picture.shape}")
    pixels = picture.astype(np.float32)
    free = _between_cells()
    background = min(BACKGROUND_NAMES, key=lambda name: float(((_canvas(name) - pixels)[free] ** 2).mean()))
    things, smudges = [], 0
    for place in range(9):
        y, x = _corner(place)
        cell = pixels[y : y + SPRITE, x : x + SPRITE].reshape(-1)
        errors = ((_templates(background, place) - cell) ** 2).mean(axis=1)
        best = int(errors.argmin())
        if errors[best] > SMUDGE**2:
            smudges += 1
        elif best:
            shape, colour = divmod(best - 1, len(COLOUR_NAMES))
            things.append(Thing(place, SHAPES[shape], COLOUR_NAMES[colour]))
    return Scene(background, tuple(things), smudges)


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 pictures to float32 [B, 3, 32, 32] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: Tensor) -> list[np.ndarray]:
    """[B, 3, h, w] in [-1, 1] to uint8 pictures, clamped and rounded."""
    scaled = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(scaled.permute(0, 2, 3, 1).numpy())
