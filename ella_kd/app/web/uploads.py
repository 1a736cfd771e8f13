"""Pictures that somebody gives to the page: what they may be, and what was painted on them."""

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

PIXELS = 40_000_000  # the most of an uploaded picture; a small file may hold ever so many


def check_pixels(source: str | Path | BytesIO, side: int | None = None) -> None:
    """ValueError for a file that is no picture, or one that would fill the memory: its first bytes tell.

    side: the most pixels of its larger side, where it is drawn from.
    """
    try:
        with Image.open(source) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"a picture may have {PIXELS // 1_000_000} million pixels, and this has more") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError("this file is no picture") from error
    if width * height > PIXELS:
        raise ValueError(f"a picture may have {PIXELS // 1_000_000} million pixels, got {width}x{height}")
    if side is not None and max(width, height) > side:
        raise ValueError(f"the larger side of a picture may be {side} px here, got {width}x{height}")


def opened(source: str | bytes, side: int) -> Image.Image:
    """An uploaded picture, upright, decoded once its size is known to be allowed."""
    file = BytesIO(source) if isinstance(source, bytes) else source
    check_pixels(file, side)
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError) as error:
        raise ValueError("this picture is damaged") from error


def start_and_mask(value: dict[str, Any], side: int) -> dict[str, Image.Image]:
    """What an editor holds: the picture below, start, and mask, white where somebody painted; each where there is one.
    """
    if value.get("background") is None:
        return {}
    below = opened(value["background"], side).convert("RGBA")
    if below.getchannel("A").getbbox() is None:
        return {}
    mask = Image.new("L", below.size)
    for layer in value.get("layers") or []:
        mask.paste(255, mask=opened(layer, side).convert("RGBA").getchannel("A").resize(below.size))
    return {"start": below, "mask": mask} if mask.getbbox() else {"start": below}


def painted(start: str, mask: str | None) -> dict[str, Any]:
    """The same the other way."""
    with Image.open(start) as image:
        below = image.convert("RGBA")
    layers = []
    if mask is not None:
        with Image.open(mask) as image:
            layers = [Image.new("RGBA", below.size, "white")]
            layers[0].putalpha(image.convert("L").resize(below.size))
    return {"background": below, "layers": layers, "composite": Image.alpha_composite(below, layers[0]) if layers else
            below}
