"""What the miniature's latents look like: a code for every scene, which the autoencoder learns to write and to read.

A trained autoencoder decides by itself how far apart two pictures lie in its latents, and with that at which noise a
fact is decided. Here the distances are prescribed instead: a cell's mean tells its colour or the background, loudly;
its left, right, upper and lower parts tell the shape, and, ever more softly, the fill and the rim.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import torch
from torch import Tensor

from benchmarks.miniature.scenes import BACKGROUND_NAMES, COLOUR_NAMES, FILLS, RIMS, SHAPES, Scene, Thing

SIDE, PER_PLACE = 6, 2  # latents of a picture and of a cell, along one side
PRESENCE, BACKGROUND, COLOUR = 1.5, 0.7, 1.3  # of each of a cell's four latents
SHAPE, FILL, RIM = 4.0, 0.9, 0.8  # the distance between two things that differ in this fact alone
#: Four latents further than this from every code mean nothing.
SMUDGE = 1.6
#: Subtracted from the channel that tells things from background: its mean over scenes of one to four things.
CENTRE = -0.66
_UP, _LEFT, _CROSSED = (np.array(signs).reshape(2, 2) / 2 for signs in ((1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1)))


def _simplex(n: int) -> np.ndarray:
    """n points in n - 1 dimensions, each at distance 1 from every other, around 0: [n, n - 1]."""
    rows = [np.r_[np.ones(k), -k, np.zeros(n - k - 1)] / np.sqrt(2 * k * (k + 1)) for k in range(1, n)]
    return np.stack(rows, axis=1)


@cache
def _ground(background: str) -> np.ndarray:
    corners = np.array([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)])
    corner = BACKGROUND * corners[BACKGROUND_NAMES.index(background)]
    return np.broadcast_to(np.r_[corner, -PRESENCE - CENTRE][:, None, None], (4, PER_PLACE, PER_PLACE))


@cache
def _thing(thing: Thing) -> np.ndarray:
    """The four latents of a thing's cell: float [4, 2, 2]; its place does not matter."""
    axis, sign = divmod(COLOUR_NAMES.index(thing.colour), 2)
    colour = np.zeros(4)
    colour[axis], colour[3] = COLOUR * (1 - 2 * sign), PRESENCE - CENTRE
    result = np.broadcast_to(colour[:, None, None], (4, PER_PLACE, PER_PLACE)).copy()
    for scale, names, value, part in (
        (SHAPE, SHAPES, thing.shape, _UP), (FILL, FILLS, thing.fill, _LEFT), (RIM, RIMS, thing.rim, _CROSSED),
    ):  # fmt: skip
        point = scale * _simplex(len(names))[names.index(value)]
        result[: len(point)] += point[:, None, None] * part
    return result


def code(scene: Scene) -> np.ndarray:
    """The latents of a scene: float64 [4, 6, 6], of about unit variance."""
    result = np.tile(_ground(scene.background), (1, 3, 3))
    for thing in scene.things:
        y, x = PER_PLACE * thing.row, PER_PLACE * thing.column
        result[:, y : y + PER_PLACE, x : x + PER_PLACE] = _thing(Thing(0, *_facts(thing)))
    return result


def _facts(thing: Thing) -> tuple[str, str, str, str]:
    return thing.shape, thing.colour, thing.fill, thing.rim


def codes(scenes: list[Scene]) -> Tensor:
    """float32 [B, 4, 6, 6]."""
    return torch.from_numpy(np.stack([code(scene) for scene in scenes])).float()


@cache
def _readings() -> tuple[list[tuple[str, ...]], np.ndarray]:
    """What four latents can mean, (background,) or a thing's facts, and their codes: float32 [n, 16]."""
    things = itertools.product(SHAPES, COLOUR_NAMES, FILLS, RIMS)
    meanings: list[tuple[str, ...]] = [*((name,) for name in BACKGROUND_NAMES), *things]
    rows = [_ground(m[0]) if len(m) == 1 else _thing(Thing(0, *m)) for m in meanings]
    return meanings, np.stack(rows).reshape(len(rows), -1).astype(np.float32)


def read(latents: Tensor) -> list[Scene]:
    """The scenes whose codes are nearest, place by place, [B, 4, 6, 6]; a place far from all codes is a smudge.

    For a look at latents without the autoencoder; the score is read from pictures (`scenes.parse`).
    """
    meanings, known = _readings()
    cells = latents.detach().float().cpu().unfold(2, 2, 2).unfold(3, 2, 2)  # [B, 4, 3, 3, 2, 2]
    cells = cells.permute(0, 2, 3, 1, 4, 5).reshape(len(latents), 9, -1)
    distances = torch.cdist(cells, torch.from_numpy(known))
    nearest, which = (x.numpy() for x in distances.min(-1))
    scenes = []
    for row, near in zip(which, nearest, strict=True):
        found = [meanings[n] for n in row]
        grounds = [m[0] for m in found if len(m) == 1]
        background = max(BACKGROUND_NAMES, key=grounds.count)
        things = tuple(Thing(place, *m) for place, m in enumerate(found) if len(m) == 4 and near[place] <= SMUDGE)
        scenes.append(Scene(background, things, int((near > SMUDGE).sum())))
    return scenes
