"""Masks in pixels, and what becomes of them in latents. White, 255, is repainted, black kept."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

SIDES = ("left", "top", "right", "bottom")
Box = tuple[int, int, int, int]


def grown(mask: Image.Image, pixels: int) -> Image.Image:
    """The white part so many pixels larger on every side, or smaller for a number below 0."""
    for _ in range(abs(pixels)):  # step by step: Pillow's cost grows with the square of the size
        mask = mask.filter(ImageFilter.MaxFilter(3) if pixels > 0 else ImageFilter.MinFilter(3))
    return mask


def softened(mask: Image.Image, pixels: float) -> Image.Image:
    """Its edges blurred with a Gaussian of so many pixels, inwards and outwards."""
    return mask.filter(ImageFilter.GaussianBlur(pixels)) if pixels else mask


def share(mask: Image.Image) -> np.ndarray:
    """[H, W] float64, 0 to 1."""
    return np.asarray(mask, dtype=np.float64) / 255


def to_cells(values: np.ndarray, factor: int, soft: bool = False) -> Tensor:
    """Numbers per pixel [H, W], 0 to 1, as numbers per latent [h, w], float64.

    Hard: 1 for every latent of which any pixel is half white or more, so that no thin stroke is lost; soft: the mean.
    """
    height, width = values.shape
    cells = torch.from_numpy(values.reshape(height // factor, factor, width // factor, factor))
    if soft:
        return cells.mean((1, 3))
    return (cells.amax((1, 3)) >= 0.5).double()


def box_of(mask: Image.Image, padding: int, size: tuple[int, int]) -> Box:
    """The part of a picture to work on at full resolution: (left, top, right, bottom) in pixels.

    The white part with padding around, grown to the proportions of size (width, height) and shifted inside the picture;
    as near to them as the picture allows. Raises ValueError for a mask without white.
    """
    found = mask.point(lambda value: 255 * (value >= 128)).getbbox()
    if found is None:
        raise ValueError("the mask is black: there is nothing to repaint, paint what should change white")
    left, top, right, bottom = (int(side) for side in found)
    spans = []
    for low, high, whole in ((left, right, mask.width), (top, bottom, mask.height)):
        spans.append((max(0, low - padding), min(whole, high + padding)))
    wide, high = (b - a for a, b in spans)
    wide, high = max(wide, round(high * size[0] / size[1])), max(high, round(wide * size[1] / size[0]))
    (left, right), (top, bottom) = (_shifted(span, length, whole) for span, length, whole in
                                    zip(spans, (wide, high), mask.size))
    return left, top, right, bottom


def _shifted(span: tuple[int, int], length: int, whole: int) -> tuple[int, int]:
    """A span of this length around this one's middle, inside 0 .. whole."""
    length = min(length, whole)
    start = min(max(0, (span[0] + span[1] - length) // 2), whole - length)
    return start, start + length


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """What is white filled with the colours around it: the kept part blurred ever less, one over the other (A1111)."""
    kept = Image.new("RGBA", image.size)
    kept.paste(image.convert("RGBA"), mask=ImageChops.invert(mask))
    premultiplied = kept.convert("RGBa")
    result = Image.new("RGBA", image.size)
    for radius, repeats in ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)):
        blurred = premultiplied.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(repeats):
            result.alpha_composite(blurred)
    return result.convert("RGB")


def extended(image: Image.Image, sides: Mapping[str, int]) -> Image.Image:
    """A larger canvas, so many pixels more at each side, the edge's pixels repeated."""
    left, top, right, bottom = (sides.get(side, 0) for side in SIDES)
    array = np.asarray(image)
    around = ((top, bottom), (left, right), (0, 0))[: array.ndim]
    return Image.fromarray(np.pad(array, around, mode="edge"))


def ramp(size: tuple[int, int], sides: Mapping[str, int], k: float = 0.5) -> np.ndarray:
    """[H, W], of a canvas that was extended from this size (width, height): 1 in what is new, and exp(-d / (k * pixels
    added)) at distance d from it, 0 where that falls below .05 (Be-Your-Outpainter, arXiv 2403.13745)."""
    left, top, right, bottom = (sides.get(side, 0) for side in SIDES)
    y, x = np.mgrid[: top + size[1] + bottom, : left + size[0] + right].astype(float)
    result = np.zeros(x.shape)
    inside = [(x - left, left), (y - top, top), (left + size[0] - 1 - x, right), (top + size[1] - 1 - y, bottom)]
    for distance, added in inside:
        if added:
            soft = np.exp(-np.clip(distance + 1, 0, None) / (k * added))
            result = np.maximum(result, np.where(soft < 0.05, 0.0, soft))
    return result


def pasted(original: Image.Image, drawn: Image.Image, mask: Image.Image, box: Box | None = None) -> Image.Image:
    """The drawn picture in the original, brought to the box's size, where the mask is white; pixels under black are the
    original's, exactly."""
    whole = original.copy()
    if box is None:
        return Image.composite(drawn, whole, mask)
    drawn = drawn.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS)
    whole.paste(Image.composite(drawn, original.crop(box), mask.crop(box)), box[:2])
    return whole


def matched(drawn: Image.Image, original: Image.Image, where: np.ndarray | None = None) -> Image.Image:
    """The drawn picture with the original's colours: in YCbCr, mean and spread of each channel are made those of the
    original, measured where `where` [H, W] is True (what was kept, where a mask keeps something)."""
    a, b = (np.asarray(image.convert("YCbCr"), dtype=np.float64) for image in (drawn, original))
    seen = np.ones(a.shape[:2], bool) if where is None or not where.any() else where
    mine, theirs = a[seen], b[seen]
    gain = np.where(mine.std(0) > 1e-6, theirs.std(0) / np.maximum(mine.std(0), 1e-6), 1.0)
    result = (a - mine.mean(0)) * gain + theirs.mean(0)
    return Image.fromarray(result.round().clip(0, 255).astype(np.uint8), "YCbCr").convert("RGB")


def read_sides(text: str) -> dict[str, int]:
    """"left=64,top=32" as pixels per side. Raises ValueError for anything else."""
    sides: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition("="))
        if name not in SIDES or not number.isdecimal() or name in sides:
            raise ValueError(f"extend names sides and pixels, left=64,top=0 ({', '.join(SIDES)}), got {text!r}")
        sides[name] = int(number)
    if not any(sides.values()):
        raise ValueError(f"extend adds pixels to at least one side, got {text!r}")
    return sides


def edge(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """The nearest size in whole latents."""
    width, height = (max(1, math.floor(side / factor + 0.5)) * factor for side in size)
    return width, height
