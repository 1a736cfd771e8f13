"""A start picture in pixels: brought to size, cropped or extended, with its mask; what is drawn is put back into it."""

import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageOps

from ella_kd.pictures import masks
from ella_kd.pictures.options import FromPicture
from ella_kd.pictures.reading import read_mask, read_picture

Size = tuple[int, int]  # width, height


@dataclass(frozen=True, eq=False)
class Canvas:
    """What is drawn on: `image` (RGB) is encoded, and what is drawn goes back into `original` under `soft`.

    hard (L): what is repainted; strengths [H, W]: how far, 0 to 1; both of image's size, None for everything alike.
    soft (L): of original's size; None where nothing of it is kept. box: which part of original image is.
    size: width and height that were asked for, or found. depth (L): of image's size, None where none is given.
    start: the size of the start picture as it came, before anything of it was cut off or added.
    """

    asked: FromPicture
    image: Image.Image
    original: Image.Image
    hard: Image.Image | None
    strengths: np.ndarray | None
    soft: Image.Image | None
    box: masks.Box | None
    size: Size
    start: Size
    depth: Image.Image | None = None

    @classmethod
    def of(cls, asked: FromPicture, given: Size | None, own: Size, factor: int) -> "Canvas":
        """given: the size asked for, None for the picture's own in whole latents (with crop_to_mask the model's own).

        Raises what reading raises, and ValueError for pictures of other proportions and sizes that no latents have.
        """
        assert asked.start is not None
        picture, alpha = read_picture(asked.start)
        start = picture.size
        mask = _mask(asked, picture.size, alpha)
        blur = factor / 2 if asked.mask_blur is None else asked.mask_blur
        if asked.crop_to_mask:
            if mask is None:
                raise ValueError("crop_to_mask needs a mask: give one, or a picture that is transparent in places")
            size = given or own
            box = masks.box_of(mask, asked.padding, size)
            part = picture.crop(box).resize(size, Image.Resampling.LANCZOS)
            hard = mask.crop(box).resize(size, Image.Resampling.BILINEAR)
            return cls(asked, _filled(asked, part, hard), picture, hard, None, masks.softened(mask, blur), box, size,
                       start)
        size = given or masks.edge(picture.size, factor)
        if given is None and size != picture.size:
            warnings.warn(f"the picture is {picture.width}x{picture.height}, and is drawn at {size[0]}x{size[1]}, in "
                          f"multiples of {factor}", stacklevel=4)
        picture, mask = _fitted(picture, size), mask and _fitted(mask, size)
        depth = asked.depth and _fitted(_same(read_mask(asked.depth), "the depth picture", picture.size), size)
        strengths = None
        if asked.strength_map is not None:
            strengths = masks.share(_fitted(_same(read_mask(asked.strength_map), "the strength map", picture.size),
                                            size))
            if mask is not None:
                strengths = strengths * (masks.share(mask) >= 0.5)
        soft = None if mask is None else masks.softened(mask, blur)
        if sides := asked.sides:
            picture, mask, soft, strengths = _extended(picture, mask, soft, strengths, sides, factor)
        elif strengths is not None:
            soft = _paste_of(strengths)
        return cls(asked, _filled(asked, picture, mask), picture, mask, strengths, soft, None, size, start,
                   depth or None)

    def back(self, drawn: Image.Image) -> Image.Image:
        """A drawn picture of image's size as a picture of original's, the original's pixels where it is kept."""
        if self.asked.match_colours:
            drawn = masks.matched(drawn, self.image, None if self.hard is None else masks.share(self.hard) < 0.5)
        return drawn if self.soft is None else masks.pasted(self.original, drawn, self.soft, self.box)

    def part(self, picture: Image.Image) -> Image.Image:
        """What is drawn on of another picture of the whole, such as a control's, so that both stay one over the other.

        A picture of the start's proportions goes the start's way: it is cut where that was, cropped to the mask, or
        lies on black where that was extended. One of the canvas's own proportions is taken as it is, and one of others
        too, with a warning, as it will be stretched.
        """
        if self.box is not None:
            if not _alike(picture.size, self.start):
                self._warn_of(picture, "the start picture", self.start)
            return picture.resize(self.original.size, Image.Resampling.LANCZOS).crop(self.box)
        whole, sides = self.image.size, self.asked.sides
        if picture.size != whole and _alike(picture.size, self.start):
            if not sides and _alike(self.start, whole):
                return picture
            part = Image.new("RGB", whole)
            part.paste(_fitted(picture, self.size), (sides.get("left", 0), sides.get("top", 0)))
            return part
        if not _alike(picture.size, whole):
            self._warn_of(picture, "what is drawn", whole)
        return picture

    def _warn_of(self, picture: Image.Image, what: str, size: Size) -> None:
        warnings.warn(f"the control's picture is {picture.width}x{picture.height} and {what} {size[0]}x{size[1]}: it "
                      "is stretched; give one of the start picture's proportions", stacklevel=5)


def _mask(asked: FromPicture, size: Size, alpha: Image.Image | None) -> Image.Image | None:
    if asked.mask is not None:
        mask = _same(read_mask(asked.mask), "the mask", size).resize(size, Image.Resampling.BILINEAR)
    elif alpha is not None:
        mask = ImageChops.invert(alpha)
    else:
        if asked.invert_mask:
            raise ValueError("invert_mask is about a mask: give one, or a picture that is transparent in places")
        return None
    return masks.grown(ImageChops.invert(mask) if asked.invert_mask else mask, asked.mask_grow)


def _same(image: Image.Image, what: str, size: Size) -> Image.Image:
    """ValueError for other proportions, by more than a pixel."""
    if not _alike(image.size, size):
        raise ValueError(f"{what} is {image.width}x{image.height} and the picture {size[0]}x{size[1]}: give both the "
                         "same proportions")
    return image


def _alike(one: Size, other: Size) -> bool:
    """Whether two sizes have the same proportions, but for a pixel."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)


def _fitted(image: Image.Image, size: Size) -> Image.Image:
    """Brought to this size; what is too much of other proportions is cut at both ends."""
    how = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS
    return image if image.size == size else ImageOps.fit(image, size, how)


def _filled(asked: FromPicture, picture: Image.Image, mask: Image.Image | None) -> Image.Image:
    return masks.filled(picture, mask) if asked.fill == "blur" and mask is not None else picture


def _extended(picture: Image.Image, mask: Image.Image | None, soft: Image.Image | None, strengths: np.ndarray | None,
              sides: dict[str, int], factor: int) -> tuple[Image.Image, Image.Image, Image.Image, np.ndarray]:
    """All of them on the larger canvas: what is new is repainted, and of the old a seam, ever less."""
    new = masks.ramp(picture.size, sides)
    if any(side % factor for side in new.shape):
        near = masks.edge((new.shape[1], new.shape[0]), factor)
        raise ValueError(f"the extended picture would be {new.shape[1]}x{new.shape[0]}: extend it to multiples of "
                         f"{factor}, such as {near[0]}x{near[1]}")
    left, top = sides.get("left", 0), sides.get("top", 0)

    def placed(values: np.ndarray) -> np.ndarray:
        whole = np.zeros(new.shape)
        whole[top : top + picture.height, left : left + picture.width] = values
        return whole

    if mask is not None:
        old = masks.share(mask) >= 0.5
        new = np.maximum(new, placed(old if strengths is None else old * strengths))
    elif strengths is not None:
        new = np.maximum(new, placed(strengths))
    paste = masks.share(_paste_of(new))
    if soft is not None:
        paste = np.maximum(paste, placed(masks.share(soft)))
    hard = Image.fromarray((255 * (new > 0)).astype(np.uint8))
    return masks.extended(picture, sides), hard, Image.fromarray((paste * 255).round().astype(np.uint8)), new


def _paste_of(strengths: np.ndarray) -> Image.Image:
    """What is drawn at a strength of a twentieth or more is pasted whole, what is weaker ever less."""
    return Image.fromarray((np.clip(strengths * 20, 0, 1) * 255).round().astype(np.uint8))
